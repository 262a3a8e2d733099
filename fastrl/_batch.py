"""Packed tokens with the ones to be learned, whole and in micro-batches. Public in layout.py."""

from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor

from fastrl._notation import counted
from fastrl._paths import LeafPaths
from fastrl._segments import (
    check_segments,
    check_tensor,
    check_token_ids,
    depth_first_order,
    unpacked,
)
from fastrl._split import bins_of_trees
from fastrl._transfer import on_device
from fastrl.layout import PackedLayout

_Batch = TypeVar("_Batch", bound="PackedBatch")


class PackedBatch:
    """Tokens in a PackedLayout, and which of them are to be learned.

    Built by `pack_groups` (prompts with completions) or `PackedBatch.from_segments` (trees).
    hidden[predict_index] are the rows that predict target_ids. A completion is a run of target
    tokens that belong together: one of pack_groups' completions, or the targets of one segment of
    a tree. A turn that several leaves share stands once and its targets are counted once; to get
    the gradients of unshared copies, weigh each target by the sum of its leaves' weights:
    `sum_over_leaves`.

    Attributes:
        token_ids: [N] int64.
        layout: PackedLayout of the N tokens.
        target_index: [M] int64, where the target tokens stand, in order.
        target_ids: [M] int64 = token_ids[target_index].
        predict_index: [M] int64 = layout.predecessor[target_index].
        completion_cu_seqlens: [C + 1] int32, completion c holds the targets
            completion_cu_seqlens[c] to completion_cu_seqlens[c + 1]; it may be empty.
        completion_segments: [C] int64, the segment of each completion.
        segment_order: [S] int64, segment k was number segment_order[k] in the caller's order.
    """

    def __init__(
        self, token_ids: Tensor, layout: PackedLayout, is_target: Tensor, segment_order: Tensor
    ) -> None:
        """For the builders below. All moves to the device of token_ids, once; the rest is on the
        host, where some of it stays. is_target: [N] bool, False where no token comes before."""
        target_index = is_target.nonzero().squeeze(-1)
        counts = torch.bincount(layout.segment_ids[target_index], minlength=layout.num_segments)
        is_completion = (layout.prefix >= 0) | (counts > 0)
        self._host_is_target, self._host_segment_order = is_target, segment_order
        self._host_completion_segments = is_completion.nonzero().squeeze(-1)
        ends = counts[is_completion].cumsum(0)
        self._host_completion_bounds = torch.nn.functional.pad(ends, (1, 0))  # [C + 1] int64

        self._host_predict_index = layout.predecessor[target_index]

        device = token_ids.device
        self.token_ids, self.layout = token_ids, layout.to(device)
        numbers = [
            segment_order, target_index, self._host_predict_index,
            self._host_completion_segments, self._host_completion_bounds.int(),
        ]  # fmt: skip
        self.segment_order, self.target_index, self.predict_index, *rest = on_device(
            numbers, device
        )
        self.completion_segments, self.completion_cu_seqlens = rest
        self.target_ids = token_ids[self.target_index]

    @classmethod
    def from_segments(
        cls,
        token_ids: Sequence[Tensor],
        prefix: Sequence[int] | Tensor,
        loss_mask: Sequence[Tensor] | None = None,
    ) -> "PackedBatch":
        """Packs a forest of segments, given in any order.

        Segments are sorted into depth-first order: roots, and the segments that continue the same
        one, stay in the order in which they were given. `segment_order` tells who went where, and
        `completion_segments` to which segment, counted in the new order, a completion belongs.

        Args:
            token_ids: per segment int64 [n_s], n_s >= 0.
            prefix: [S], the index in token_ids of the segment that each one continues, or -1.
            loss_mask: per segment bool [n_s], True = target; False for what the policy did not
                write (prompts, tool output). Default: all tokens of all segments but the roots.
        Raises:
            ValueError: lengths disagree; prefix names no segment, or runs in a circle; a target
                that no token precedes.  TypeError: token_ids not int64, or loss_mask not bool.
        """
        parents = prefix.tolist() if isinstance(prefix, Tensor) else [int(p) for p in prefix]
        check_segments(token_ids, parents, loss_mask)
        order = depth_first_order(parents)
        rank = [-1] * (len(order) + 1)  # rank[-1] stays -1, of what roots continue
        for k, s in enumerate(order):
            rank[s] = k
        new_parents = [rank[parents[s]] for s in order]
        segments = [token_ids[s] for s in order]
        masks = None if loss_mask is None else [loss_mask[s] for s in order]
        return cls._of(segments, new_parents, masks, order)

    @classmethod
    def _of(
        cls,
        segments: Sequence[Tensor],
        parents: list[int],
        loss_mask: Sequence[Tensor] | None,
        order: list[int],
    ) -> "PackedBatch":
        tokens = _joined(segments, torch.int64)
        lengths = _on_host([segment.numel() for segment in segments])
        bounds = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
        layout = PackedLayout(bounds.int(), _on_host(parents).int())
        has_predecessor = layout.predecessor >= 0
        if loss_mask is None:
            is_target = (layout.prefix >= 0)[layout.segment_ids] & has_predecessor
        else:
            is_target = _joined(loss_mask, torch.bool).cpu()
            if bool((is_target & ~has_predecessor).any()):
                raise ValueError(
                    "from_segments: expected loss_mask False at the first token of a root, got "
                    "True. No token predicts it: begin the root with a token that is no target."
                )
        return cls(tokens, layout, is_target, _on_host(order))

    def paths(self) -> LeafPaths:
        """`PackedLayout.paths` of the M targets alone: index counts among them, [P] goes to [M].

        The leaves are those of the layout, so a path without targets is an empty row.
        """
        segments = self.layout.segment_ids[self.target_index]
        lengths = torch.bincount(segments, minlength=self.layout.num_segments)
        return LeafPaths(lengths, self.layout._subtree_end)

    def sum_over_leaves(self, leaf_values: Tensor) -> Tensor:
        """[M] from [L]: for each target, the sum over the leaves that share it.

        A leaf is a segment that nothing continues; leaves count in the layout's order. With one
        weight or advantage per leaf this gives that of each target, so that the shared turns get
        the gradient of unshared copies; ones give the number of copies. What differs from token to
        token goes through `paths`.
        """
        paths = self.paths()
        return paths.sum(leaf_values.repeat_interleave(paths.cu_seqlens.diff()))

    def to(self: _Batch, device: torch.device | str) -> _Batch:
        """The same batch on another device."""
        moved = object.__new__(type(self))
        vars(moved).update(vars(self))
        moved.layout = self.layout.to(device)
        tensors = {name: x for name, x in vars(self).items() if isinstance(x, Tensor)}
        names = [name for name in tensors if not name.startswith("_host_")]
        vars(moved).update(zip(names, on_device([tensors[n] for n in names], device), strict=True))
        return moved

    def unpack(self, x: Tensor, dim: int = 0) -> list[Tensor]:
        """One tensor per completion: x cut where completions begin.

        After pack_groups the order is that of its `completions`, one prompt's after the other's.
        After from_segments it is the packed one; completion c was the caller's segment number
        segment_order[completion_segments[c]].

        Args:
            x: [M, ...], a number or vector for each target; [..., M, ...] with dim.
            dim: of x, the one that counts targets.
        Returns:
            C views of x; those of completions without targets have no rows.
        Raises:
            ValueError: x has another size than M there.
        Differentiable in: x.
        """
        return unpacked("PackedBatch.unpack", "M", x, self._host_completion_bounds, dim)

    def split_by_tokens(self, max_tokens: int) -> list["MicroBatch"]:
        """Micro-batches of whole trees, of at most max_tokens tokens and evenly filled.

        A prompt stays with all its completions, so no token is computed twice. What belongs to
        the targets of this batch is cut by `source_targets`, and with the whole batch's
        denominator as normalizer the gradients of the micro-batches add up to the whole's:

            for micro in batch.split_by_tokens(16384):
                at = micro.source_targets
                loss = ppo_loss(logprobs_of(micro), old_logprobs[at], advantages[at],
                                normalizer=len(batch.target_ids))
                loss.backward()

        As few of them as largest-first rules find (at most 11/9 of the fewest, and one). Trees keep
        their order within one; micro-batches come in the order of their first trees.

        Args:
            max_tokens: >= 1, most tokens in one, those of prompts included.
        Returns:
            The micro-batches, on this batch's device; none for a batch without trees.
        Raises:
            ValueError: a tree has more than max_tokens tokens.
        """
        is_root = self.layout._host_prefix < 0
        of_tree = _on_host(bins_of_trees(self.layout._host_bounds, is_root, max_tokens))
        count = int(of_tree.max()) + 1 if len(of_tree) else 0
        return _micro_batches(self, of_tree[is_root.cumsum(0) - 1], count)

    def take(self, completions: Tensor) -> "MicroBatch":
        """The batch without some of its completions, and without the segments that then end
        nowhere. What belongs to targets is cut by `source_targets`.

        Args:
            completions: [C] bool, True = stays. What a completion continues stays with it, and so
                do the targets there.
        Returns:
            One micro-batch, on this batch's device.
        Raises:
            ValueError: another shape.  TypeError: not bool.
        """
        count = len(self._host_completion_segments)
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
        parents = self.layout._host_prefix.tolist()
        place = [-1] * len(parents)  # of each segment: micro-batch 0, or none
        for segment in self._host_completion_segments[completions.cpu()].tolist():
            place[segment] = 0
        for segment in reversed(range(len(parents))):  # children stand behind their parents
            if place[segment] == 0 and parents[segment] >= 0:
                place[parents[segment]] = 0
        return _micro_batches(self, _on_host(place), 1)[0]

    def __repr__(self) -> str:
        targets = counted(len(self.target_ids), "target")
        completions = counted(len(self.completion_segments), "completion")
        return f"{type(self).__name__}({targets}, {completions}, {self.layout})"


