import pytest
import torch

from fastrl.reference import policy_gradient_loss, ppo_loss


def by_token(ratio, advantage, **options):
    """Loss and gradient of one token with that ratio."""
    logprob = torch.tensor([ratio], dtype=torch.float64).log().requires_grad_()
    old, advantage = torch.zeros(1, dtype=torch.float64), torch.tensor([advantage])
    loss = ppo_loss(logprob, old, advantage, **options)
    loss.backward()
    return pytest.approx(loss.item()), pytest.approx(logprob.grad.item())


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient"),
    [  # clipped to [0.8, 1.3]
        (1.1, 2.0, -2.2, -2.2),
        (1.5, 2.0, -2.6, 0.0),  # up no further
        (0.5, 2.0, -1.0, -1.0),  # back up
        (0.5, -2.0, 1.6, 0.0),  # down no further
        (1.5, -2.0, 3.0, 3.0),  # back down
        (5.0, -2.0, 10.0, 10.0),
        (1.5, 0.0, 0.0, 0.0),
    ],
)
def test_the_four_quadrants(ratio, advantage, loss, gradient):
    assert by_token(ratio, advantage, clip_low=0.2, clip_high=0.3) == (loss, gradient)


def test_dual_clip_bounds_negative_advantages_alone():
    assert by_token(5.0, -2.0, dual_clip=3.0) == (6.0, 0.0)
    assert by_token(2.0, -2.0, dual_clip=3.0) == (4.0, 4.0)
    assert by_token(0.5, 2.0, dual_clip=3.0) == (-1.0, -1.0)
    assert by_token(5.0, 2.0, dual_clip=3.0) == (-2.4, 0.0)


@pytest.mark.parametrize("dual_clip", [None, 1.5])
def test_is_the_clipped_minimum(dual_clip):
    torch.manual_seed(0)
    old, advantages = torch.randn(2, 200, dtype=torch.float64)
    logprobs = (old + torch.randn(200)).requires_grad_()
    loss = ppo_loss(logprobs, old, advantages, dual_clip=dual_clip)
    (gradient,) = torch.autograd.grad(loss, logprobs)
    ratio = (logprobs - old).exp()
    objective = torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
    if dual_clip is not None:
        bounded = torch.maximum(objective, dual_clip * advantages)
        objective = torch.where(advantages < 0, bounded, objective)
    torch.testing.assert_close(loss, -objective.mean())
    torch.testing.assert_close(gradient, torch.autograd.grad(-objective.mean(), logprobs)[0])


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_at_ratio_one_the_gradient_is_the_policy_gradient(level):
    torch.manual_seed(0)
    logprobs = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    advantages = torch.randn(3, 4, dtype=torch.float64)
    mask = torch.rand(3, 4) < 0.7
    options = {"loss_mask": mask, "reduction": "sequence_mean"}
    ppo = ppo_loss(logprobs, logprobs.detach(), advantages, level=level, **options)
    plain = policy_gradient_loss(logprobs, advantages, **options)
    got, expected = (torch.autograd.grad(loss, logprobs)[0] for loss in (ppo, plain))
    torch.testing.assert_close(got, expected)
    assert (got[mask] != 0).all()


def test_sequence_level_by_hand():
    """GSPO: ratio s = exp(mean log-ratio), gradient s A / length to each token."""
    log_ratio = torch.tensor([[0.3, -0.1, 9.0], [1.0, 1.0, 1.0]], dtype=torch.float64)
    mask = torch.tensor([[True, True, False], [True, True, True]])
    advantages = torch.tensor([[2.0, 2.0, 9.0], [3.0, 3.0, 3.0]])
    logprobs = log_ratio.clone().requires_grad_()
    old = torch.zeros(2, 3)
    options = {"level": "sequence", "reduction": "sequence_mean", "loss_mask": mask}
    loss = ppo_loss(logprobs, old, advantages, **options)
    s = torch.tensor(0.1, dtype=torch.float64).exp()  # within the clip; the second row is not
    torch.testing.assert_close(loss, -(2 * s + 3 * 1.2) / 2)
    loss.backward()
    expected = torch.zeros(2, 3, dtype=torch.float64)
    expected[0, :2] = -2 * s / 2 / 2
    torch.testing.assert_close(logprobs.grad, expected)
    packed = ppo_loss(
        log_ratio[mask],
        torch.zeros(5),
        advantages[mask],
        level="sequence",
        reduction="sequence_mean",
        cu_seqlens=torch.tensor([0, 2, 5]),
    )
    torch.testing.assert_close(packed, loss.detach())


def test_gspo_gradient_is_that_of_its_plain_form():
    """One advantage per sequence: d/d theta of s(theta) A, differentiated through the mean."""
    torch.manual_seed(0)
    logprobs = (0.1 * torch.randn(4, 6, dtype=torch.float64)).requires_grad_()
    advantages = torch.randn(4, 1, dtype=torch.float64).expand(4, 6)
    loss = ppo_loss(
        logprobs, torch.zeros(4, 6), advantages, level="sequence", reduction="sequence_mean"
    )
    plain = -(logprobs.mean(1).exp() * advantages[:, 0]).mean()
    torch.testing.assert_close(loss, plain)
    got, expected = (torch.autograd.grad(x, logprobs)[0] for x in (loss, plain))
    torch.testing.assert_close(got, expected)


def test_an_overflow_on_the_clipped_side_is_harmless():
    logprobs = torch.tensor([200.0, -200.0, 200.0], requires_grad=True)
    advantages = torch.tensor([1.0, -1.0, 0.0])
    loss = ppo_loss(logprobs, torch.zeros(3), advantages, reduction="none")
    torch.testing.assert_close(loss, torch.tensor([-1.2, 0.8, 0.0]))
    loss.sum().backward()
    assert (logprobs.grad == 0).all()


def test_masked_entries_are_ignored_and_targets_detached():
    nan = float("nan")
    logprobs = torch.tensor([0.1, nan], requires_grad=True)
    old = torch.tensor([0.0, nan], requires_grad=True)
    advantages = torch.tensor([1.0, nan], requires_grad=True)
    loss = ppo_loss(logprobs, old, advantages, loss_mask=torch.tensor([True, False]))
    loss.backward()
    ratio = torch.tensor(0.1).exp()
    torch.testing.assert_close(loss.detach(), -ratio)
    torch.testing.assert_close(logprobs.grad, torch.stack([-ratio, torch.tensor(0.0)]))
    assert old.grad is None and advantages.grad is None


@pytest.mark.parametrize("dual_clip", [None, 1.5])
def test_gradcheck(dual_clip):
    torch.manual_seed(4)
    logprobs = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    old, advantages = torch.randn(2, 3, 4, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda x: ppo_loss(x, old, advantages, dual_clip=dual_clip), logprobs
    )
