"""docs/other_trainers.md: each line against the other trainer's formula, in plain PyTorch."""

import math

import pytest
import torch

import fastrl

T = 11


@pytest.fixture
def case():
    """Rows with gaps; one without a counted token, one with all. Ratios on both sides of bounds."""
    torch.manual_seed(0)
    new, old, ref, advantages, weights = torch.randn(5, 7, T, dtype=torch.float64)
    mask = torch.rand(7, T) < 0.6
    mask[0], mask[1] = False, True
    return new.requires_grad_(), old, ref, advantages, weights.exp(), mask


def aggregated(losses, mask, mode):
    sums, rows = (losses * mask).sum(1), mask.any(1).sum()
    return {
        "token-mean": sums.sum() / mask.sum(),
        "token-sum": sums.sum(),
        "seq-mean-token-mean": (sums / mask.sum(1).clamp(min=1)).sum() / rows,
        "seq-mean-token-sum": sums.sum() / rows,
        "seq-mean-token-sum-norm": sums.sum() / rows / T,
    }[mode]


def ours(mask, mode):
    rows = mask.any(1).sum()
    reduction, normalizer = {
        "token-mean": ("token_mean", None),
        "token-sum": ("token_mean", 1.0),
        "seq-mean-token-mean": ("sequence_mean", None),
        "seq-mean-token-sum": ("sequence_mean_token_sum", None),
        "seq-mean-token-sum-norm": ("sequence_mean_token_sum", rows * T),
    }[mode]
    return {"loss_mask": mask, "reduction": reduction, "normalizer": normalizer}


MODES = [
    "token-mean", "token-sum", "seq-mean-token-mean", "seq-mean-token-sum",
    "seq-mean-token-sum-norm",
]  # fmt: skip


def clipped(ratio, advantages, dual_clip=None):
    losses = -torch.min(ratio * advantages, ratio.clamp(0.8, 1.3) * advantages)
    if dual_clip is None:
        return losses
    return torch.where(advantages < 0, torch.min(losses, -dual_clip * advantages), losses)


def assert_same(found, expected, leaf):
    torch.testing.assert_close(found, expected)
    found, expected = (
        torch.autograd.grad(x.sum(), leaf, retain_graph=True)[0] for x in (found, expected)
    )
    assert expected.abs().sum() > 0
    torch.testing.assert_close(found, expected)


BOUNDS = {"clip_low": 0.2, "clip_high": 0.3}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dual_clip", [None, 3.0])
def test_clipped_policy_loss(case, mode, dual_clip):
    new, old, _, advantages, weights, mask = case
    losses = clipped((new - old).exp(), advantages, dual_clip) * weights
    options = BOUNDS | {"dual_clip": dual_clip}
    found = fastrl.ppo_loss(new, old, advantages, weights=weights, **options, **ours(mask, mode))
    assert_same(found, aggregated(losses, mask, mode), new)
    each = fastrl.ppo_loss(new, old, advantages, weights=weights, reduction="none", **options)
    assert_same(each, losses, new)  # slime


@pytest.mark.parametrize("trainer", ["verl", "OpenRLHF"])
def test_gspo(case, trainer):
    new, old, _, advantages, _, mask = case
    mean = ((new - old) * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)
    if trainer == "verl":
        ratio = (new - new.detach() + mean.detach()).exp()
    else:
        ratio, advantages = mean.exp().expand_as(new), advantages[:, :1].expand_as(new)
    mode = "seq-mean-token-mean"
    found = fastrl.ppo_loss(new, old, advantages, level="sequence", **BOUNDS, **ours(mask, mode))
    assert_same(found, aggregated(clipped(ratio, advantages), mask, mode), new)


@pytest.mark.parametrize("mode", MODES)
def test_losses_without_a_clipped_minimum(case, mode):
    new, old, ref, advantages, weights, mask = case
    for factors in (weights, (new - old).exp().clamp(0.8, 1.3).detach()):  # REINFORCE, CISPO
        expected = aggregated(-factors * advantages * new, mask, mode)
        found = fastrl.policy_gradient_loss(new, advantages, weights=factors, **ours(mask, mode))
        assert_same(found, expected, new)

    moved = old + (new - old).clamp(-0.4, 0.4)
    losses = torch.max((new - advantages) ** 2, (moved - advantages) ** 2)
    found = fastrl.value_loss(new, advantages, old_values=old, clip=0.4, **ours(mask, mode))
    assert_same(0.5 * found, 0.5 * aggregated(losses, mask, mode), new)


