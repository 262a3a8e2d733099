"""Sampling tokens from logits."""

from typing import Literal, overload

import torch
from torch import Tensor

from fastrl.reference._philox import uniform
from fastrl.reference._precision import promote
from fastrl.reference.token_logprobs import token_logprobs

Kept = tuple[Tensor, Tensor]


@overload
def sample_tokens(
    logits: Tensor, *, temperature: float = ..., top_k: int | None = ...,
    top_p: float | None = ..., seeds: Tensor | None = ..., step: int = ...,
    return_kept: Literal[False] = False,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
@overload
def sample_tokens(
    logits: Tensor, *, temperature: float = ..., top_k: int | None = ...,
    top_p: float | None = ..., seeds: Tensor | None = ..., step: int = ...,
    return_kept: Literal[True],
) -> tuple[Tensor, Tensor, Kept]: ...  # fmt: skip
@overload
def sample_tokens(
    logits: Tensor, *, temperature: float = ..., top_k: int | None = ...,
    top_p: float | None = ..., seeds: Tensor | None = ..., step: int = ...,
    return_kept: bool,
) -> tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Kept]: ...  # fmt: skip
@torch.no_grad()
def sample_tokens(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seeds: Tensor | None = None,
    step: int = 0,
    return_kept: bool = False,
) -> tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Kept]:
    """Draws one token per row from softmax(logits / temperature), cut by top_k, then by top_p.

    The token is the smallest id whose cumulative probability, in id order over the ids kept,
    exceeds u. u in [0, 1) is one number of Philox-4x32-10 with the row's seed as key and step as
    counter: 24 bits, or 53 for float64 logits. A row's draw depends on its logits, its seed and
    step alone, and a token of probability 0 is never drawn.

    top_k keeps the k most likely ids, top_p the fewest of these, the most likely first, whose
    renormalised probabilities add up to at least top_p; of equals the lowest ids are kept, and ids
    with logit -inf never.

    Args:
        logits: [..., V] float32, bfloat16, float16 or float64. A row with NaN, or without a finite
            logit, gives an arbitrary id and log-probability NaN.
        temperature: >= 0. 0 is greedy: the most likely id, the lowest of equals, and top_k, top_p
            and the log-probabilities as for temperature 1.
        top_k: >= 1, or None.
        top_p: in (0, 1], or None.
        seeds: int64, one per row; None draws them from torch's generator.
        step: int, the position of the draw in the row's stream, in [0, 2^64).
        return_kept: return the ids that were drawn from as well.
    Returns:
        token_ids: [...] int64.
        logprobs: [...], those of `token_logprobs`: over the whole vocabulary, or with return_kept
            over the ids kept.
        kept: (ids int64 [K], ascending within a row; cu_seqlens int32 [rows + 1]), if return_kept.
    Differentiable in: nothing.
    Reference: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"; Holtzman et al.
        2020, arXiv:1904.09751 (top_p).
    """
    scale = temperature if temperature > 0 else 1.0
    token_ids, is_kept = draw_tokens(logits, temperature, top_k, top_p, seeds, step)
    if not return_kept:
        return token_ids, token_logprobs(logits, token_ids, temperature=scale)
    kept = kept_ids(is_kept)
    logprobs = token_logprobs(logits, token_ids, temperature=scale, kept=kept)
    return token_ids, logprobs, kept


def draw_tokens(
    logits: Tensor,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    seeds: Tensor | None,
    step: int,
) -> tuple[Tensor, Tensor]:
    """The ids drawn [...], and which ids [rows, V] they were drawn from."""
    leading, vocab_size = logits.shape[:-1], logits.shape[-1]
    scaled = promote(logits).reshape(leading.numel(), vocab_size)
    if temperature not in (0, 1):
        scaled = scaled / temperature
    is_kept = _kept_mask(scaled, top_k, top_p)
    if top_k is not None or top_p is not None:
        scaled = scaled.masked_fill(~is_kept, -torch.inf)
    if temperature == 0:
        return scaled.argmax(-1).reshape(leading), is_kept
    if seeds is None:
        seeds = torch.randint(-(2**63), 2**63 - 1, (len(scaled),), device=logits.device)
    u = uniform(seeds.reshape(-1), step, scaled.dtype).double()
    cumulative = scaled.double().softmax(-1).cumsum(-1)
    # Times the last entry, which rounding leaves a little off 1: some entry always exceeds it.
    threshold = u[:, None] * cumulative[:, -1:]
    chosen = torch.searchsorted(cumulative, threshold, right=True)[:, 0]
    return chosen.clamp(max=vocab_size - 1).reshape(leading), is_kept  # NaN rows are beyond any


def kept_ids(is_kept: Tensor) -> Kept:
    cu_seqlens = torch.nn.functional.pad(is_kept.sum(-1).cumsum(0), (1, 0)).int()
    return is_kept.nonzero()[:, 1], cu_seqlens


def _kept_mask(scaled: Tensor, top_k: int | None, top_p: float | None) -> Tensor:
    """[rows, V] bool: the ids that may be drawn."""
    if top_k is None and top_p is None:
        return scaled != -torch.inf  # NaN is kept, and makes the log-probability NaN
    ordered, order = scaled.sort(stable=True, dim=-1, descending=True)  # equals: lowest id first
    keep = ordered != -torch.inf
    if top_k is not None:
        keep[:, top_k:] = False
    if top_p is not None and top_p < 1:
        p = ordered.masked_fill(~keep, -torch.inf).double().softmax(-1)
        keep &= p.cumsum(-1) - p < top_p  # what stands before an id does not reach top_p yet
    return torch.zeros_like(keep).scatter(-1, order, keep)
