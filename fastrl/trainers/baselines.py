"""What is taken off a token's reward-to-go, packed: [N] returns of C completions.

A baseline may depend on the prompt, the position and other completions, but not on the token it is
taken from: then the gradient stays unbiased. Each function gives the baseline [N] and, where there
is nothing to compare with, False in `is_known` [N].
"""

import torch
from torch import Tensor

from fastrl.rollout import Rollout


def leave_one_out(returns: Tensor, rollout: Rollout) -> tuple[Tensor, Tensor]:
    """The mean reward-to-go, at the same position, of the prompt's other used completions.

        b_i(t) = mean over j != i of G_j(min(t, T_j - 1))

    A completion that has ended stands with its last reward-to-go. With one reward at the end and
    gamma = 1 this is RLOO's baseline, the mean of the other completions' rewards, at every token.

    Args:
        returns: [N] float32, G.
        rollout: groups, lengths, and which completions are used: the others are left out.
    Returns:
        baseline: [N].
        is_known: [N] bool, False where no other used completion exists.
    """
    starts, lengths = rollout.cu_seqlens[:-1].long(), rollout.lengths
    is_used = torch.ones_like(rollout.ended) if rollout.is_used is None else rollout.is_used
    steps = torch.arange(int(lengths.max()), device=returns.device)
    at_step = starts[:, None] + torch.minimum(steps, lengths[:, None] - 1)  # [C, T]
    table = returns[at_step].masked_fill(~is_used[:, None], 0)
    # Groups have equal sizes and stand together: a view, and a sum in a fixed order.
    groups = table.view(len(rollout.prompts), -1, steps.numel())  # [P, G, T]
    others = (groups.sum(1, keepdim=True) - groups).view_as(table)
    used = is_used.view(len(rollout.prompts), -1).long()
    num_others = (used.sum(1, keepdim=True) - used).flatten()  # [C]
    exists = steps < lengths[:, None]
    baseline = (others / num_others.clamp(min=1)[:, None])[exists]
    is_known = (is_used & (num_others > 0)).repeat_interleave(lengths)
    return baseline, is_known


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

    def __call__(self, returns: Tensor, rollout: Rollout) -> Tensor:
        """The baseline [N], and then learn from the used completions' returns [N]."""
        lengths = rollout.lengths
        position = torch.arange(returns.numel(), device=returns.device)
        position -= rollout.cu_seqlens[:-1].long().repeat_interleave(lengths)
        mean = self.total / self.count.clamp(min=torch.finfo(torch.float64).tiny)
        weight = rollout.loss_mask.double()
        size = self.total.numel()
        # bincount adds in float64; its order on a GPU can move the last bit.
        total = torch.bincount(position, weight * returns, minlength=size)
        self.total.mul_(self.decay).add_(total)
        self.count.mul_(self.decay).add_(torch.bincount(position, weight, minlength=size))
        return mean[position].to(returns.dtype)

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint keeps."""
        return {"baseline.total": self.total, "baseline.count": self.count}