def test_kl_penalty(case):
    new, _, ref, *_ = case
    d = new - ref
    for name, expected in (("k1", d), ("k2", d**2 / 2), ("k3", (-d).exp() - 1 + d)):
        assert_same(fastrl.kl_penalty(new, ref, estimator=name), expected, new)


def test_batches_over_ranks(case):
    """Each rank's loss is divided by all tokens and multiplied by the number of ranks, since
    gradients are averaged over them."""
    new, old, _, advantages, _, mask = case
    total = 0
    for rows in (slice(0, 3), slice(3, 7)):
        total = total + fastrl.ppo_loss(
            new[rows], old[rows], advantages[rows], loss_mask=mask[rows],
            normalizer=mask.sum() / 2, **BOUNDS,
        )  # fmt: skip
    whole = fastrl.ppo_loss(new, old, advantages, loss_mask=mask, **BOUNDS)
    assert_same(total / 2, whole, new)


def test_groups():
    torch.manual_seed(1)
    rewards, mask = torch.randn(9, T, dtype=torch.float64), torch.rand(9, T) < 0.7
    index = torch.tensor([5, 2, 5, 2, 5, 9, 5, 2, 5])  # the ninth is alone
    scores = rewards.sum(1)
    mean, std, count = (torch.zeros(9, dtype=torch.float64) for _ in range(3))
    for i, group in enumerate(index):
        own = scores[index == group]
        mean[i], count[i] = own.mean(), len(own)
        std[i] = own.std() if len(own) > 1 else math.nan
    several = count > 1
    expected = {
        "grpo": (scores - mean) / (std + 1e-6),
        "dr_grpo": scores - mean,
        "rloo": (scores - mean) * count / (count - 1),
    }
    for estimator, advantages in expected.items():
        found, active = fastrl.group_advantages(scores, index, estimator=estimator)
        assert active.tolist() == several.tolist() and found[5] == 0
        torch.testing.assert_close(found[several], advantages[several], rtol=1e-3, atol=1e-6)
    # REINFORCE++ with a baseline
    own = (fastrl.group_advantages(scores, index, estimator="dr_grpo")[0][:, None] * mask)[mask]
    found = fastrl.whiten((scores - mean)[:, None].expand_as(mask).contiguous(), mask)
    torch.testing.assert_close(found[mask], (own - own.mean()) / (own.var() + 1e-8).sqrt())


def backwards(rewards, gamma, carries):
    """returns_t = r_t + gamma returns_{t+1}, the latter times carries_{t+1}."""
    returns, following = torch.zeros_like(rewards), torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        returns[:, t] = rewards[:, t] + gamma * following
        following = returns[:, t] * carries[:, t]
    return returns


def test_returns(case):
    _, rewards, values, *_, mask = case
    whole = torch.ones_like(mask)
    padded = torch.arange(T) < torch.tensor([11, 4, 7, 2, 9, 1, 3])[:, None]
    expected = backwards(rewards * padded, 0.9, padded)  # verl's REINFORCE++
    found = fastrl.discounted_returns(rewards, gamma=0.9, mask=padded)
    torch.testing.assert_close(found, expected * padded)
    found = fastrl.discounted_returns(rewards, gamma=1.0, mask=mask)  # ReMax
    torch.testing.assert_close(found, backwards(rewards * mask, 1.0, whole) * mask)
    # OpenRLHF: gaps are steps of their own; slime, where there are none
    found = fastrl.discounted_returns(rewards * mask, gamma=0.9)
    torch.testing.assert_close(found, backwards(rewards * mask, 0.9, whole))
    r, v = rewards * mask, values * mask
    deltas = r + 0.9 * torch.nn.functional.pad(v[:, 1:], (0, 1)) - v
    expected = backwards(deltas, 0.9 * 0.8, whole)
    advantages, returns = fastrl.gae(r, v, gamma=0.9, gae_lambda=0.8)
    torch.testing.assert_close(advantages, expected)
    torch.testing.assert_close(returns, expected + v)
    cu_seqlens = torch.arange(0, 7 * T + 1, T, dtype=torch.int32)
    packed = fastrl.gae(r.flatten(), v.flatten(), gamma=0.9, gae_lambda=0.8, cu_seqlens=cu_seqlens)
    torch.testing.assert_close(packed[0].view_as(expected), expected)
