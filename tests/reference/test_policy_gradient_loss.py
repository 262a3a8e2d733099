import pytest
import torch

from fastrl.reference import policy_gradient_loss

NAN = float("nan")
LOGPROBS = torch.tensor([[-1.0, -2.0, NAN], [-3.0, NAN, NAN], [NAN, NAN, NAN]])
ADVANTAGES = torch.tensor([[2.0, 1.0, NAN], [-2.0, NAN, NAN], [NAN, NAN, NAN]])
MASK = ~LOGPROBS.isnan()
# per token 2, 2 | -6 | nothing


@pytest.mark.parametrize(
    ("reduction", "expected"),
    [
        ("token_mean", -2 / 3),
        ("sequence_mean", (2 - 6) / 2),  # rows' means 2 and -6; the last row has no token
        ("sequence_mean_token_sum", (4 - 6) / 2),
    ],
)
def test_reductions(reduction, expected):
    loss = policy_gradient_loss(LOGPROBS, ADVANTAGES, loss_mask=MASK, reduction=reduction)
    torch.testing.assert_close(loss, torch.tensor(expected))
    packed = policy_gradient_loss(
        LOGPROBS.flatten(),
        ADVANTAGES.flatten(),
        loss_mask=MASK.flatten(),
        reduction=reduction,
        cu_seqlens=torch.tensor([0, 3, 3, 6, 9], dtype=torch.int32),
    )
    torch.testing.assert_close(packed, torch.tensor(expected))


def test_none_keeps_the_shape():
    expected = torch.tensor([[2.0, 2, 0], [-6, 0, 0], [0, 0, 0]])
    loss = policy_gradient_loss(LOGPROBS, ADVANTAGES, loss_mask=MASK, reduction="none")
    torch.testing.assert_close(loss, expected)
    bounds = torch.tensor([0, 2, 2, 9])
    loss = policy_gradient_loss(
        LOGPROBS.flatten(),
        ADVANTAGES.flatten(),
        loss_mask=MASK.flatten(),
        reduction="none",
        cu_seqlens=bounds,
    )
    torch.testing.assert_close(loss, expected.flatten())


def test_dense_immediate_rewards():
    torch.manual_seed(0)
    logprobs, rewards = torch.randn(2, 4, 5)
    expected = -(logprobs * rewards).sum() / 20
    torch.testing.assert_close(policy_gradient_loss(logprobs, rewards), expected)


def test_weights_scale_tokens_and_leave_the_denominator():
    weights = torch.tensor([[0.5, 0.0, NAN], [2.0, NAN, NAN], [NAN] * 3])
    loss = policy_gradient_loss(LOGPROBS, ADVANTAGES, loss_mask=MASK, weights=weights)
    torch.testing.assert_close(loss, torch.tensor((1 - 12) / 3))


def test_gradient_is_clean_and_goes_to_logprobs_alone():
    logprobs = LOGPROBS.clone().requires_grad_()
    advantages = ADVANTAGES.clone().requires_grad_()
    weights = torch.ones(3, 3, requires_grad=True)
    policy_gradient_loss(logprobs, advantages, loss_mask=MASK, weights=weights).backward()
    expected = torch.tensor([[-2.0, -1, 0], [2, 0, 0], [0, 0, 0]]) / 3
    torch.testing.assert_close(logprobs.grad, expected)
    assert advantages.grad is None and weights.grad is None


REDUCTIONS = ["token_mean", "sequence_mean", "sequence_mean_token_sum"]


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_micro_batches_add_up_to_the_batch(reduction):
    torch.manual_seed(0)
    advantages = torch.randn(6, 5, dtype=torch.float64)
    mask = torch.rand(6, 5) < 0.6
    mask[3] = False
    whole = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    policy_gradient_loss(whole, advantages, loss_mask=mask, reduction=reduction).backward()
    parts = whole.detach().clone().requires_grad_()
    normalizer = mask.sum() if reduction == "token_mean" else mask.any(1).sum()
    for rows in (slice(0, 1), slice(1, 4), slice(4, 6)):  # of unequal numbers of tokens
        policy_gradient_loss(
            parts[rows],
            advantages[rows],
            loss_mask=mask[rows],
            reduction=reduction,
            normalizer=normalizer,
        ).backward()
    torch.testing.assert_close(parts.grad, whole.grad)


@pytest.mark.parametrize("has_normalizer", [False, True])
@pytest.mark.parametrize("reduction", [*REDUCTIONS, "none"])
def test_nothing_counted_is_zero_with_zero_gradients(reduction, has_normalizer):
    logprobs = torch.full((2, 3), NAN, requires_grad=True)
    mask = torch.zeros(2, 3, dtype=torch.bool)
    normalizer = mask.sum() if has_normalizer else None  # of all ranks together
    loss = policy_gradient_loss(
        logprobs, logprobs, loss_mask=mask, reduction=reduction, normalizer=normalizer
    )
    assert (loss == 0).all()
    loss.sum().backward()
    assert (logprobs.grad == 0).all()
    empty = torch.zeros(0, 4, requires_grad=True)
    assert policy_gradient_loss(empty, empty, reduction=reduction).sum() == 0


def test_dtypes_and_strides():
    torch.manual_seed(0)
    logprobs, advantages = torch.randn(2, 3, 4, 5).bfloat16().transpose(2, 3)
    loss = policy_gradient_loss(logprobs, advantages)
    assert loss.dtype == torch.float32
    expected = -(logprobs.double() * advantages.double()).mean()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    assert policy_gradient_loss(logprobs.double(), advantages).dtype == torch.float64


def test_unknown_reduction():
    with pytest.raises(ValueError, match="expected reduction .*, got 'mean'"):
        policy_gradient_loss(torch.zeros(1, 2), torch.zeros(1, 2), reduction="mean")


@pytest.mark.parametrize("reduction", [*REDUCTIONS, "none"])
def test_gradcheck(reduction):
    torch.manual_seed(0)
    logprobs = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    advantages = torch.randn(2, 3, dtype=torch.float64)
    mask = torch.tensor([[True, False, True], [True, True, True]])
    assert torch.autograd.gradcheck(
        lambda x: policy_gradient_loss(x, advantages, loss_mask=mask, reduction=reduction), logprobs
    )
