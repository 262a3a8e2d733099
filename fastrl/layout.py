"""Which token continues which: the one description of a packed batch that all ops share."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastrl._paths import LeafPaths
from fastrl._schedule import attention_parts
from fastrl._segments import (
    check_bounds,
    check_segments,
    check_token_ids,
    depth_first_order,
    subtree_ends,
)


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
        num_tokens, num_segments: N and S.
        position_ids: [N] int64, distance from the first token of the root, through the tree.
        segment_ids: [N] int64.
        visible_until: [N] int32, the end of the subtree below the token's segment.
        predecessor: [N] int64, the token that comes before, through the tree: the last token of
            the nearest segment above that is not empty; -1 at a root's first token.
        schedule: what the attention of its device works through; see `fastrl._schedule`.
    Raises:
        ValueError: cu_seqlens does not rise from 0, or prefix is not in depth-first order
            (`PackedBatch.from_segments` sorts).
    The tensors live on the device of cu_seqlens; building copies it and prefix to the host once.
    """

    num_tokens: int
    num_segments: int
    position_ids: Tensor
    segment_ids: Tensor
    visible_until: Tensor
    predecessor: Tensor
    schedule: list[Tensor]
    _subtree_end: Tensor

    def __init__(self, cu_seqlens: Tensor, prefix: Tensor) -> None:
        bounds, parents = cu_seqlens.tolist(), prefix.tolist()
        check_bounds(bounds, len(parents))
        subtree_end = subtree_ends(parents)
        self.num_tokens, self.num_segments = bounds[-1], len(parents)
        self.cu_seqlens, self.prefix = cu_seqlens.int(), prefix.to(cu_seqlens.device, torch.int32)

        first_position: list[int] = []  # per segment: the position of its first token
        before: list[int] = []  # per segment: the token before its first
        for parent in parents:
            if parent < 0:
                first_position.append(0)
                before.append(-1)
                continue
            length = bounds[parent + 1] - bounds[parent]
            first_position.append(first_position[parent] + length)
            before.append(bounds[parent + 1] - 1 if length else before[parent])

        self._host_bounds = torch.tensor(bounds, dtype=torch.int64)
        self._host_until = self._host_bounds[torch.tensor(subtree_end, dtype=torch.int64)]  # [S]
        starts, lengths = self._host_bounds[:-1], self._host_bounds.diff()
        token = torch.arange(self.num_tokens)
        segment = torch.arange(self.num_segments).repeat_interleave(lengths)
        offset = token - starts[segment]
        predecessor = torch.where(offset > 0, token - 1, torch.tensor(before).long()[segment])
        self._set_on_device(
            position_ids=offset + torch.tensor(first_position).long()[segment],
            segment_ids=segment,
            visible_until=self._host_until.int()[segment],
            predecessor=predecessor,
            _subtree_end=torch.tensor(subtree_end, dtype=torch.int64),  # [S]
        )
        self.schedule = self._schedule_for(self.cu_seqlens.device)

    def paths(self) -> LeafPaths:
        """Each path from a root to a leaf as one row of tokens, so that each is a trajectory.

        gae(rewards[paths.index], values[paths.index], ..., cu_seqlens=paths.cu_seqlens) treats a
        turn that several leaves share once per leaf, since what follows it differs. paths.sum
        brings advantages back to the [N] tokens as the weights of unshared copies, paths.mean
        returns as targets of the values. Where some tokens are no actions, pass
        mask=is_action[paths.index], or take `PackedBatch.paths`, which has the targets alone.
        """
        return LeafPaths(self.cu_seqlens.long().diff(), self._subtree_end)

    def to(self, device: torch.device | str) -> "PackedLayout":
        """The same layout on another device."""
        moved = object.__new__(PackedLayout)
        for name, value in vars(self).items():
            on_device = isinstance(value, Tensor) and not name.startswith("_host_")
            setattr(moved, name, value.to(device) if on_device else value)
        moved.schedule = self._schedule_for(moved.cu_seqlens.device)
        return moved

    def _schedule_for(self, device: torch.device) -> list[Tensor]:
        starts, ends = self._host_bounds[:-1], self._host_bounds[1:]
        return [attention_parts(starts, ends, self._host_until)]

    def __repr__(self) -> str:
        roots = int((self.prefix < 0).sum())
        return (
            f"PackedLayout({self.num_tokens} tokens in {self.num_segments} segments, "
            f"{roots} roots, on {self.visible_until.device})"
        )

    def _set_on_device(self, **tensors: Tensor) -> None:
        for name, tensor in tensors.items():
            setattr(self, name, tensor.to(self.cu_seqlens.device))


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
        """is_target: [N] bool, False where no token comes before. For the builders below."""
        self.token_ids = token_ids
        self.layout = layout
        self.segment_order = segment_order
        self.target_index = is_target.nonzero().squeeze(-1)
        self.target_ids = token_ids[self.target_index]
        self.predict_index = layout.predecessor[self.target_index]
        counts = torch.bincount(
            layout.segment_ids[self.target_index], minlength=layout.num_segments
        )
        is_completion = (layout.prefix >= 0) | (counts > 0)
        self.completion_segments = is_completion.nonzero().squeeze(-1)
        ends = counts[is_completion].cumsum(0)
        self.completion_cu_seqlens = torch.nn.functional.pad(ends, (1, 0)).int()

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
        parents = [int(parent) for parent in prefix]
        check_segments(token_ids, parents, loss_mask)
        order = depth_first_order(parents)
        rank = {segment: k for k, segment in enumerate(order)}
        new_parents = [rank[parents[s]] if parents[s] >= 0 else -1 for s in order]
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
        empty = torch.zeros(0, dtype=torch.int64)
        tokens = torch.cat([empty.to(segments[0].device) if segments else empty, *segments])
        bounds = torch.tensor([0] + [len(segment) for segment in segments]).cumsum(0)
        layout = PackedLayout(bounds.int(), torch.tensor(parents, dtype=torch.int32))
        has_predecessor = layout.predecessor >= 0
        if loss_mask is None:
            is_target = (layout.prefix >= 0)[layout.segment_ids] & has_predecessor
        else:
            is_target = torch.cat([empty.bool(), *(mask.cpu() for mask in loss_mask)])
            if bool((is_target & ~has_predecessor).any()):
                raise ValueError(
                    "from_segments: expected loss_mask False at the first token of a root, got "
                    "True. No token predicts it: begin the root with a token that is no target."
                )
        batch = cls(tokens.cpu(), layout, is_target, torch.tensor(order, dtype=torch.int64))
        return batch.to(tokens.device)

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

    def to(self, device: torch.device | str) -> "PackedBatch":
        """The same batch on another device."""
        moved = object.__new__(PackedBatch)
        for name, value in vars(self).items():
            setattr(moved, name, value.to(device))
        return moved

    def __repr__(self) -> str:
        completions = len(self.completion_segments)
        return (
            f"PackedBatch({len(self.target_ids)} targets, {completions} completions, {self.layout})"
        )


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
    for g, (prompt, group) in enumerate(zip(prompts, completions, strict=True)):
        if len(prompt) == 0:
            raise ValueError(
                f"pack_groups: expected prompts[{g}] of at least one token, got 0. "
                "Begin it with the tokenizer's BOS token."
            )
        parents += [-1] + [len(segments)] * len(group)
        segments += [prompt, *group]
    check_token_ids("pack_groups", "prompts and completions", segments)
    return PackedBatch._of(segments, parents, None, list(range(len(segments))))
