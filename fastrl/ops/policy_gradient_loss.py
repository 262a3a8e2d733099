"""The policy-gradient loss: checks, and the one definition in fastrl.reference."""

from torch import Tensor

from fastrl import reference
from fastrl.ops import _losses


def policy_gradient_loss(
    logprobs: Tensor,
    advantages: Tensor,
    *,
    weights: Tensor | None = None,
    loss_mask: Tensor | None = None,
    reduction: str = "token_mean",
    normalizer: float | Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    _losses.check(
        "policy_gradient_loss", "logprobs", logprobs,
        {"advantages": advantages, "weights": weights},
        loss_mask=loss_mask, reduction=reduction, normalizer=normalizer, cu_seqlens=cu_seqlens,
    )  # fmt: skip
    return reference.policy_gradient_loss(
        logprobs, advantages, weights=weights, loss_mask=loss_mask, reduction=reduction,
        normalizer=normalizer, cu_seqlens=cu_seqlens,
    )  # fmt: skip


policy_gradient_loss.__doc__ = reference.policy_gradient_loss.__doc__
