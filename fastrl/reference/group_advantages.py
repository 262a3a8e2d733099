"""Advantages of completions within their group."""

import torch
from torch import Tensor

from fastrl.reference._groups import Groups
from fastrl.reference._precision import compute_dtype

ESTIMATORS = ("grpo", "dr_grpo", "rloo", "rloo_std", "max_at_k")


def group_advantages(
    rewards: Tensor, group_ids: Tensor, *, estimator: str = "grpo", k: int | None = None
) -> tuple[Tensor, Tensor]:
    """Compares each completion's reward with those of its group of n.

        grpo: (r - mean) / (std + 1e-4)     std with n - 1 in the denominator, as TRL has it
        dr_grpo: r - mean
        rloo: r - mean of the group's other rewards = n / (n - 1) (r - mean)
        rloo_std: rloo / (std + 1e-4), std of the whole group as in grpo
        max_at_k: k (E max(r, k - 1 others) - E max(k others))

    The std in rloo_std is not that of the others alone, which is 0 where they agree: one success
    among failures would weigh 1e4.

    max_at_k ascends the expected maximum of k completions, which for rewards of 0 and 1 is pass@k.
    E is the mean over all sets of that many of the n - 1 others, in closed form. The mean over the
    group of advantage times grad log-prob is an unbiased estimate of the gradient, the advantages
    of a group sum to 0, and k = 1 is rloo. In a group of k, where no k others are, the baseline is
    the maximum of the k - 1 others: still unbiased, and only a best completion without equals gets
    an advantage. In a smaller group the maximum of k has no unbiased estimate: nothing to learn.

    Where a group has fewer than two rewards, or all of them are equal (max_at_k: all from the k-th
    lowest up), there is nothing to learn: advantage 0, active False. The same holds for a
    completion whose own reward is NaN or infinite; the group goes on without it, n one less.

    Equal rewards of a group get equal advantages, bit for bit, and no bit depends on the other
    groups or on the order of the completions. Sums are taken in float64.

    Args:
        rewards: [C], one per completion.
        group_ids: [C] int64, any numbers in any order: equal ids are one group.
        estimator: "grpo", "dr_grpo", "rloo", "rloo_std" or "max_at_k".
        k: at least 1, for max_at_k alone.
    Returns:
        advantages: [C] float32 (float64 for float64 rewards), detached.
        active: [C] bool, False = nothing to learn: a trainer may leave the completion out.
    Raises:
        ValueError: unknown estimator; max_at_k without k, or k with another estimator.
    Differentiable in: nothing.
    Reference: Shao et al. 2024, arXiv:2402.03300; Liu et al. 2025, arXiv:2503.20783; Ahmadian et
        al. 2024, arXiv:2402.14740; for max_at_k Walder & Karkhanis 2025, arXiv:2505.15201, and
        Bagirov et al. 2025, arXiv:2510.23393.
    """
    if estimator not in ESTIMATORS:
        raise ValueError(
            f"group_advantages: expected estimator one of {', '.join(map(repr, ESTIMATORS))}, "
            f"got {estimator!r}. Choose one of these."
        )
    if (k is None) == (estimator == "max_at_k"):
        remedy = "Pass how many completions the best is taken of." if k is None else "Leave it out."
        wanted = "k" if k is None else "no k"
        raise ValueError(
            f"group_advantages: expected {wanted} with estimator {estimator!r}, got {k}. {remedy}"
        )
    rewards = rewards.detach()
    dtype = compute_dtype(rewards)
    if rewards.numel() == 0:
        return rewards.to(dtype), torch.zeros_like(rewards, dtype=torch.bool)
    groups = Groups(rewards, group_ids)
    if k is not None:
        advantages, active = _max_at_k(groups, k)
    else:
        advantages, active = _centred(groups, estimator)
    return groups.restore(advantages.where(active, 0).to(dtype)), groups.restore(active)


def _centred(groups: Groups, estimator: str) -> tuple[Tensor, Tensor]:
    """The estimators that take a mean off each reward."""
    r, count = groups.rewards, groups.count
    others = (count - 1).clamp(min=1)
    advantages = (r - groups.total(r) / count.clamp(min=1)).where(groups.valid, 0)
    std = (groups.total(advantages.square()) / others).sqrt()
    if estimator in ("rloo", "rloo_std"):
        advantages = advantages * count / others
    if estimator in ("grpo", "rloo_std"):
        advantages = advantages / (std + 1e-4)
    # Equality of the rewards themselves: their rounded variance need not be 0.
    return advantages, groups.valid & (groups.at_rank(r, count) > groups.at_rank(r, 1))


def _max_at_k(groups: Groups, k: int) -> tuple[Tensor, Tensor]:
    """max_at_k by the gaps d_j = r_(j+1) - r_(j) between neighbours of the sorted rewards.

    A maximum is the lowest reward and all gaps below it. A set of k that has the completion at
    rank i, or has it not, reaches above rank j with probabilities whose difference, times k, is

        k / (n - k) a_j j           where i > j       a_j = C(j - 1, k - 1) / C(n - 1, k - 1)
        -k / (n - k) a_j (n - j)    where i <= j

    so that each advantage is two sums of terms of one sign.
    """
    # As float64: the quotient of two int64 tensors would be float32.
    r, rank, count = groups.rewards, groups.rank.double(), groups.count.double()
    has_next = rank < count
    gap = (groups.after(r) - r).where(has_next, 0)
    # a_j = product of (m - k + 1) / m over m from j to n - 1: nothing overflows, at any n.
    share = groups.product_from(((rank - k + 1).clamp(min=0) / rank).where(has_next, 1))
    below = groups.sum_up_to(rank * share * gap)
    below = groups.before(below).where(rank > 1, 0)
    above = groups.sum_from((count - rank) * share * gap)
    advantages = groups.first_equal(k / (count - k).clamp(min=1) * (below - above))
    is_active = (count > k) & (groups.at_rank(r, groups.count) > groups.at_rank(r, min(k, len(r))))

    lead = (r - groups.before(r)).where((rank == count) & (rank > 1), 0)
    is_exact = count == k
    advantages = (k * lead).where(is_exact, advantages)
    is_active = (lead > 0).where(is_exact, is_active)
    return advantages, groups.valid & is_active
