"""Statistics of the tokens' distributions from hidden states, with no logits kept."""

from typing import Any

import torch
from torch import Tensor

from fastrl.ops import _binary, _linear_slices
from fastrl.ops._autocast import autocast
from fastrl.ops.linear_token_logprobs import check_head
from fastrl.ops.token_logprobs import check_ids
from fastrl.reference.token_stats import TokenStats

_stats = _binary.op("token_stats", differentiable=0)


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

    One product in slices of the vocabulary, as the forward pass of `linear_token_logprobs`, and
    some more passes over each slice.

    Args:
        hidden, weight, token_ids, bias, temperature, softcap, ignore_index: as in
            `linear_token_logprobs`.
    Returns:
        TokenStats, a named tuple of [...] float32, is_top1 bool; zeros and False in ignored rows.
        Where looking would synchronise, an id outside [0, V) has log-probability NaN and is never
        top 1.
    Raises:
        ValueError, TypeError, NotImplementedError: as `linear_token_logprobs`.
    Differentiable in: nothing.
    """
    op = "token_stats"
    check_head(op, hidden, weight, token_ids, bias, temperature, softcap, ignore_index)
    check_ids(op, token_ids, weight.shape[0], ignore_index)
    hidden, weight, bias = autocast(hidden, weight, bias)
    x = hidden.reshape(-1, hidden.shape[-1])
    ids = token_ids.reshape(-1).contiguous()  # a flat view of a column is strided
    found = _stats(x, weight, ids, bias, temperature, softcap, ignore_index)
    return TokenStats(*(column.reshape(token_ids.shape) for column in found))


def _stats_fake(hidden: Tensor, weight: Tensor, token_ids: Tensor, *_: Any) -> tuple[Tensor, ...]:
    rows = [token_ids.new_empty(token_ids.shape, dtype=torch.float32) for _ in range(4)]
    return *rows, torch.empty_like(token_ids, dtype=torch.bool)


_binary.register_torch(_linear_slices.token_stats)
_binary.register_fake("token_stats", _stats_fake)
