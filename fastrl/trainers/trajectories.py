"""A rollout's targets as trajectories: completions, or in a tree the paths from root to leaf."""

import torch
from torch import Tensor

from fastrl.rollout import Rollout


class Trajectories:
    """What estimators of returns work on.

    Where no turn is shared, trajectory i is completion i. In a tree each path from a root to a
    leaf is one (`PackedBatch.paths`), and a shared token has one result a path. In the loss it
    counts as its unshared copies would together: the sum of their weights, with the weighted mean
    of their advantages and returns.

    Attributes:
        cu_seqlens: [L + 1] int32, the trajectories' bounds among their P tokens.
        group_ids: [L] int64, the prompt of each.
        is_shared: whether there are turns that several trajectories may share.
    """

    def __init__(self, rollout: Rollout) -> None:
        self._batch = rollout.batch
        layout = self._batch.layout
        parents = layout._host_prefix
        is_completion = torch.zeros_like(parents, dtype=torch.bool)
        is_completion[self._batch._host_completion_segments] = True
        self._paths = None
        self.is_shared = bool(
            (parents[is_completion] < 0).any() | is_completion[parents[parents >= 0]].any()
        )
        if not self.is_shared:
            self.cu_seqlens, self.group_ids = rollout.cu_seqlens, rollout.group_ids
            self._num_tokens = len(rollout.token_ids)
            return
        self._paths = self._batch.paths()
        self._num_tokens = len(self._paths.index)
        self.cu_seqlens = self._paths.cu_seqlens
        completion = torch.zeros_like(parents)  # of each segment; a bare root's path is empty
        completion[is_completion] = torch.arange(int(is_completion.sum()))
        self.group_ids = rollout.group_ids[
            completion.to(rollout.group_ids.device)[self._paths.leaves]
        ]

    def along(self, x: Tensor) -> Tensor:
        """[M] of the targets -> [P], along the trajectories."""
        return x if self._paths is None else x[self._paths.index]

    def sum(self, x: Tensor) -> Tensor:
        """[P] -> [M], the sum over the trajectories that share a target."""
        return x if self._paths is None else self._paths.sum(x)

    def any(self, x: Tensor) -> Tensor:
        """[P] bool -> [M] bool, whether it is True on a trajectory that shares a target."""
        return x if self._paths is None else self._paths.sum(x.double()) > 0

    def mean(self, x: Tensor, weights: Tensor) -> Tensor:
        """[P], [P] -> [M], the mean over the trajectories that share a target; 0 without weight."""
        if self._paths is None:
            return x
        weights = weights.double()
        total = self._paths.sum(weights)
        return (self._paths.sum(x * weights) / total.where(total > 0, 1)).to(x.dtype)

    def totals(self, x: Tensor) -> Tensor:
        """[M] -> [L] float32, the sum along each trajectory."""
        return self._reduced(x, "sum", 0).float()

    def whole(self, x: Tensor) -> Tensor:
        """[M] bool -> [L] bool: True all along a trajectory, and it has a target."""
        return (self._reduced(x, "min", 1) > 0) & (self.cu_seqlens.diff() > 0)

    def over(self, x: Tensor) -> Tensor:
        """[L] -> [P]: each trajectory's number at its tokens."""
        lengths = self.cu_seqlens.diff().long()
        return x.repeat_interleave(lengths, output_size=self._num_tokens)

    def _reduced(self, x: Tensor, how: str, initial: float) -> Tensor:
        along, lengths = self.along(x).double(), self.cu_seqlens.diff().long()
        if not len(lengths):
            return along
        return torch.segment_reduce(along, how, lengths=lengths, initial=initial, unsafe=True)
