"""Log-probabilities of given tokens, from logits."""

from typing import Literal, overload

import torch
import torch.distributed as dist
from torch import Tensor

from fastrl.reference._precision import promote
from fastrl.reference._vocabulary_parallel import gather_vocabulary


@overload
def token_logprobs(
    logits: Tensor, token_ids: Tensor, *, temperature: float = ..., ignore_index: int = ...,
    return_entropy: Literal[False] = False, inplace_backward: bool = ...,
    kept: tuple[Tensor, Tensor] | None = ..., group: dist.ProcessGroup | None = ...,
    vocab_start: int | None = ...,
) -> Tensor: ...  # fmt: skip
@overload
def token_logprobs(
    logits: Tensor, token_ids: Tensor, *, temperature: float = ..., ignore_index: int = ...,
    return_entropy: Literal[True], inplace_backward: bool = ...,
    kept: tuple[Tensor, Tensor] | None = ..., group: dist.ProcessGroup | None = ...,
    vocab_start: int | None = ...,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
@overload
def token_logprobs(
    logits: Tensor, token_ids: Tensor, *, temperature: float = ..., ignore_index: int = ...,
    return_entropy: bool, inplace_backward: bool = ...,
    kept: tuple[Tensor, Tensor] | None = ..., group: dist.ProcessGroup | None = ...,
    vocab_start: int | None = ...,
) -> Tensor | tuple[Tensor, Tensor]: ...  # fmt: skip
def token_logprobs(
    logits: Tensor,
    token_ids: Tensor,
    *,
    temperature: float = 1.0,
    ignore_index: int = -100,
    return_entropy: bool = False,
    inplace_backward: bool = False,
    kept: tuple[Tensor, Tensor] | None = None,
    group: dist.ProcessGroup | None = None,
    vocab_start: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-probability of each row's token under softmax(logits / temperature).

        log p_y = x_y - log sum_j exp(x_j),    x = logits / temperature
        entropy = -sum_j p_j log p_j,          0 log 0 = 0

    A row whose token id is ignore_index gives 0 for both, and no gradient, whatever its logits
    are. Another id outside [0, V) gives a NaN log-probability: checking would synchronise a GPU.

    Args:
        logits: [..., V] float32, bfloat16, float16 or float64; -inf excludes a token.
        token_ids: [...] int64.
        temperature: > 0.
        ignore_index: the id of rows that do not count.
        return_entropy: return the entropy as well.
        inplace_backward: no effect here. The op overwrites logits with their gradient in backward.
        kept: (ids int64 [K], cu_seqlens int32 [rows + 1]): row i is renormalised over the ids in
            ids[cu_seqlens[i]:cu_seqlens[i + 1]]; a token outside them has log-probability -inf.
        group: process group whose ranks hold slices of the vocabulary, in rank order, of any
            sizes. token_ids and kept are ids of the whole vocabulary; every rank gets the same
            result, and the gradient of its own slice.
        vocab_start: first id of this rank's slice, or None: the slices before it tell. Redundant
            here.
    Returns:
        logprobs: [...] float32 (float64 for float64 logits), nats.
        entropy: the same, if return_entropy.
    Differentiable in: logits.
    """
    x = promote(logits)
    ignored = token_ids == ignore_index
    if group is not None:
        x = gather_vocabulary(x, group)
    if kept is not None:
        x = x.masked_fill(~_is_kept(*kept, x), -torch.inf)
    x = x.masked_fill(ignored[..., None], 0)  # after -inf: an ignored row may keep no id at all
    log_p = (x / temperature).log_softmax(-1)  # [..., V]

    in_range = (token_ids >= 0) & (token_ids < x.shape[-1])
    logprobs = log_p.gather(-1, token_ids.masked_fill(~in_range, 0)[..., None]).squeeze(-1)
    logprobs = logprobs.masked_fill(~in_range, torch.nan).masked_fill(ignored, 0)
    if not return_entropy:
        return logprobs
    # p log p at p = 0 is 0, but its derivative is not finite: take log p out of the product.
    finite_log_p = log_p.masked_fill(log_p == -torch.inf, 0)
    entropy = -(log_p.exp() * finite_log_p).sum(-1)
    return logprobs, entropy.masked_fill(ignored, 0)


def _is_kept(ids: Tensor, cu_seqlens: Tensor, logits: Tensor) -> Tensor:
    """Bool like logits: row i keeps the ids in ids[cu_seqlens[i]:cu_seqlens[i + 1]]."""
    rows = torch.arange(len(cu_seqlens) - 1, device=ids.device)
    row_of_id = rows.repeat_interleave(cu_seqlens.diff().long())
    is_kept = logits.new_zeros(len(rows), logits.shape[-1], dtype=torch.bool)
    is_kept[row_of_id, ids] = True
    return is_kept.reshape(logits.shape)
