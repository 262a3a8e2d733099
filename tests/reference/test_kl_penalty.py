import math

import pytest
import torch

from fastrl.reference import kl_penalty


@pytest.mark.parametrize(
    ("estimator", "expected"),
    [
        ("k1", [math.log(2), -math.log(2), 0.0]),
        ("k2", [math.log(2) ** 2 / 2, math.log(2) ** 2 / 2, 0.0]),
        ("k3", [0.5 - 1 + math.log(2), 2 - 1 - math.log(2), 0.0]),
    ],
)
def test_by_hand(estimator, expected):
    logprobs = torch.tensor([0.5, 0.25, 0.5]).log()
    ref_logprobs = torch.tensor([0.25, 0.5, 0.5]).log()
    got = kl_penalty(logprobs, ref_logprobs, estimator=estimator)
    torch.testing.assert_close(got, torch.tensor(expected))


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_unbiased(estimator):
    """Weighted by the probabilities of all tokens, the estimates add up to the divergence."""
    torch.manual_seed(0)
    log_p, log_q = torch.randn(2, 6, dtype=torch.float64).log_softmax(-1)
    divergence = (log_p.exp() * (log_p - log_q)).sum()
    got = (log_p.exp() * kl_penalty(log_p, log_q, estimator=estimator)).sum()
    torch.testing.assert_close(got, divergence)


def test_k3_is_not_negative_near_zero():
    logprobs = torch.linspace(-1e-3, 1e-3, 1001)
    kl = kl_penalty(logprobs, torch.zeros(1001))
    assert kl.min() >= 0
    torch.testing.assert_close(kl, logprobs.double().square().div(2).float(), rtol=2e-3, atol=1e-10)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_gradcheck_and_detached_reference(estimator):
    torch.manual_seed(0)
    logprobs, ref = torch.randn(2, 5, dtype=torch.float64)
    logprobs.requires_grad_()
    ref.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: kl_penalty(x, ref.detach(), estimator=estimator), logprobs
    )
    kl_penalty(logprobs, ref, estimator=estimator).sum().backward()
    assert ref.grad is None


def test_unknown_estimator():
    with pytest.raises(ValueError, match="kl_penalty: expected estimator k1, k2 or k3, got 'k4'"):
        kl_penalty(torch.zeros(1), torch.zeros(1), estimator="k4")
