"""verl's logprobs_from_logits, by hand: verl itself is nobody's dependency here."""

import math

import pytest
import torch

from fastrl.compat import logprobs_from_logits

# softmax of [log 1, log 2, log 5] is [1, 2, 5] / 8
LOGITS = torch.tensor([[1.0, 2.0, 5.0], [1.0, 2.0, 5.0], [4.0, 4.0, 8.0]]).log()
P = torch.tensor([[1.0, 2.0, 5.0], [1.0, 2.0, 5.0], [2.0, 2.0, 4.0]]) / 8
LABELS = torch.tensor([2, 0, 1])
EXPECTED = torch.tensor([5 / 8, 1 / 8, 2 / 8]).log()
GRADIENT = torch.eye(3)[LABELS] - P


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_values_gradient_and_dtype(dtype):
    logits = LOGITS.to(dtype, copy=True).requires_grad_()
    logprobs = logprobs_from_logits(logits, LABELS, inplace_backward=False)
    logprobs.sum().backward()
    assert logprobs.dtype == dtype and logits.grad.dtype == dtype
    tolerance = max(4 * torch.finfo(dtype).eps, 1e-7)  # the constants above are float32
    torch.testing.assert_close(logprobs, EXPECTED.to(dtype), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(logits.grad, GRADIENT.to(dtype), rtol=tolerance, atol=tolerance)


def test_any_leading_shape():
    logits = LOGITS.repeat(2, 1).view(2, 3, 3).transpose(0, 1)
    labels = LABELS.repeat(2).view(2, 3).T
    expected = EXPECTED.repeat(2).view(2, 3).T
    torch.testing.assert_close(logprobs_from_logits(logits, labels), expected)


def test_the_default_writes_the_gradient_over_the_logits():
    logits = LOGITS.clone().requires_grad_()
    logprobs_from_logits(logits, LABELS).sum().backward()
    torch.testing.assert_close(logits.detach(), GRADIENT)


def test_who_uses_the_logits_again_hears_of_it():
    leaf = LOGITS.clone().requires_grad_()
    logits = 1 * leaf
    entropy = torch.distributions.Categorical(logits=logits).entropy()
    logprobs = logprobs_from_logits(logits, LABELS)
    probabilities = logits.exp()
    logprobs.sum().backward()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (entropy.sum() + (probabilities * logits).sum()).backward()


def test_ignored_labels():
    logits = LOGITS.clone().requires_grad_()
    logprobs = logprobs_from_logits(logits, torch.tensor([2, -100, 1]), inplace_backward=False)
    logprobs.sum().backward()
    assert logprobs[1] == 0 and torch.equal(logits.grad[1], torch.zeros(3))
    assert logprobs[0].item() == pytest.approx(math.log(5 / 8))
    with pytest.raises(ValueError, match=r"token_ids in \[0, 3\)"):
        logprobs_from_logits(LOGITS, torch.tensor([2, -1, 1]))


def test_a_likely_label_keeps_its_digits():
    logits = torch.zeros(1, 1001)
    logits[0, 7] = 24.0  # p = 1 - 4e-8, where float32 has no number between it and 1
    exact = -math.log1p(1000 * math.exp(-24))
    logprobs = logprobs_from_logits(logits, torch.tensor([7]))
    assert logprobs.item() == pytest.approx(exact, rel=1e-5)
