"""Rollouts of earlier steps, to be learned from again with V-trace."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fastrl.layout import PackedBatch
from fastrl.rollout import Rollout, completion_seeds

_REPLAY = 4  # a stream of random numbers apart from the others
_NUMBERS = ("logprobs", "values", "rewards", "ended", "is_used")


class ReplayBuffer:
    """The rewarded rollouts of the last steps.

    Args:
        size: how many are kept; the oldest makes room.
        seed: the run's; what is drawn in a step depends on nothing else.
    """

    def __init__(self, size: int, seed: int) -> None:
        self.size, self.seed = size, seed
        self.rollouts: list[Rollout] = []

    def add(self, rollout: Rollout) -> None:
        if self.size:
            if rollout.values is not None:  # a later critic has others
                rollout = replace(rollout, values=None)
            self.rollouts = [*self.rollouts, rollout][-self.size :]

    def draw(self, step: int, count: int) -> list[Rollout]:
        """Up to count different ones, each equally likely."""
        seed = int(completion_seeds(self.seed, _REPLAY, torch.tensor([step]), 1))
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(self.rollouts), generator=generator)
        return [self.rollouts[index] for index in order[:count].tolist()]

    def state_dict(self) -> dict[str, Any]:
        return {"rollouts": [state_of_rollout(rollout) for rollout in self.rollouts]}

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        self.rollouts = [rollout_of_state(entry, device) for entry in state["rollouts"]]


def joined(rollouts: list[Rollout], *, renumber: bool = True) -> Rollout:
    """Several rollouts as one, with the numbers that all of them have.

    Args:
        renumber: their prompts are different ones, whatever their group_ids.
    """
    tokens: list[Tensor] = []
    masks: list[Tensor] = []
    parents: list[Tensor] = []
    groups: list[Tensor] = []
    num_segments = num_groups = 0
    for rollout in rollouts:
        layout, is_target = rollout.batch.layout, rollout.batch._host_is_target
        tokens += layout.unpack(rollout.batch.token_ids)
        masks += is_target.split(layout._host_bounds.diff().tolist())
        prefix = layout._host_prefix
        parents.append(torch.where(prefix >= 0, prefix + num_segments, -1))
        groups.append(rollout.group_ids + num_groups)
        num_segments += layout.num_segments
        if renumber and len(rollout.group_ids):
            num_groups += int(rollout.group_ids.max()) + 1
    of = {
        name: torch.cat([getattr(rollout, name) for rollout in rollouts])
        for name in _NUMBERS
        if all(getattr(rollout, name) is not None for rollout in rollouts)
    }
    batch = PackedBatch.from_segments(tokens, torch.cat(parents), masks)
    return Rollout(batch=batch, group_ids=torch.cat(groups), **of)


def state_of_rollout(rollout: Rollout) -> dict[str, Tensor]:
    """Tensors that `rollout_of_state` makes it of again."""
    layout = rollout.batch.layout
    numbers = {name: getattr(rollout, name) for name in ("group_ids", *_NUMBERS)}
    return {
        "token_ids": rollout.batch.token_ids,
        "cu_seqlens": layout.cu_seqlens,
        "prefix": layout.prefix,
        "is_target": rollout.batch._host_is_target,
        **{name: x for name, x in numbers.items() if x is not None},
    }


def rollout_of_state(state: dict[str, Tensor], device: torch.device) -> Rollout:
    """The rollout, on a device."""
    lengths = state["cu_seqlens"].diff().tolist()
    segments = state["token_ids"].to(device).split(lengths)
    masks = state["is_target"].cpu().split(lengths)
    batch = PackedBatch.from_segments(list(segments), state["prefix"].cpu(), list(masks))
    rest = {name: state[name].to(device) for name in ("group_ids", *_NUMBERS) if name in state}
    return Rollout(batch=batch, **rest)
