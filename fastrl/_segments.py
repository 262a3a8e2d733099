"""Orders segments by what continues what, and checks them, for layout.py."""

from collections.abc import Sequence

import torch
from torch import Tensor


def check_tensor(op: str, argument: str, x: object) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(
            f"{op}: expected {argument} as a tensor, got {type(x).__name__}. Use torch.tensor."
        )


def check_lists(cu_seqlens: Tensor, prefix: Tensor) -> None:
    for name, numbers in (("cu_seqlens", cu_seqlens), ("prefix", prefix)):
        check_tensor("PackedLayout", name, numbers)
        if numbers.dim() != 1:
            raise ValueError(
                f"PackedLayout: expected {name} of one dimension, got {tuple(numbers.shape)}. "
                "Pass one number per segment, and for cu_seqlens a 0 before them."
            )
        # torch.tensor([]) is float32
        if len(numbers) and (numbers.is_floating_point() or numbers.dtype == torch.bool):
            raise TypeError(
                f"PackedLayout: expected {name} of dtype int32, got {numbers.dtype}. Use .int()."
            )


def check_bounds(bounds: Tensor, num_segments: int) -> None:
    if bounds.shape != (num_segments + 1,):
        raise ValueError(
            f"PackedLayout: expected cu_seqlens [S + 1] = ({num_segments + 1},) for prefix "
            f"({num_segments},), got {tuple(bounds.shape)}. Begin it with 0 and end it with N."
        )
    if bounds[0] != 0 or bool((bounds.diff() < 0).any()):
        raise ValueError(
            f"PackedLayout: expected cu_seqlens rising from 0, got {_shown(bounds)}. "
            "Pass the cumulative lengths of the segments, with a 0 before them."
        )


def check_completions(completions: Tensor, count: int) -> None:
    check_tensor("PackedBatch.take", "completions", completions)
    if completions.dtype != torch.bool:
        raise TypeError(
            f"PackedBatch.take: expected completions bool, got {completions.dtype}. "
            "Pass True for each one that stays."
        )
    if completions.shape != (count,):
        raise ValueError(
            f"PackedBatch.take: expected completions [C] = ({count},), got "
            f"{tuple(completions.shape)}. Pass True or False for each of them."
        )


def subtree_ends(parents: Tensor) -> Tensor:
    """[S] int64: the first segment after each that does not continue it, at any depth.

    The last segment below another is its last child's last child and so on. These chains are
    followed from all segments at once, in steps that double: a chain of 10^5 takes 17.
    """
    segment = torch.arange(len(parents), device=parents.device)
    if bool(((parents < -1) | (parents >= segment)).any()):
        raise _not_depth_first(parents)
    # Counted from 1 here: number 0 is what the roots continue.
    last = torch.arange(len(parents) + 1, device=parents.device)
    last.scatter_reduce_(0, parents + 1, segment + 1, "amax")  # the last child, or itself
    has_next = last[parents + 1] > segment + 1  # a sibling follows
    while not torch.equal(last, further := last.index_select(0, last)):
        last = further
    ends = last[1:]
    # In depth-first order a segment continues the one right before it, or it is the sibling that
    # comes after a subtree ends. No two subtrees of segments with a next sibling end together.
    continues = parents.new_full((len(parents) + 1,), -2)
    continues[ends[has_next]] = parents[has_next]
    if not bool(((parents == segment - 1) | (parents == continues[:-1])).all()):
        raise _not_depth_first(parents)
    return ends


def _not_depth_first(parents: Tensor) -> ValueError:
    path: list[int] = []  # from a root to the segment last seen
    for s, parent in enumerate(parents.tolist()):
        while path and path[-1] != parent:
            path.pop()
        if not path and parent != -1:
            return ValueError(
                f"PackedLayout: expected prefix in depth-first order, got {_shown(parents)}, where "
                f"segment {s} cannot continue {parent}. PackedBatch.from_segments sorts segments."
            )
        path.append(s)
    raise AssertionError("called for an order that is depth first")


def last_tokens_before(bounds: Tensor, parents: Tensor) -> Tensor:
    """[S] int64: the token before the first of each segment, through the tree: the last of the
    nearest segment above that is not empty, or -1."""
    is_empty = bounds.diff() == 0
    above = parents
    while bool((skips := (above >= 0) & is_empty[above]).any()):
        above = torch.where(skips, above[above], above)  # whose own step may have grown: doubling
    return bounds[above + 1] - 1


def depths(parents: Tensor) -> list[int]:
    """[S]: how many segments each one continues, at any distance. Parents stand before children."""
    found: list[int] = []
    for parent in parents.tolist():
        found.append(found[parent] + 1 if parent >= 0 else 0)
    return found


def depth_first_order(parents: list[int]) -> list[int]:
    """All segments, each followed by those that continue it, siblings in the given order."""
    children: dict[int, list[int]] = {}
    for s, parent in enumerate(parents):
        children.setdefault(parent, []).append(s)
    order: list[int] = []
    pending = children.get(-1, [])[::-1]
    while pending:
        order.append(s := pending.pop())
        if s in children:
            pending += reversed(children[s])
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
    for mask in loss_mask:
        check_tensor(op, "each loss_mask", mask)
    lengths, mask_lengths = [x.numel() for x in token_ids], [x.numel() for x in loss_mask]
    if lengths != mask_lengths:
        raise ValueError(
            f"{op}: expected loss_mask of lengths {_shown(lengths)} like token_ids, "
            f"got {_shown(mask_lengths)}. Pass one mask per segment, of its length."
        )
    if any(mask.dtype != torch.bool for mask in loss_mask):
        raise TypeError(f"{op}: expected loss_mask of dtype bool, got another. Use mask.bool().")


def check_token_ids(op: str, argument: str, segments: Sequence[Tensor]) -> None:
    for segment in segments:
        check_tensor(op, f"each of {argument}", segment)
        if segment.dtype != torch.int64:
            raise TypeError(
                f"{op}: expected {argument} of dtype int64, got {segment.dtype}. Use .long()."
            )
        if segment.dim() != 1:
            raise ValueError(
                f"{op}: expected {argument} of one dimension each, got {tuple(segment.shape)}. "
                "Pass a list of segments, without padding."
            )


def unpacked(op: str, size: str, x: Tensor, bounds: Tensor, dim: int) -> list[Tensor]:
    """x cut at bounds, along dim; size is what the messages call x's size there."""
    check_tensor(op, "x", x)
    if not -x.dim() <= dim < x.dim() or x.shape[dim] != int(bounds[-1]):
        raise ValueError(
            f"{op}: expected x of size {size} = {int(bounds[-1])} in dimension {dim}, "
            f"got {tuple(x.shape)}. Pass an entry for each; dim says where they are."
        )
    return list(x.split(bounds.diff().tolist(), dim))


def _shown(numbers: list[int] | Tensor) -> str:
    first = numbers[:16].tolist() if isinstance(numbers, Tensor) else numbers[:16]
    return str(first) if len(numbers) <= 16 else f"{str(first)[:-1]}, ...]"
