"""What the workloads of several ops share: which parts of a case the gate looks at, and the truth
that is the reference's own."""

from collections.abc import Iterator

import torch

from bench.case import Arguments, Case, Outputs, call_by_name, double
from fastrl import reference

SEED = 20
_PIECE = 2**20  # elements that the gate looks at together
_MOST_PIECES = 8


def whole(case: Case) -> Iterator[slice | None]:
    yield None


def rows_of_matrix(case: Case) -> Iterator[slice | None]:
    """All rows of a small matrix; of a large one the first, the last, and some between them:
    float64 for all of it would take longer than the benchmark."""
    rows, vocab = case.shape
    step = max(1, _PIECE // vocab)
    starts = torch.arange(0, rows, step)
    chosen = torch.linspace(0, len(starts) - 1, min(_MOST_PIECES, len(starts))).long()
    for start in starts[chosen].tolist():
        yield slice(start, min(start + step, rows))


def reference_truth(case: Case, arguments: Arguments, outputs: Outputs) -> Outputs:
    return call_by_name(reference, case, double(arguments))


def size_in_bytes(x: torch.Tensor) -> int:
    return x.numel() * x.element_size()
