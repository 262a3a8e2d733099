"""What is taken off a token's reward-to-go, packed: [N] returns of C completions.

A baseline may depend on the prompt, the position and other completions, but not on the token it is
taken from: then the gradient stays unbiased. Each function gives the baseline [N] and, where there
is nothing to compare with, False in `is_known` [N].
"""

from typing import Any

import torch
from torch import Tensor

from fastrl.trainers.trajectories import Trajectories


def leave_one_out(
    returns: Tensor, trajectories: Trajectories, counts: Tensor
) -> tuple[Tensor, Tensor]:
    """The mean reward-to-go, at the same position, of the prompt's other used completions.

        b_i(t) = mean over j != i of G_j(min(t, T_j - 1))

    A completion that has ended stands with its last reward-to-go. With one reward at the end and
    gamma = 1 this is RLOO's baseline, the mean of the other completions' rewards, at every token.
    Sums are float64: equal returns are their own baseline, bit for bit, and teach nothing.

    In a tree, paths that share a turn are others to each other, as its unshared copies would be.
    The mean of what is left at its tokens is then the difference from the paths that do not go
    through it, times their share of the others: 0 where all paths do.

    Args:
        returns: [P] float32, G, along the trajectories.
        trajectories: their bounds and prompts.
        counts: [P] bool, False at the tokens of completions that are not used.
    Returns:
        baseline: [P].
        is_known: [P] bool, False where no other used completion exists.
    """
    bounds, group_ids = trajectories.cu_seqlens.long(), trajectories.group_ids
    starts, lengths = bounds[:-1], bounds.diff()
    if not len(returns):
        return returns, counts
    is_used = torch.segment_reduce(counts.double(), "min", lengths=lengths, initial=1) > 0
    is_used = is_used & (lengths > 0)
    steps = torch.arange(int(lengths.max()), device=returns.device)
    at_step = starts[:, None] + torch.minimum(steps, (lengths[:, None] - 1).clamp(min=0))  # [L, T]
    table = returns.double()[at_step.clamp(max=len(returns) - 1)].masked_fill(~is_used[:, None], 0)
    _, group = group_ids.unique(return_inverse=True)
    size = int(group.max()) + 1
    # index_put_ and not index_add_: on a GPU too it adds in a fixed order.
    sums = table.new_zeros(size, steps.numel()).index_put_((group,), table, accumulate=True)
    used = torch.zeros_like(lengths[:1]).repeat(size)
    used.index_put_((group,), is_used.long(), accumulate=True)
    num_others = used[group] - is_used.long()
    exists = steps < lengths[:, None]
    baseline = (sums[group] - table) / num_others.clamp(min=1)[:, None]
    is_known = trajectories.over(is_used & (num_others > 0))
    return baseline[exists].to(returns.dtype), is_known


class RunningMean:
    """The mean reward-to-go of earlier steps at the same position, decaying.

    A step's own returns enter after its baseline is taken. Before anything is known it is 0.

    Args:
        max_new_tokens: number of positions.
        decay: what is kept of the past per step.
    """

    def __init__(self, max_new_tokens: int, decay: float, device: torch.device) -> None:
        self.decay = decay
        self.total = torch.zeros(max_new_tokens, dtype=torch.float64, device=device)
        self.count = torch.zeros_like(self.total)

    def __call__(self, returns: Tensor, cu_seqlens: Tensor, counts: Tensor) -> Tensor:
        """The baseline [P], and then learn from the returns [P] that count, [P] bool."""
        starts, lengths = cu_seqlens[:-1].long(), cu_seqlens.diff().long()
        position = torch.arange(returns.numel(), device=returns.device)
        position -= starts.repeat_interleave(lengths)
        size = self.total.numel()
        position = position.clamp(max=size - 1)  # a path through several turns may be longer
        mean = self.total / self.count.clamp(min=torch.finfo(torch.float64).tiny)
        weight = counts.double()
        # bincount adds in float64; its order on a GPU can move the last bit.
        total = torch.bincount(position, weight * returns, minlength=size)
        self.total.mul_(self.decay).add_(total)
        self.count.mul_(self.decay).add_(torch.bincount(position, weight, minlength=size))
        return mean[position].to(returns.dtype)

    def state_dict(self) -> dict[str, Any]:
        return {"total": self.total, "count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.total.copy_(state["total"])
        self.count.copy_(state["count"])