class MicroBatch(PackedBatch):
    """A part of a larger batch, and which of its tokens and targets they hold.

    Made by `PackedBatch.split_by_tokens` and `take`. logprobs[micro.source_targets] cuts
    what belongs to the targets of the larger batch, and whole[micro.source_targets] = part puts it
    back. What is known of its leaves goes through its own sum_over_leaves first.

    Attributes, beside those of PackedBatch, all rising:
        source_tokens: [N] int64, which token of the larger batch each token is.
        source_targets: [M] int64, which of its targets each target is.
        source_completions: [C] int64, which of its completions each completion is.
    """

    source_tokens: Tensor
    source_targets: Tensor
    source_completions: Tensor


def _micro_batches(batch: PackedBatch, of_segment: Tensor, count: int) -> list[MicroBatch]:
    """As many as count; of_segment [S] is the number of the one that holds a segment, or -1."""
    bounds, prefix = batch.layout._host_bounds, batch.layout._host_prefix
    lengths = bounds.diff()

    def members(micro: Tensor) -> tuple[Tensor, ...]:
        """Which items each micro-batch holds, from the micro-batch of each item."""
        held = (micro >= 0).nonzero().squeeze(-1)
        sizes = torch.bincount(micro[held], minlength=count).tolist()
        return held[micro[held].argsort(stable=True)].split(sizes) if count else ()

    is_target, device = batch._host_is_target, batch.token_ids.device
    of_token = of_segment.repeat_interleave(lengths)
    place = torch.empty_like(prefix)  # of each segment, within its micro-batch
    micro_batches = []
    for segments, tokens, targets, completions in zip(
        members(of_segment),
        members(of_token),
        members(of_token[is_target]),
        members(of_segment[batch._host_completion_segments]),
        strict=True,
    ):
        place[segments] = torch.arange(len(segments), device="cpu")
        parents = prefix[segments]
        parents = torch.where(parents >= 0, place[parents], -1)
        ends = torch.nn.functional.pad(lengths[segments].cumsum(0), (1, 0))
        layout = PackedLayout(ends.int(), parents.int())
        sources = on_device([tokens, targets, completions], device)
        order = batch._host_segment_order[segments]
        micro = MicroBatch(batch.token_ids[sources[0]], layout, is_target[tokens], order)
        micro.source_tokens, micro.source_targets, micro.source_completions = sources
        micro_batches.append(micro)
    return micro_batches


