import pytest
import torch

from fastrl.reference import actor_critic_loss, policy_gradient_loss, value_loss

NAN = float("nan")


def test_by_hand():
    logprobs, values = torch.tensor([[-1.0, -2.0]]), torch.tensor([[1.0, 2.0]])
    returns, entropy = torch.tensor([[3.0, 1.0]]), torch.tensor([[0.5, 1.5]])
    # actor 1 * 2 and 2 * -1; critic 4 and 1
    loss = actor_critic_loss(logprobs, values, returns)
    torch.testing.assert_close(loss, torch.tensor((2 - 2 + 0.5 * (4 + 1)) / 2))
    loss = actor_critic_loss(
        logprobs, values, returns, critic_coef=2.0, entropy=entropy, entropy_coef=0.1
    )
    torch.testing.assert_close(loss, torch.tensor((2 - 2 + 2 * (4 + 1) - 0.1 * 2) / 2))


def test_each_part_learns_from_its_own_term():
    torch.manual_seed(0)
    leaves = [torch.randn(2, 3, dtype=torch.float64, requires_grad=True) for _ in range(4)]
    logprobs, values, returns, entropy = leaves
    actor_critic_loss(logprobs, values, returns, entropy=entropy, entropy_coef=0.1).backward()
    error = (returns - values).detach()
    torch.testing.assert_close(logprobs.grad, -error / 6)
    torch.testing.assert_close(values.grad, -0.5 * 2 * error / 6)
    torch.testing.assert_close(entropy.grad, torch.full_like(error, -0.1 / 6))
    assert returns.grad is None


def test_critic_coef_zero_gives_the_critic_no_gradient():
    logprobs, values = torch.randn(2, 5).unbind()
    values.requires_grad_()
    logprobs.requires_grad_()
    actor_critic_loss(logprobs, values, torch.ones(5), critic_coef=0.0).backward()
    assert (values.grad == 0).all() and (logprobs.grad != 0).all()


@pytest.mark.parametrize("reduction", ["token_mean", "sequence_mean", "sequence_mean_token_sum"])
def test_is_the_sum_of_its_parts(reduction):
    torch.manual_seed(0)
    logprobs, values, returns, weights = torch.randn(4, 3, 4, dtype=torch.float64)
    mask = torch.rand(3, 4) < 0.7
    options = {"loss_mask": mask, "weights": weights, "reduction": reduction}
    parts = policy_gradient_loss(logprobs, returns - values, **options)
    parts = parts + 0.3 * value_loss(values, returns, **options)
    loss = actor_critic_loss(logprobs, values, returns, critic_coef=0.3, **options)
    torch.testing.assert_close(loss, parts)


def test_masked_entries_are_ignored():
    leaves = [torch.tensor([[x, NAN]], requires_grad=True) for x in (-1.0, 2.0, 3.0, 0.5)]
    logprobs, values, returns, entropy = leaves
    mask = torch.tensor([[True, False]])
    loss = actor_critic_loss(
        logprobs, values, returns, entropy=entropy, entropy_coef=1.0, loss_mask=mask
    )
    torch.testing.assert_close(loss.detach(), torch.tensor(1 + 0.5 - 0.5))
    loss.backward()
    for leaf, expected in [(logprobs, -1.0), (values, -1.0), (entropy, -1.0)]:
        torch.testing.assert_close(leaf.grad, torch.tensor([[expected, 0.0]]))


def test_gradcheck():
    torch.manual_seed(0)
    leaves = [torch.randn(5, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    returns = torch.randn(5, dtype=torch.float64)
    bounds = torch.tensor([0, 2, 2, 5])

    def loss(logprobs, entropy):
        return actor_critic_loss(
            logprobs,
            leaves[2].detach(),
            returns,
            entropy=entropy,
            entropy_coef=0.2,
            reduction="sequence_mean",
            cu_seqlens=bounds,
        )

    # values apart: by definition their gradient leaves the actor's term out
    assert torch.autograd.gradcheck(loss, leaves[:2])
    no_actor = torch.zeros(5, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda v: actor_critic_loss(no_actor, v, returns), leaves[2])
