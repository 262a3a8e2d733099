"""Which token continues which: the one description of a packed batch that all ops share."""

from typing import Any

import torch
from torch import Tensor

from fastrl._notation import layout_text
from fastrl._paths import LeafPaths
from fastrl._picture import draw_mask
from fastrl._schedule import at_least_two, attention_parts, with_any_length
from fastrl._segments import check_bounds, check_lists, last_tokens_before, subtree_ends, unpacked
from fastrl._tiles import attention_tiles
from fastrl._transfer import on_device


class PackedLayout:
    """A forest of segments without padding, each token standing once.

    A segment attends causally to itself and fully to the segments that it continues, up to its
    root: a prompt with its completions is a tree of depth one, a conversation that branches is
    deeper. Segments stand in depth-first order, each followed by all that continues it, and so the
    whole attention mask is one integer per key: token j is seen by the tokens i with
    j <= i < visible_until[j].

    Args:
        cu_seqlens: [S + 1] int32, segment s holds the tokens cu_seqlens[s] to cu_seqlens[s + 1];
            empty segments are allowed.
        prefix: [S] int32, the segment that segment s continues, or -1 for a root.
    Attributes:
        cu_seqlens, prefix: as given, int32.
        num_tokens, num_segments, num_trees: N, S, and the number of roots.
        position_ids: [N] int64, distance from the first token of the root, through the tree.
        segment_ids: [N] int64.
        visible_until: [N] int32, the end of the subtree below the token's segment.
        predecessor: [N] int64, the token that comes before, through the tree: the last token of
            the nearest segment above that is not empty; -1 at a root's first token.
        schedule: what the attention of its device works through; see `fastrl._schedule` for a
            CPU, `fastrl._tiles` for others.
    Raises:
        ValueError: cu_seqlens does not rise from 0, or prefix is not in depth-first order
            (`PackedBatch.from_segments` sorts).  TypeError: not integers.
    The tensors live on the device of cu_seqlens. Both arguments are copied to the host, everything
    is computed there and moved to the device once: 10^5 segments take about 10 ms, and the tables
    of a GPU another 30.
    """

    num_tokens: int
    num_segments: int
    num_trees: int
    position_ids: Tensor
    segment_ids: Tensor
    visible_until: Tensor
    predecessor: Tensor
    schedule: list[Tensor]
    _subtree_end: Tensor  # [S] int64, the first segment that does not continue s
    # These stay on the host:
    _host_bounds: Tensor  # [S + 1] int64, cu_seqlens
    _host_prefix: Tensor  # [S] int64
    _host_until: Tensor  # [S] int64, the token at which the subtree of s ends

    def __init__(self, cu_seqlens: Tensor, prefix: Tensor) -> None:
        check_lists(cu_seqlens, prefix)
        bounds, parents = (
            numbers.to("cpu", torch.int64, copy=True) for numbers in (cu_seqlens, prefix)
        )
        check_bounds(bounds, len(parents))
        subtree_end = subtree_ends(parents)
        self.num_tokens, self.num_segments = int(bounds[-1]), len(parents)
        self.num_trees = int((parents < 0).sum())
        self._host_bounds, self._host_prefix = bounds, parents
        self._host_until = bounds[subtree_end]
        self.cu_seqlens, self.prefix = with_any_length(
            [x.to(cu_seqlens.device, torch.int32, copy=True) for x in (cu_seqlens, prefix)]
        )

        starts, lengths = bounds[:-1], bounds.diff()
        # What stands before a segment without being above it: the subtrees that end there or before
        aside = torch.zeros_like(bounds).scatter_add_(0, subtree_end, lengths).cumsum(0)
        token = torch.arange(self.num_tokens, device="cpu")
        segment = torch.arange(self.num_segments, device="cpu").repeat_interleave(lengths)
        predecessor = token - 1
        has_tokens = lengths > 0
        predecessor[starts[has_tokens]] = last_tokens_before(bounds, parents)[has_tokens]
        self._set_on_device(
            position_ids=token - aside.index_select(0, segment),
            segment_ids=segment,
            visible_until=self._host_until.int().index_select(0, segment),
            predecessor=predecessor,
            _subtree_end=subtree_end,
        )
        self.schedule = with_any_length(self._schedule_for(self.cu_seqlens.device))

    def paths(self) -> LeafPaths:
        """Each path from a root to a leaf as one row of tokens, so that each is a trajectory.

        gae(rewards[paths.index], values[paths.index], ..., cu_seqlens=paths.cu_seqlens) treats a
        turn that several leaves share once per leaf, since what follows it differs. paths.sum
        brings advantages back to the [N] tokens as the weights of unshared copies, paths.mean
        returns as targets of the values. Where some tokens are no actions, pass
        mask=is_action[paths.index], or take `PackedBatch.paths`, which has the targets alone.
        """
        return LeafPaths(self.cu_seqlens.long().diff(), self._subtree_end)

    def unpack(self, x: Tensor, dim: int = 0) -> list[Tensor]:
        """One tensor per segment: x cut where segments begin, [n_s, ...] each.

        Args:
            x: [N, ...], a number or vector for each token; [..., N, ...] with dim.
            dim: of x, the one that counts tokens.
        Returns:
            S views of x, in the layout's order; those of empty segments have no rows.
        Raises:
            ValueError: x has another size than N there.
        Differentiable in: x.
        """
        return unpacked("PackedLayout.unpack", "N", x, self._host_bounds, dim)

    def plot(self, ax: Any = None) -> Any:
        """Draws the attention mask: which query (row) sees which key (column).

        Each segment's keys have one colour, by how far the segment is from its root: a triangle
        for the segment itself, and below it a rectangle for all that continues it.

        Args:
            ax: matplotlib.axes.Axes to draw on; default: those of a new pyplot figure.
        Returns:
            The Axes.
        Raises:
            ImportError: matplotlib is not installed.
        """
        return draw_mask(self._host_bounds, self._host_prefix, self._host_until, ax)

    def to(self, device: torch.device | str) -> "PackedLayout":
        """The same layout on another device."""
        moved = object.__new__(PackedLayout)
        vars(moved).update(vars(self))
        tensors = {name: x for name, x in vars(self).items() if isinstance(x, Tensor)}
        names = [name for name in tensors if not name.startswith("_host_")]
        vars(moved).update(zip(names, on_device([tensors[n] for n in names], device), strict=True))
        with_any_length([moved.cu_seqlens, moved.prefix])
        if moved.cu_seqlens.device != self.cu_seqlens.device:
            moved.schedule = with_any_length(moved._schedule_for(moved.cu_seqlens.device))
        return moved

    def _schedule_for(self, device: torch.device) -> list[Tensor]:
        segments = self._host_bounds[:-1], self._host_bounds[1:], self._host_until
        if device.type == "cpu":
            return [at_least_two(attention_parts(*segments))]
        return on_device(attention_tiles(*segments), device)

    def __repr__(self) -> str:
        """Sizes and trees: "3 + (2, 0, 1)" is a segment of 3 tokens and the three that continue it,
        "512 + 16 x 128" one with 16 of 128, "3 + 2 + 1" a chain; "|" stands between trees."""
        device = self.cu_seqlens.device
        text = layout_text(self._host_bounds, self._host_prefix, self.num_trees)
        return f"PackedLayout({text}{'' if device.type == 'cpu' else f', on {device}'})"

    def _set_on_device(self, **tensors: Tensor) -> None:
        moved = on_device(list(tensors.values()), self.cu_seqlens.device)
        vars(self).update(zip(tensors, moved, strict=True))


# These are made of the class above, and public here.
from fastrl._batch import MicroBatch, PackedBatch, pack_groups  # noqa: E402

__all__ = ["MicroBatch", "PackedBatch", "PackedLayout", "pack_groups"]
