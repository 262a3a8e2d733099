"""What the workloads of several ops share: which parts of a case the gate looks at, and how it
works out the definition where all of it at once would not fit."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from bench.case import Case, Outputs

SEED = 20
BLOCK = 2**27  # scores, or logits, that a definition in blocks holds at a time
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


def in_blocks(
    function: Callable[..., Outputs], tensors: Sequence[Tensor], rows: int, axis: int
) -> Outputs:
    """function(start, *parts) for `rows` rows of the tensors' axis at a time, put together again;
    the backward pass computes each block once more, so that just one is held in memory."""
    total = tensors[0].shape[axis]
    if total <= rows:
        return function(0, *tensors)
    blocks = [
        checkpoint(function, start, *parts, use_reentrant=False)
        for start, parts in zip(
            range(0, total, rows),
            zip(*(x.split(rows, axis) for x in tensors), strict=True),
            strict=True,
        )
    ]
    return tuple(torch.cat(parts, dim=axis) for parts in zip(*blocks, strict=True))


def size_in_bytes(x: Tensor) -> int:
    return x.numel() * x.element_size()
