"""A rollout's targets as trajectories: completions, or in a tree the paths from root to leaf."""

from collections.abc import Callable

import torch
from torch import Tensor

from fastrl.rollout import Rollout

Estimator = Callable[..., "Tensor | tuple[Tensor, ...]"]


class Trajectories:
    """What estimators of returns work on.

    Where no turn is shared, trajectory i is completion i. In a tree each path from a root to a
    leaf is one; a shared token then gets one result a path, and their sum is its weight in the
    policy gradient, their mean the target of its value (`PackedBatch.paths`).

    Attributes:
        cu_seqlens: [L + 1] int32, the trajectories' bounds among their P tokens.
        group_ids: [L] int64, the prompt of each.
    """

    def __init__(self, rollout: Rollout) -> None:
        self._batch = rollout.batch
        layout = self._batch.layout
        parents = layout._host_prefix
        is_completion = torch.zeros_like(parents, dtype=torch.bool)
        is_completion[self._batch._host_completion_segments] = True
        self._paths = None
        if not bool(
            (parents[is_completion] < 0).any() | is_completion[parents[parents >= 0]].any()
        ):
            self.cu_seqlens, self.group_ids = rollout.cu_seqlens, rollout.group_ids
            return
        self._paths = self._batch.paths()
        self.cu_seqlens = self._paths.cu_seqlens
        tree = torch.cumsum(parents < 0, 0) - 1
        self.group_ids = tree.to(self.cu_seqlens.device)[self._paths.leaves]

    def along(self, x: Tensor) -> Tensor:
        """[M] of the targets -> [P], along the trajectories."""
        return x if self._paths is None else x[self._paths.index]

    def sum(self, x: Tensor) -> Tensor:
        """[P] -> [M], the sum over the trajectories that share a target."""
        return x if self._paths is None else self._paths.sum(x)

    def mean(self, x: Tensor) -> Tensor:
        """[P] -> [M], the mean over the trajectories that share a target."""
        return x if self._paths is None else self._paths.mean(x)

    def totals(self, x: Tensor) -> Tensor:
        """[M] -> [L] float32, the sum along each trajectory."""
        lengths = self.cu_seqlens.diff().long()
        return torch.segment_reduce(self.along(x).double(), "sum", lengths=lengths).float()

    def spread(self, x: Tensor) -> Tensor:
        """[L] -> [M]: each trajectory's number at its targets, summed where they share one."""
        return self.sum(x.repeat_interleave(self.cu_seqlens.diff().long()))
