"""Orders segments by what continues what, and checks them, for layout.py."""

from collections.abc import Sequence

import torch
from torch import Tensor


def check_bounds(bounds: list[int], num_segments: int) -> None:
    if len(bounds) != num_segments + 1:
        raise ValueError(
            f"PackedLayout: expected cu_seqlens [S + 1] = ({num_segments + 1},) for prefix "
            f"({num_segments},), got ({len(bounds)},). Begin it with 0 and end it with N."
        )
    if bounds[0] != 0 or any(end < start for start, end in zip(bounds, bounds[1:], strict=False)):
        raise ValueError(
            f"PackedLayout: expected cu_seqlens rising from 0, got {_shown(bounds)}. "
            "Pass the cumulative lengths of the segments, with a 0 before them."
        )


def subtree_ends(parents: list[int]) -> list[int]:
    """Per segment: the first segment after it that does not continue it, at any depth."""
    ends = [len(parents)] * len(parents)
    path: list[int] = []  # from a root to the segment last seen
    for s, parent in enumerate(parents):
        while path and path[-1] != parent:
            ends[path.pop()] = s
        if not path and parent != -1:
            raise ValueError(
                f"PackedLayout: expected prefix in depth-first order, got {_shown(parents)}, where "
                f"segment {s} cannot continue {parent}. PackedBatch.from_segments sorts segments."
            )
        path.append(s)
    return ends


def depth_first_order(parents: list[int]) -> list[int]:
    """All segments, each followed by those that continue it, siblings in the given order."""
    children: dict[int, list[int]] = {}
    for s, parent in enumerate(parents):
        children.setdefault(parent, []).append(s)
    order: list[int] = []
    pending = children.get(-1, [])[::-1]
    while pending:
        order.append(pending.pop())
        pending += children.get(order[-1], [])[::-1]
    if len(order) < len(parents):
        raise ValueError(
            f"from_segments: expected prefix that leads to a root, got {_shown(parents)}. "
            "Mark roots with -1; no segment may continue itself, directly or in a circle."
        )
    return order


def check_segments(
    token_ids: Sequence[Tensor], parents: list[int], loss_mask: Sequence[Tensor] | None
) -> None:
    op, num_segments = "from_segments", len(token_ids)
    check_token_ids(op, "token_ids", token_ids)
    if len(parents) != num_segments or any(not -1 <= p < num_segments for p in parents):
        raise ValueError(
            f"{op}: expected prefix [{num_segments}] of segment numbers or -1, "
            f"got {_shown(parents)}. Name for each segment the one that it continues."
        )
    if loss_mask is None:
        return
    lengths, mask_lengths = [len(x) for x in token_ids], [len(x) for x in loss_mask]
    if lengths != mask_lengths:
        raise ValueError(
            f"{op}: expected loss_mask of lengths {_shown(lengths)} like token_ids, "
            f"got {_shown(mask_lengths)}. Pass one mask per segment, of its length."
        )
    if any(mask.dtype != torch.bool for mask in loss_mask):
        raise TypeError(f"{op}: expected loss_mask of dtype bool, got another. Use mask.bool().")


def check_token_ids(op: str, argument: str, segments: Sequence[Tensor]) -> None:
    for segment in segments:
        if segment.dtype != torch.int64:
            raise TypeError(
                f"{op}: expected {argument} of dtype int64, got {segment.dtype}. Use .long()."
            )
        if segment.dim() != 1:
            raise ValueError(
                f"{op}: expected {argument} of one dimension each, got {tuple(segment.shape)}. "
                "Pass a list of segments, without padding."
            )


def _shown(numbers: list[int]) -> str:
    return str(numbers) if len(numbers) <= 16 else f"{str(numbers[:16])[:-1]}, ...]"
