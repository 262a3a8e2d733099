"""PPO, and GSPO by level=`sequence`."""

import torch
from torch import Tensor

from fastrl.reference._reduction import LossTokens


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
    """Clipped surrogate loss: the mean over counted tokens of

        -weights_t min(ratio_t A_t, clip(ratio_t, 1 - clip_low, 1 + clip_high) A_t)

    and, where A_t < 0 and dual_clip is given, of -weights_t max(that minimum, dual_clip A_t).

    "token": ratio_t = exp(logprobs_t - old_logprobs_t). "sequence" (GSPO): ratio is exp of the
    mean of logprobs - old_logprobs over the sequence's counted tokens, one value for all of them;
    its gradient at token t is ratio times that of logprobs_t alone (stop-gradient composition).
    A token on the clipped side gets no gradient; on a bound itself it does.

    Args:
        logprobs: [..., T] or packed [N], log-probability of the token taken, nats.
        old_logprobs: shaped like logprobs, of the policy that sampled; detached.
        advantages: shaped like logprobs, A, detached.
        clip_low, clip_high: distance of the ratio's bounds from 1.
        dual_clip: > 1, bound of the ratio for negative advantages.
        level: "token" or "sequence".
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
    Differentiable in: logprobs.
    Reference: Schulman et al. 2017, arXiv:1707.06347, eq. 7; dual clip: Ye et al. 2020,
        arXiv:1912.09729; sequence level: Zheng et al. 2025, arXiv:2507.18071, section 4.3.
    """
    tokens = LossTokens(logprobs, loss_mask, cu_seqlens, old_logprobs, advantages, weights)
    new, adv = tokens.of(logprobs), tokens.target(advantages)
    log_ratio = new - tokens.target(old_logprobs)
    if level == "sequence":
        log_ratio = tokens.sequence_mean(log_ratio.detach()) + (new - new.detach())
    ratio = log_ratio.detach().exp()
    bounded = ratio.clamp(1 - clip_low, 1 + clip_high)
    follows = torch.where(adv > 0, ratio <= 1 + clip_high, (adv < 0) & (ratio >= 1 - clip_low))
    if dual_clip is not None:
        beyond = (adv < 0) & (ratio > dual_clip)
        bounded = torch.where(beyond, dual_clip, bounded)
        follows = follows & ~beyond
    # exp sees only the tokens whose ratio counts: an overflow on the clipped side would still be
    # 0 * inf = NaN in the gradient.
    free = torch.where(follows, log_ratio, 0).exp()
    losses = -torch.where(follows, free, bounded) * adv
    return tokens.reduce(losses, weights, reduction, normalizer)
