"""The clipped surrogate loss: checks, and the one definition in fastrl.reference."""

import math

from torch import Tensor

from fastrl import reference
from fastrl.ops import _checks, _losses


def ppo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    level: str = "token",
    weights: Tensor | None = None,
    loss_mask: Tensor | None = None,
    reduction: str = "token_mean",
    normalizer: float | Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    op = "ppo_loss"
    _checks.one_of(op, "level", level, ("token", "sequence"))
    _checks.number(op, "clip_low", clip_low, 0.0, 1.0, "The ratio stays above 1 - clip_low.")
    _checks.number(
        op, "clip_high", clip_high, 0.0, math.inf, "The ratio stays below 1 + clip_high."
    )
    if dual_clip is not None:
        _checks.number(
            op, "dual_clip", dual_clip, 1.0, math.inf, "It bounds the ratio; 3 is usual."
        )
    _losses.check(
        op, "logprobs", logprobs,
        {"old_logprobs": old_logprobs, "advantages": advantages, "weights": weights},
        loss_mask=loss_mask, reduction=reduction, normalizer=normalizer, cu_seqlens=cu_seqlens,
        by_sequence=level == "sequence",
    )  # fmt: skip
    return reference.ppo_loss(
        logprobs, old_logprobs, advantages, clip_low=clip_low, clip_high=clip_high,
        dual_clip=dual_clip, level=level, weights=weights, loss_mask=loss_mask,
        reduction=reduction, normalizer=normalizer, cu_seqlens=cu_seqlens,
    )  # fmt: skip


ppo_loss.__doc__ = reference.ppo_loss.__doc__
