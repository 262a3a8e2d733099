"""Statistics of the tokens' distributions, from hidden states."""

from typing import NamedTuple

import torch
from torch import Tensor

from fastrl.reference.linear_token_logprobs import head_logits
from fastrl.reference.token_logprobs import token_logprobs


class TokenStats(NamedTuple):
    """One number per row, as `token_stats` defines them."""

    logprobs: Tensor
    entropy: Tensor
    log_sum_sq_probs: Tensor
    mean_logits: Tensor
    is_top1: Tensor


@torch.no_grad()
def token_stats(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
) -> TokenStats:
    """What a trainer logs of each token's distribution p = softmax(z), z = logits / temperature.

        logprobs = log p_y                        entropy = -sum_j p_j log p_j
        log_sum_sq_probs = log sum_j p_j^2        (minus the Renyi entropy of order 2)
        mean_logits = mean_j z_j                  is_top1 = y is the first of the largest z_j

    Args:
        hidden, weight, token_ids, bias, temperature, softcap, ignore_index: as in
            `linear_token_logprobs`.
    Returns:
        TokenStats, a named tuple of [...] float32 (float64 if an input is), is_top1 bool; zeros and
        False in ignored rows. An id outside [0, V) has log-probability NaN and is never top 1.
    Differentiable in: nothing.
    """
    ignored = token_ids == ignore_index
    logits = head_logits(hidden.masked_fill(ignored[..., None], 0), weight, bias, softcap)
    logprobs, entropy = token_logprobs(
        logits, token_ids, temperature=temperature, ignore_index=ignore_index, return_entropy=True
    )
    z = logits / temperature
    return TokenStats(
        logprobs,
        entropy,
        (2 * z.log_softmax(-1)).logsumexp(-1).masked_fill(ignored, 0),
        z.mean(-1).masked_fill(ignored, 0),
        (z.argmax(-1) == token_ids) & ~ignored,
    )
