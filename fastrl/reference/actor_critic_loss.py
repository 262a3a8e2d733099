"""Actor and critic in one loss."""

from torch import Tensor

from fastrl.reference._reduction import LossTokens


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
    """Advantage actor-critic loss: the mean over counted tokens of

        weights_t [-logprobs_t (R_t - V_t) + critic_coef (R_t - V_t)^2 - entropy_coef entropy_t]

    with V detached in the first term: the actor's term gives the critic no gradient.

    Args:
        logprobs: [..., T] or packed [N], log-probability of the token taken, nats.
        values: shaped like logprobs, V.
        returns: shaped like logprobs, R, detached.
        critic_coef: weight of the critic's squared error.
        entropy: shaped like logprobs, nats; None leaves its term out.
        entropy_coef: weight of the entropy bonus.
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
    Differentiable in: logprobs, values, entropy.
    Reference: Mnih et al. 2016, arXiv:1602.01783, section 4.
    """
    tokens = LossTokens(logprobs, loss_mask, cu_seqlens, values, returns, entropy, weights)
    error = tokens.target(returns) - tokens.of(values)
    losses = critic_coef * error.square() - tokens.of(logprobs) * error.detach()
    if entropy is not None:
        losses = losses - entropy_coef * tokens.of(entropy)
    return tokens.reduce(losses, weights, reduction, normalizer)
