"""Rewards and values of the returns' cases."""

import torch
from torch import Tensor

from bench.case import Arguments, Case, Outputs, Workload, call_reference
from bench.workloads.pieces import SEED, size_in_bytes, whole
from fastrl import reference

LONG_ROW = 2**17  # steps; a loop over more of them in Python takes many seconds
_BLOCKS = 1024

# What each op takes beside rewards, shaped like them.
_FLOATS = {
    "discounted_returns": (),
    "gae": ("values",),
    "lambda_returns": ("values",),
    "n_step_returns": ("values",),
    "retrace_returns": ("values", "q_values", "log_ratio"),
    "vtrace": ("values", "log_ratio"),
}


def make_returns(case: Case, device: torch.device) -> Arguments:
    generator = torch.Generator().manual_seed(SEED)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, case.dtype)

    def share(p: float) -> Tensor:
        return (torch.rand(case.shape, generator=generator) < p).to(device)

    arguments: Arguments = {"rewards": normal(*case.shape)}
    for name in _FLOATS[case.op]:
        arguments[name] = normal(*case.shape)
    rows = case.shape[0]
    if "cu_seqlens" in case.inputs:
        arguments["cu_seqlens"] = _ragged(case.shape[0], 2048, generator).to(device)
        rows = len(arguments["cu_seqlens"]) - 1
    optional = {
        "next_values": lambda: normal(*case.shape),
        "bootstrap_value": lambda: normal(rows),
        "terminated": lambda: share(0.01),
        "mask": lambda: share(0.9),
    }
    return arguments | {k: make() for k, make in optional.items() if k in case.inputs}


def _ragged(total: int, longest: int, generator: torch.Generator) -> Tensor:
    """cu_seqlens of segments of 1 to `longest` steps that fill `total`."""
    lengths = torch.randint(1, longest + 1, (total,), generator=generator)
    ends = lengths.cumsum(0)
    bounds = [torch.zeros(1), ends[ends < total], torch.tensor([total])]
    return torch.cat(bounds).int()


def returns_bytes(case: Case, arguments: Arguments) -> int:
    """Every input once, and every output once: two of gae and vtrace, one of the others."""
    rewards = arguments["rewards"]
    read = sum(size_in_bytes(x) for x in arguments.values() if isinstance(x, Tensor))
    outputs = 2 if case.op in ("gae", "vtrace") else 1
    return read + outputs * size_in_bytes(rewards)


def definition(case: Case, arguments: Arguments) -> Outputs:
    """Of a long row: of its blocks side by side, each with what the next one hands back to it."""
    if case.op != "gae" or case.shape[-1] <= LONG_ROW or len(case.shape) == 1:
        return call_reference(case, arguments)
    rows = {k: x.view(_BLOCKS, -1) for k, x in arguments.items()}
    own, _ = reference.gae(**rows, **case.options)
    factor = case.options["gamma"] * case.options["gae_lambda"] * (~rows["terminated"]).to(own)
    handed_back = factor.flip(1).cumprod(1).flip(1)  # of what follows the block, to each step
    advantages = own.clone()
    for k in reversed(range(_BLOCKS - 1)):
        advantages[k] += handed_back[k] * advantages[k + 1, 0]
    return advantages.view(case.shape), (advantages + rows["values"]).view(case.shape)


WORKLOADS = {
    op: Workload(
        make_returns,
        returns_bytes,
        ("rewards", *_FLOATS[op]),
        whole,
        definition,
    )
    for op in _FLOATS
}
