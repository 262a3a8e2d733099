"""The paths of a packed forest, from each root to each leaf, for layout.py."""

from functools import cached_property

import torch
from torch import Tensor


class LeafPaths:
    """Every root-to-leaf path of a forest as one packed row, so that each is a trajectory.

    Made by `PackedLayout.paths` (items: the N tokens) and `PackedBatch.paths` (the M targets).
    x[paths.index] with cu_seqlens=paths.cu_seqlens is what an op on returns takes; `sum` and `mean`
    bring its output back to the items. An item that several paths share has one result per path,
    since what follows it differs:

        advantages, returns = gae(rewards[paths.index], values[paths.index], gamma=gamma,
                                  gae_lambda=gae_lambda, cu_seqlens=paths.cu_seqlens)
        paths.sum(advantages)    # weighs the item's log-prob as its unshared copies would together
        paths.mean(returns)      # target of its value: least squares over the copies

    Attributes:
        index: [P] int64, the items of the first path from its root on, then those of the next.
        cu_seqlens: [L + 1] int32, path l holds index[cu_seqlens[l]] to index[cu_seqlens[l + 1]];
            it may be empty.
        leaves: [L] int64, the segment that each path ends in: those that nothing continues, in
            the layout's order.
    """

    def __init__(self, lengths: Tensor, subtree_end: Tensor) -> None:
        """lengths: [S] int64, items per segment; they stand segment by segment. subtree_end: [S]
        int64, the first segment behind s that does not continue it."""
        segment = torch.arange(len(lengths), device=lengths.device)
        is_leaf = subtree_end == segment + 1
        self.leaves = is_leaf.nonzero().squeeze(-1)
        # Depth first, the leaves below a segment are consecutive, and a path's segments rise.
        leaves_before = offsets(is_leaf.long())  # [S + 1]
        first_leaf = leaves_before[:-1]
        self._copies = leaves_before[subtree_end] - first_leaf  # [S], at least 1 each
        # A visit is a segment on the path to a leaf, [Q] of them; here by segment, then by leaf.
        segment = segment.repeat_interleave(self._copies)
        leaf = ranges(first_leaf, self._copies)
        by_leaf = leaf.argsort(stable=True)

        lengths_on_paths = lengths[segment[by_leaf]]
        starts = offsets(lengths_on_paths)  # [Q + 1], where each visit begins among the P
        num_items = int(starts[-1])
        if num_items > torch.iinfo(torch.int32).max:
            raise ValueError(
                f"paths: expected fewer than 2**31 items on all paths together, got {num_items}. "
                "Pack fewer trees at a time: each path repeats what its leaf shares."
            )
        visits = torch.bincount(leaf, minlength=len(self.leaves))  # of each leaf's path
        self.cu_seqlens = starts[offsets(visits)].int()
        self._lengths, self._first_item = lengths, offsets(lengths)[:-1]
        self.index = ranges(self._first_item[segment[by_leaf]], lengths_on_paths)
        self._visit_start = torch.empty_like(by_leaf)  # by segment, then by leaf
        self._visit_start[by_leaf] = starts[:-1]

    def sum(self, x: Tensor) -> Tensor:
        """[N] from [P]: for each item, the sum over the paths that share it.

        What the loss weights of unshared copies add up to: the policy gradient on shared tokens is
        then that of the copies. Summed in float64, in the order of the leaves. Differentiable.
        """
        return self._sum(x).to(x.dtype)

    def mean(self, x: Tensor) -> Tensor:
        """[N] from [P]: for each item, `sum` over the number of paths that share it."""
        return (self._sum(x) / self._copies_of_items[1]).to(x.dtype)

    def _sum(self, x: Tensor) -> Tensor:
        if x.shape != self.index.shape:
            raise ValueError(
                f"paths: expected x [P] = {tuple(self.index.shape)}, got {tuple(x.shape)}. "
                "Pass what an op gave for x[paths.index]."
            )
        places, copies = self._copies_of_items
        # One thread or block per item, no atomics: the same bits in every run.
        return torch.segment_reduce(x[places].double(), "sum", lengths=copies, unsafe=True)

    @cached_property
    def _copies_of_items(self) -> tuple[Tensor, Tensor]:
        """Where each item stands among the P, by item and then by leaf; and how often, [N]."""
        segment = torch.arange(len(self._lengths), device=self.index.device)
        segment = segment.repeat_interleave(self._lengths)  # [N]
        offset = torch.arange(len(segment), device=self.index.device) - self._first_item[segment]
        copies = self._copies[segment]
        visits = ranges(offsets(self._copies)[segment], copies)  # [P]
        return self._visit_start[visits] + offset.repeat_interleave(copies), copies

    def __repr__(self) -> str:
        return (
            f"LeafPaths({len(self.leaves)} paths, {len(self.index)} items on them, "
            f"on {self.index.device})"
        )


def offsets(lengths: Tensor) -> Tensor:
    """[n + 1] from [n]: where each of n runs begins, and the end of the last."""
    return torch.nn.functional.pad(lengths.cumsum(0), (1, 0))


def ranges(starts: Tensor, lengths: Tensor) -> Tensor:
    """The numbers of each range one after another: starts[i], starts[i] + 1, ..., lengths[i] of
    them."""
    shift = (starts - offsets(lengths)[:-1]).repeat_interleave(lengths)
    return torch.arange(len(shift), device=shift.device) + shift
