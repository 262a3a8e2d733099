"""Advantages within groups of completions: checks, and the one definition in fastrl.reference."""

import torch
from torch import Tensor

from fastrl import reference
from fastrl.ops import _checks


def group_advantages(
    rewards: Tensor, group_ids: Tensor, *, estimator: str = "grpo", k: int | None = None
) -> tuple[Tensor, Tensor]:
    op = "group_advantages"
    _checks.float_tensor(op, "rewards", rewards)
    if rewards.dim() != 1:
        remedy = "Pass one reward per completion; sum token rewards first."
        raise _checks.fail(op, "rewards [C]", _checks.shape(rewards), remedy)
    _checks.tensor(op, "group_ids", group_ids, (torch.int64,), "Use group_ids.long().")
    _checks.same_shape(op, "group_ids", group_ids, "rewards", rewards, "Pass one id per reward.")
    _checks.same_device(op, "group_ids", group_ids, "rewards", rewards)
    if k is not None:
        _checks.whole(op, "k", k, 1)
    return reference.group_advantages(rewards, group_ids, estimator=estimator, k=k)


group_advantages.__doc__ = reference.group_advantages.__doc__