def _on_host(numbers: Sequence[int]) -> Tensor:
    """[n] int64, whatever torch's default device is."""
    return torch.tensor(numbers, dtype=torch.int64, device="cpu")


def _joined(parts: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    return torch.cat(list(parts)) if parts else torch.empty(0, dtype=dtype, device="cpu")


def pack_groups(prompts: Sequence[Tensor], completions: Sequence[Sequence[Tensor]]) -> PackedBatch:
    """Packs prompts with their completions, each prompt once.

    Segments stand as prompt 0, its completions, prompt 1, its completions, ...; the targets are
    all completion tokens, and completion c of the batch is the c-th in that order, empty or not.

    Args:
        prompts: per group int64 [P_g], P_g >= 1.
        completions: per group a list of int64 [R_gi], R_gi >= 0; any number of them, 0 included.
    Raises:
        ValueError: as many lists of completions as prompts are needed; an empty prompt.
        TypeError: tokens not int64.
    """
    if len(prompts) != len(completions):
        raise ValueError(
            f"pack_groups: expected completions for each of the {len(prompts)} prompts, "
            f"got {len(completions)} lists. Pass one list of completions per prompt."
        )
    segments: list[Tensor] = []
    parents: list[int] = []
    for prompt, group in zip(prompts, completions, strict=True):
        parents += [-1] + [len(segments)] * len(group)
        segments += [prompt, *group]
    check_token_ids("pack_groups", "prompts and completions", segments)
    for g, prompt in enumerate(prompts):
        if prompt.numel() == 0:
            raise ValueError(
                f"pack_groups: expected prompts[{g}] of at least one token, got 0. "
                "Begin it with the tokenizer's BOS token."
            )
    return PackedBatch._of(segments, parents, None, list(range(len(segments))))
