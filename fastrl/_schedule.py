"""What attention works through in a packed layout: its visible pairs as a few rectangles and
triangles, for layout.py."""

import torch
from torch import Tensor


def attention_parts(starts: Tensor, ends: Tensor, until: Tensor) -> Tensor:
    """[P, 5] int32: (query_start, query_end, key_start, key_end, is_causal).

    A segment attends causally to itself: a triangle. All that continues it, at any depth, stands
    after it without a gap and sees all of it: a rectangle. Each visible pair is in one part; a
    query's parts, in the order of the list, go from its root down to its own segment. They are
    those of its tree, whatever stands before or after it.

    Args:
        starts, ends: [S] int64, the tokens of each segment.
        until: [S] int64, the end of the subtree below it.
    """
    has_tokens = starts < ends
    exists = torch.stack([has_tokens, has_tokens & (ends < until)], dim=1)  # triangle, rectangle
    part = exists.flatten().nonzero().squeeze(-1)  # by segment
    segment, is_causal = part >> 1, (part & 1) == 0
    # index_select: half the time of the brackets
    starts, ends, until = (x.int().index_select(0, segment) for x in (starts, ends, until))
    query_start = torch.where(is_causal, starts, ends)
    query_end = torch.where(is_causal, ends, until)
    return torch.stack([query_start, query_end, starts, ends, is_causal.int()], dim=1)


def at_least_two(rows: Tensor) -> Tensor:
    """With rows of zeros where there are fewer: for torch.compile a size of 0 or 1 is another
    program. A part from 0 to 0 is nothing."""
    return torch.nn.functional.pad(rows, (0, 0, 0, max(0, 2 - len(rows))))


def with_any_length(tensors: list[Tensor]) -> list[Tensor]:
    """The same tensors, marked so that torch.compile takes their first size for a variable: what it
    has compiled for one layout then serves the next.

    This is `torch._dynamo.maybe_mark_dynamic(tensor, 0)` without the import, which costs a second:
    the attributes that it sets in torch 2.10 to 2.13. A test compares them.
    """
    for tensor in tensors:
        tensor._dynamo_weak_dynamic_indices = {0}  # type: ignore[attr-defined]
        tensor._has_dynamo_dim_marking = True  # type: ignore[attr-defined]
    return tensors
