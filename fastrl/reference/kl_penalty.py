"""Per-token estimates of the divergence from a reference policy."""

import torch
from torch import Tensor

from fastrl.reference._precision import compute_dtype


def kl_penalty(logprobs: Tensor, ref_logprobs: Tensor, *, estimator: str = "k3") -> Tensor:
    """Estimates KL(pi || ref) at each token from the one token that pi sampled there.

        d_t = logprobs_t - ref_logprobs_t
        k1: d_t        k2: d_t^2 / 2        k3: exp(-d_t) - 1 + d_t

    k1 and k3 are unbiased; k2 and k3 are never negative.

    Args:
        logprobs: any shape, log-probability of the token taken, nats.
        ref_logprobs: the same shape, of the reference policy; detached.
        estimator: "k1", "k2" or "k3".
    Returns:
        kl: the same shape, float32 (float64 if an input is), nats.
    Raises:
        ValueError: unknown estimator.
    Differentiable in: logprobs.
    Reference: Schulman 2020, "Approximating KL divergence", joschu.net/blog/kl-approx.html.
    """
    dtype = compute_dtype(logprobs, ref_logprobs)
    d = logprobs.to(dtype) - ref_logprobs.detach().to(dtype)
    if estimator == "k1":
        return d
    if estimator == "k2":
        return d.square() / 2
    if estimator == "k3":
        return torch.expm1(-d) + d
    raise ValueError(
        f"kl_penalty: expected estimator k1, k2 or k3, got {estimator!r}. Name one of the three."
    )
