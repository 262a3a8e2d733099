"""REINFORCE."""

from torch import Tensor

from fastrl.reference._reduction import LossTokens


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
    """Policy-gradient loss: the mean over counted tokens of

        -logprobs_t advantages_t weights_t

    With dense immediate rewards in the place of advantages this is -mean(log pi * r).

    Args:
        logprobs: [..., T] or packed [N], log-probability of the token taken, nats.
        advantages: shaped like logprobs, detached.
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
        loss: scalar float32 (float64 if an input is); for "none" shaped like logprobs, 0 where
            loss_mask is False. Without a counted token the loss and all gradients are 0.
    Raises:
        ValueError: unknown reduction.
    Differentiable in: logprobs.   Reference: Williams 1992, Machine Learning 8, theorem 1.
    """
    tokens = LossTokens(logprobs, loss_mask, cu_seqlens, advantages, weights)
    losses = -tokens.of(logprobs) * tokens.target(advantages)
    return tokens.reduce(losses, weights, reduction, normalizer)
