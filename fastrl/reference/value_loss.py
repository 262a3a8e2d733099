"""The critic's loss."""

import torch
from torch import Tensor

from fastrl.reference._reduction import LossTokens


def value_loss(
    values: Tensor,
    returns: Tensor,
    *,
    old_values: Tensor | None = None,
    clip: float | None = None,
    weights: Tensor | None = None,
    loss_mask: Tensor | None = None,
    reduction: str = "token_mean",
    normalizer: float | Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Mean squared error of the critic, without a factor 1/2:

        (R_t - V_t)^2 weights_t

    and with clip, the larger of that and its value at old_t + clip(V_t - old_t, -clip, clip).

    Args:
        values: [..., T] or packed [N], V.
        returns: shaped like values, R, detached.
        old_values: shaped like values, of the critic before the update, detached; clip needs them.
        clip: how far V may move from old_values before its gradient stops.
        weights: per-token factors of the loss, detached (truncated importance sampling, replay).
        loss_mask: bool, True = counts. What stands elsewhere is ignored, NaN too.
        reduction: "token_mean": sum over counted tokens / their number. "sequence_mean": mean over
            the tokens of a sequence, then over the sequences with a counted token.
            "sequence_mean_token_sum": sum over tokens / number of those sequences. "none".
        normalizer: replaces the last denominator (tokens, or sequences): the global count, so that
            the gradients of micro-batches add up to the whole batch's. "none" does not use it.
        cu_seqlens: [S + 1] int32, tokens are packed [N] and segments are the sequences; without it
            a sequence is a row of [..., T].
    Returns:
        loss: scalar float32 (float64 if an input is); for "none" shaped like values, 0 where
            loss_mask is False. Without a counted token the loss and all gradients are 0.
    Raises:
        ValueError: unknown reduction.
    Differentiable in: values.   Reference: Schulman et al. 2017, arXiv:1707.06347, eq. 9.
    """
    tokens = LossTokens(values, loss_mask, cu_seqlens, returns, old_values, weights)
    v, target = tokens.of(values), tokens.target(returns)
    losses = (target - v).square()
    if clip is not None and old_values is not None:
        old = tokens.target(old_values)
        moved = old + (v - old).clamp(-clip, clip)
        losses = torch.maximum(losses, (target - moved).square())
    return tokens.reduce(losses, weights, reduction, normalizer)
