"""token_logprobs(kept=): a row's kept logits, gathered, go through the loops of token_logprobs.

A row costs its kept ids and no vocabulary; its gradient is dense, and 0 outside of them.
"""

from typing import Any

import torch
from torch import Tensor

from fastrl.ops import _binary

_fwd = _binary.op("kept_logprobs_fwd", differentiable=1)
_bwd = _binary.op("kept_logprobs_bwd")


def kept_logprobs(
    logits: Tensor,
    token_ids: Tensor,
    kept: tuple[Tensor, Tensor],
    temperature: float,
    ignore_index: int,
    return_entropy: bool,
) -> tuple[Tensor, Tensor]:
    """logprobs and entropy (empty unless asked for); the arguments are checked already."""
    ids, bounds = (x.contiguous() for x in kept)
    logprobs, entropy, _, _ = _fwd(
        logits, token_ids.contiguous(), ids, bounds, temperature, ignore_index, return_entropy
    )
    return logprobs, entropy


def _fwd_fake(
    logits: Tensor,
    token_ids: Tensor,
    kept_ids: Tensor,
    cu_seqlens: Tensor,
    temperature: float,
    ignore_index: int,
    return_entropy: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """logprobs, entropy, row max, log total: [...] float32 each."""
    rows = token_ids.new_empty(token_ids.shape, dtype=torch.float32)
    entropy = torch.empty_like(rows) if return_entropy else rows.new_empty(0)
    return rows, entropy, torch.empty_like(rows), torch.empty_like(rows)


def _bwd_fake(grad_logprobs: Any, grad_entropy: Any, logits: Tensor, *_: Any) -> Tensor:
    return logits.new_empty(logits.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, token_ids, kept_ids, cu_seqlens, *ctx.numbers, return_entropy = inputs
    logprobs, entropy, row_max, log_total = output
    saved_entropy = entropy if return_entropy else None
    ctx.save_for_backward(
        logits, token_ids, kept_ids, cu_seqlens, logprobs, saved_entropy, row_max, log_total
    )
    ctx.mark_non_differentiable(row_max, log_total)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None, *_: Any) -> Any:
    *inputs, logprobs, entropy, row_max, log_total = ctx.saved_tensors
    g = None if grad_logprobs is None else grad_logprobs.contiguous()
    h = None if grad_entropy is None or entropy is None else grad_entropy.contiguous()
    if g is None and h is None:
        return (None,) * 7
    return _bwd(g, h, *inputs, logprobs, entropy, row_max, log_total, *ctx.numbers), *(None,) * 6


_binary.register_fake("kept_logprobs_fwd", _fwd_fake)
_binary.register_fake("kept_logprobs_bwd", _bwd_fake)
_binary.register_autograd("kept_logprobs_fwd", _backward, setup_context=_setup_context)
_binary.register_differentiable_once("kept_logprobs_bwd")
_binary.register_triton("kept_logprobs", "kept_logprobs_fwd", "kept_logprobs_bwd")
