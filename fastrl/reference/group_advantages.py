"""Advantages of completions within their group."""

import torch
from torch import Tensor

from fastrl.reference._precision import promote
from fastrl.reference._rows import Rows


def group_advantages(
    rewards: Tensor, group_ids: Tensor, *, estimator: str = "grpo"
) -> tuple[Tensor, Tensor]:
    """Compares each completion's reward with those of its group.

        grpo: (r - mean) / (std + 1e-4)     std with n - 1 in the denominator, as TRL has it
        dr_grpo: r - mean
        rloo: r - mean of the group's other rewards

    Where a group has fewer than two rewards, or all of them are equal, there is nothing to learn:
    advantage 0, active False. The same holds for a completion whose own reward is NaN or infinite;
    its group's statistics leave it out.

    Args:
        rewards: [C], one per completion.
        group_ids: [C] int64, any numbers in any order: equal ids are one group.
        estimator: "grpo", "dr_grpo" or "rloo".
    Returns:
        advantages: [C] float32 (float64 for float64 rewards), detached.
        active: [C] bool.
    Raises:
        ValueError: unknown estimator.
    Differentiable in: nothing.
    Reference: Shao et al. 2024, arXiv:2402.03300; Liu et al. 2025, arXiv:2503.20783; Ahmadian et
        al. 2024, arXiv:2402.14740.
    """
    if rewards.numel() == 0:
        return promote(rewards.detach()), torch.zeros_like(rewards, dtype=torch.bool)
    order = group_ids.argsort(stable=True)
    _, sizes = group_ids[order].unique_consecutive(return_counts=True)
    cu_seqlens = torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])
    r = promote(rewards.detach())[order]
    groups = Rows(r, r.isfinite(), cu_seqlens)
    count = groups.valid.sum(1, keepdim=True)  # [G, 1]
    table = groups.pad(r)  # [G, largest group]
    centred = table - table.sum(1, keepdim=True) / count.clamp(min=1)
    centred = centred.masked_fill(~groups.valid, 0)
    if estimator == "grpo":
        variance = centred.square().sum(1, keepdim=True) / (count - 1).clamp(min=1)
        advantages = centred / (variance.sqrt() + 1e-4)
    elif estimator == "dr_grpo":
        advantages = centred
    elif estimator == "rloo":
        advantages = centred * count / (count - 1).clamp(min=1)  # r - (sum - r) / (n - 1)
    else:
        raise ValueError(
            "group_advantages: expected estimator grpo, dr_grpo or rloo, "
            f"got {estimator!r}. Name one of the three."
        )
    # Equality of the rewards themselves: their rounded variance need not be 0.
    lowest = table.masked_fill(~groups.valid, torch.inf).amin(1, keepdim=True)
    highest = table.masked_fill(~groups.valid, -torch.inf).amax(1, keepdim=True)
    is_active = groups.valid & (highest > lowest)
    out = torch.zeros_like(r)
    active = torch.zeros_like(r, dtype=torch.bool)
    out[order] = groups.unpad(advantages.masked_fill(~is_active, 0))
    active[order] = groups.unpad(is_active)
    return out, active
