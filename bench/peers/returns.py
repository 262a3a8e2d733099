"""The returns of others: torchrl, a numba loop, torch.compile."""

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.case import Arguments, Case, Implementation, Outputs, Unavailable
from bench.peers.peer import Peer, as_tuple, compiled_reference, eager
from bench.workloads.returns import LONG_ROW


def _short(build: Implementation) -> Implementation:
    def checked(case: Case, arguments: Arguments) -> Callable[[], Outputs]:
        if len(case.shape) > 1 and case.shape[-1] > LONG_ROW:
            raise Unavailable("loops over time: a call would take the better part of a minute")
        return build(case, arguments)

    return checked


def _numba_returns(case: Case, arguments: Arguments) -> Callable[[], Outputs]:
    if case.mode != "forward":
        raise Unavailable("has no gradient")
    if arguments["rewards"].device.type != "cpu":
        raise Unavailable("runs on the CPU alone")
    loops = importlib.import_module("bench.peers.numba_loops")
    if not hasattr(loops, case.op):
        raise Unavailable("nobody has written this loop yet")
    flat = {k: v.reshape(-1).numpy() if isinstance(v, Tensor) else v for k, v in arguments.items()}
    bounds = flat.get("cu_seqlens")
    if bounds is None:
        rows, steps = case.shape
        bounds = torch.arange(0, rows * steps + 1, steps, dtype=torch.int32).numpy()
    names = {
        "gae": ("bootstrap_value", "next_values", "terminated", "mask"),
        "lambda_returns": ("bootstrap_value", "terminated"),
        "discounted_returns": ("terminated",),
    }[case.op]
    if unknown := set(case.inputs) - {"cu_seqlens", *names}:
        raise Unavailable(f"this loop knows no {', '.join(sorted(unknown))}")
    loop = getattr(loops, case.op)
    tensors = [flat[k] for k in ("rewards", "values") if k in flat]
    numbers = [flat["rewards"].dtype.type(x) for x in case.options.values()]
    given = [flat.get(k) for k in names]

    def run() -> Outputs:
        outputs = as_tuple(loop(*tensors, bounds, *given, *numbers))
        return tuple(torch.from_numpy(x).view(case.shape) for x in outputs)

    return run


def _torchrl_returns(name: str) -> Implementation:
    """torchrl wants [B, T, 1], the next values, and done beside terminated."""

    def build(case: Case, arguments: Arguments) -> Callable[[], Outputs]:
        if unable := {"cu_seqlens", "mask"} & set(case.inputs):
            raise Unavailable(f"has no {', '.join(sorted(unable))}")
        functional = importlib.import_module("torchrl.objectives.value.functional")
        rewards = arguments["rewards"]
        ended = arguments.get("terminated", torch.zeros_like(rewards, dtype=torch.bool))
        if name == "reward2go":
            given: dict[str, Any] = {"reward": rewards, "done": ended.clone()}
            given["done"][:, -1] = True  # it runs on into the next row otherwise
        else:
            given = {"reward": rewards, "done": ended, "terminated": ended}
            given["next_state_value"] = _next_values(arguments)
            if case.op in ("gae", "vtrace"):
                given["state_value"] = arguments["values"]
            if case.op == "vtrace":
                given["log_pi"] = arguments["log_ratio"]
                given["log_mu"] = torch.zeros_like(rewards)
        given = {k: v.unsqueeze(-1) for k, v in given.items()}
        given["gamma"] = case.options["gamma"]
        if "gae_lambda" in case.options:
            given["lmbda"] = case.options["gae_lambda"]
        function = getattr(functional, name)

        def run() -> Outputs:
            return tuple(x.squeeze(-1) for x in as_tuple(function(**given)))

        return run

    return build


def _next_values(arguments: Arguments) -> Tensor:
    if "next_values" in arguments:
        return arguments["next_values"]
    values = arguments["values"]
    last = arguments.get("bootstrap_value", values.new_zeros(values.shape[0]))
    return torch.cat([values[:, 1:], last[:, None]], dim=1)


def _compiled_returns(case: Case, arguments: Arguments) -> Callable[[], Outputs]:
    if case.shape[-1] > 64 or "cu_seqlens" in case.inputs:
        raise Unavailable("unrolls the loop over time: compiling would take minutes")
    return compiled_reference(case, arguments)


_TORCHRL = {
    "gae": ("generalized_advantage_estimate", "vec_generalized_advantage_estimate"),
    "lambda_returns": ("td_lambda_return_estimate", "vec_td_lambda_return_estimate"),
    "discounted_returns": ("reward2go",),
    "vtrace": ("vtrace_advantage_estimate",),
    "retrace_returns": (),
    "n_step_returns": (),
}


def of(op: str) -> list[Peer]:
    return [
        Peer("fastrl.reference", "torch", _short(eager)),
        *(Peer(f"torchrl {f}", "torchrl", _short(_torchrl_returns(f))) for f in _TORCHRL[op]),
        Peer("numba loop, one thread", "numba", _numba_returns),
        Peer("torch.compile", "torch", _compiled_returns),
    ]
