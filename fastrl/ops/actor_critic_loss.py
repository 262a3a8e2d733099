"""The actor-critic loss: checks, and the one definition in fastrl.reference."""

import math

from torch import Tensor

from fastrl import reference
from fastrl.ops import _checks, _losses


def actor_critic_loss(
    logprobs: Tensor,
    values: Tensor,
    returns: Tensor,
    *,
    critic_coef: float = 0.5,
    entropy: Tensor | None = None,
    entropy_coef: float = 0.0,
    weights: Tensor | None = None,
    loss_mask: Tensor | None = None,
    reduction: str = "token_mean",
    normalizer: float | Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    op = "actor_critic_loss"
    _checks.number(op, "critic_coef", critic_coef, 0.0, math.inf, "It weighs the critic's loss.")
    _checks.number(op, "entropy_coef", entropy_coef, -math.inf, math.inf, "It weighs the entropy.")
    if entropy_coef and entropy is None:
        raise _checks.fail(
            op, "entropy with entropy_coef", "None", "token_logprobs returns it on request."
        )
    _losses.check(
        op, "logprobs", logprobs,
        {"values": values, "returns": returns, "entropy": entropy, "weights": weights},
        loss_mask=loss_mask, reduction=reduction, normalizer=normalizer, cu_seqlens=cu_seqlens,
    )  # fmt: skip
    return reference.actor_critic_loss(
        logprobs, values, returns, critic_coef=critic_coef, entropy=entropy,
        entropy_coef=entropy_coef, weights=weights, loss_mask=loss_mask, reduction=reduction,
        normalizer=normalizer, cu_seqlens=cu_seqlens,
    )  # fmt: skip


actor_critic_loss.__doc__ = reference.actor_critic_loss.__doc__
