"""Logits of the cases of token_logprobs and of sample_tokens."""

import torch
from torch import Tensor

from bench.case import Arguments, Case, Outputs, Workload
from bench.workloads.pieces import SEED, rows_of_matrix, size_in_bytes
from fastrl import reference


def likely(rows: int, generator: torch.Generator) -> Tensor:
    """[rows] in [0, 1): how much to favour a row's token; 0 in every second row."""
    boost = torch.rand(rows, generator=generator) * (torch.arange(rows) % 2)
    boost[-1] = 0  # log p of a likely token is near 0: an op that skips the last row would pass
    return boost


def make_logits(case: Case, device: torch.device) -> Arguments:
    """Half of the rows are as of an untrained model; in the others one token is likely."""
    generator = torch.Generator().manual_seed(SEED)
    rows, vocab = case.shape
    # Some rows, over and over: drawing all of them takes longer than most of what is timed.
    block = torch.empty(min(rows, 64), vocab).normal_(generator=generator).to(device)
    logits = block.repeat(-(-rows // len(block)), 1)[:rows]
    token_ids = torch.randint(vocab, (rows,), generator=generator).to(device)
    boost = likely(rows, generator).to(device)
    logits[torch.arange(rows, device=device), token_ids] += 30 * boost
    arguments: Arguments = {"logits": logits.to(case.dtype)}
    if case.op == "token_logprobs":
        arguments["token_ids"] = token_ids
    else:
        arguments["seeds"] = torch.arange(rows, device=device)
    return arguments


def token_logprobs_bytes(case: Case, arguments: Arguments) -> int:
    """Forward: logits and ids in, log-prob (and entropy) out. Backward: logits in, gradient out."""
    logits = arguments["logits"]
    matrix = size_in_bytes(logits)
    rows = logits.shape[0]
    per_row = 8 + 4 * (2 if case.options.get("return_entropy") else 1)
    forward, backward = matrix + per_row * rows, 2 * matrix + per_row * rows
    return {"forward": forward, "backward": backward, "both": forward + backward}[case.mode]


def sample_tokens_bytes(case: Case, arguments: Arguments) -> int:
    """Logits and seeds in, id and log-prob out."""
    logits = arguments["logits"]
    return size_in_bytes(logits) + (8 + 8 + 4) * logits.shape[0]


def _sampled_truth(case: Case, arguments: Arguments, outputs: Outputs) -> Outputs:
    """Any draw may be right: what is known is the log-probability of the ids that were drawn."""
    token_ids = outputs[0]
    temperature = case.options.get("temperature", 1.0)
    logprobs = reference.token_logprobs(
        arguments["logits"].double(), token_ids, temperature=temperature
    )
    assert isinstance(logprobs, Tensor)
    return token_ids, logprobs


def _one_a_row(case: Case) -> tuple[int, ...]:
    return case.shape[:1]


WORKLOADS = {
    "token_logprobs": Workload(
        make_logits,
        token_logprobs_bytes,
        ("logits",),
        rows_of_matrix,
        upstream_shape=_one_a_row,
    ),
    "sample_tokens": Workload(
        make_logits,
        sample_tokens_bytes,
        (),
        rows_of_matrix,
        truth=_sampled_truth,
        upstream_shape=_one_a_row,
    ),
}
