"""What attention works through in a packed layout: its visible pairs as a few rectangles and
triangles, for layout.py."""

import torch
from torch import Tensor


def attention_parts(starts: Tensor, ends: Tensor, until: Tensor) -> Tensor:
    """[P, 5] int32: (query_start, query_end, key_start, key_end, is_causal), P >= 2.

    A segment attends causally to itself: a triangle. All that continues it, at any depth, stands
    after it without a gap and sees all of it: a rectangle. Each visible pair is in one part; a
    query's parts, in the order of the list, go from its root down to its own segment. They are
    those of its tree, whatever stands before or after it. Parts of nothing make up for missing
    ones: torch.compile takes a size of 0 or 1 for another program.

    Args:
        starts, ends: [S] int64, the tokens of each segment.
        until: [S] int64, the end of the subtree below it.
    """
    has_tokens = starts < ends
    starts, ends, until = starts[has_tokens], ends[has_tokens], until[has_tokens]
    one = torch.ones_like(starts)
    causal = torch.stack([starts, ends, starts, ends, one], dim=1)
    full = torch.stack([ends, until, starts, ends, 0 * one], dim=1)
    both = torch.stack([causal, full], dim=1).flatten(0, 1)  # [2 S, 5], by segment
    parts = both[both[:, 0] < both[:, 1]].int()
    return torch.nn.functional.pad(parts, (0, 0, 0, max(0, 2 - len(parts))))
