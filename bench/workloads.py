"""The inputs of each op's cases, the bytes that they count, and what is right in float64."""

from collections.abc import Iterator

import torch
from torch import Tensor

from bench.case import Arguments, Case, Outputs, Workload, call_by_name, double
from fastrl import reference

_SEED = 20
_PIECE = 2**20  # elements that the gate looks at together
_MOST_PIECES = 8


def make_returns(case: Case, device: torch.device) -> Arguments:
    generator = torch.Generator().manual_seed(_SEED)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, case.dtype)

    def share(p: float) -> Tensor:
        return (torch.rand(case.shape, generator=generator) < p).to(device)

    arguments: Arguments = {"rewards": normal(*case.shape)}
    if case.op != "discounted_returns":
        arguments["values"] = normal(*case.shape)
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
    """Every input once, and every output once: two of gae, one of the others."""
    rewards = arguments["rewards"]
    read = sum(x.numel() * x.element_size() for x in arguments.values() if isinstance(x, Tensor))
    outputs = 2 if case.op == "gae" else 1
    return read + outputs * rewards.numel() * rewards.element_size()


def make_logits(case: Case, device: torch.device) -> Arguments:
    """Half of the rows are as of an untrained model; in the others one token is likely."""
    generator = torch.Generator().manual_seed(_SEED)
    rows, vocab = case.shape
    # Some rows, over and over: drawing all of them takes longer than most of what is timed.
    block = torch.empty(min(rows, 64), vocab).normal_(generator=generator)
    logits = block.repeat(-(-rows // len(block)), 1)[:rows]
    token_ids = torch.randint(vocab, (rows,), generator=generator)
    boost = torch.rand(rows, generator=generator) * 30 * (torch.arange(rows) % 2)
    boost[-1] = 0  # log p of a likely token is near 0: an op that skips the last row would pass
    logits[torch.arange(rows), token_ids] += boost
    arguments: Arguments = {"logits": logits.to(device, case.dtype)}
    if case.op == "token_logprobs":
        arguments["token_ids"] = token_ids.to(device)
    else:
        arguments["seeds"] = torch.arange(rows, device=device)
    return arguments


def token_logprobs_bytes(case: Case, arguments: Arguments) -> int:
    """Forward: logits and ids in, log-prob (and entropy) out. Backward: logits in, gradient out."""
    logits = arguments["logits"]
    matrix = logits.numel() * logits.element_size()
    rows = logits.shape[0]
    per_row = 8 + 4 * (2 if case.options.get("return_entropy") else 1)
    forward, backward = matrix + per_row * rows, 2 * matrix + per_row * rows
    return {"forward": forward, "backward": backward, "both": forward + backward}[case.mode]


def sample_tokens_bytes(case: Case, arguments: Arguments) -> int:
    """Logits and seeds in, id and log-prob out."""
    logits = arguments["logits"]
    return logits.numel() * logits.element_size() + (8 + 8 + 4) * logits.shape[0]


def _whole(case: Case) -> Iterator[slice | None]:
    yield None


def _rows(case: Case) -> Iterator[slice | None]:
    """All rows of a small matrix; of a large one the first, the last, and some between them:
    float64 for all of it would take longer than the benchmark."""
    rows, vocab = case.shape
    step = max(1, _PIECE // vocab)
    starts = torch.arange(0, rows, step)
    chosen = torch.linspace(0, len(starts) - 1, min(_MOST_PIECES, len(starts))).long()
    for start in starts[chosen].tolist():
        yield slice(start, min(start + step, rows))


def _reference_truth(case: Case, arguments: Arguments, outputs: Outputs) -> Outputs:
    return call_by_name(reference, case, double(arguments))


def _sampled_truth(case: Case, arguments: Arguments, outputs: Outputs) -> Outputs:
    """Any draw may be right: what is known is the log-probability of the ids that were drawn."""
    token_ids = outputs[0]
    temperature = case.options.get("temperature", 1.0)
    logprobs = reference.token_logprobs(
        arguments["logits"].double(), token_ids, temperature=temperature
    )
    assert isinstance(logprobs, Tensor)
    return token_ids, logprobs


def _returns(*learned: str) -> Workload:
    return Workload(make_returns, returns_bytes, learned, _whole, _reference_truth)


WORKLOADS = {
    "gae": _returns("rewards", "values"),
    "lambda_returns": _returns("rewards", "values"),
    "discounted_returns": _returns("rewards"),
    "token_logprobs": Workload(
        make_logits, token_logprobs_bytes, ("logits",), _rows, _reference_truth
    ),
    "sample_tokens": Workload(make_logits, sample_tokens_bytes, (), _rows, _sampled_truth),
}
