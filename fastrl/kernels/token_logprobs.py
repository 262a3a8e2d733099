"""Token log-probabilities and entropy from logits, and their gradient, on a GPU.

    log p_y = (x_y - m) / T - L,    m = max_j x_j,  L = log sum_j exp((x_j - m) / T)
    entropy = L + sum_j p_j (m - x_j) / T
    d/dx_j  = [g (delta_jy - p_j) - h p_j (log p_j + entropy)] / T

The forward pass reads the logits once (_row_states.py). The backward pass reads them once and
writes the gradient once, over the logits on request.

Bytes: forward N V b, backward 2 N V b, with b bytes a logit. While a multiprocessor of an H200
reads and writes a column of bfloat16 it has some 30 instructions of a thread for it; the backward
pass takes about 15.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastrl import _vocabulary
from fastrl.kernels._launch import AS_WRITTEN
from fastrl.kernels._math import LOG2E, expm1
from fastrl.kernels._row_states import merge, partial_states
from fastrl.kernels._rows import block_for, finite, row_start, rows_of

# Not measured on a GPU yet. Compiled for sm_90: no spills, 16 bytes a load.
BACKWARD = ({"BLOCK_V": 1024, "num_warps": 4}, {"BLOCK_V": 4096, "num_warps": 4})
# Of rows off 16-byte bounds each entry has an address, and a thread registers for half as many.
BACKWARD_UNALIGNED = ({"BLOCK_V": 1024, "num_warps": 4}, {"BLOCK_V": 4096, "num_warps": 8})
_LN2 = tl.constexpr(0.6931471805599453)

_RUNTIME = [  # see _row_states.py
    "num_blocks", "inner_size", "ignore_index", "vocab_start",
    "stride_outer", "stride_inner", "grad_stride_outer", "grad_stride_inner",
]  # fmt: skip
_OF_A_ROW = [
    "token_ids_ptr", "grad_logprobs_ptr", "grad_entropy_ptr", "logprobs_ptr", "entropy_ptr",
    "row_max_ptr", "log_total_ptr",
]  # fmt: skip


@triton.jit(do_not_specialize=_RUNTIME, do_not_specialize_on_alignment=_OF_A_ROW)
def _token_logprobs_bwd_kernel(
    grad_logprobs_ptr, grad_entropy_ptr, logits_ptr, token_ids_ptr,
    logprobs_ptr, entropy_ptr, row_max_ptr, log_total_ptr,
    grad_ptr,  # -> [N, V]
    V, num_blocks, inner_size, stride_outer: tl.int64, stride_inner: tl.int64,
    grad_stride_outer: tl.int64, grad_stride_inner: tl.int64,
    scale, inverse_temperature, ignore_index: tl.int64, vocab_start: tl.int64,
    BLOCK_V: tl.constexpr, LOGPROBS: tl.constexpr, ENTROPY: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """One program per block of a row, which it loads before it stores: grad may be logits."""
    pid = tl.program_id(0)
    n = pid // num_blocks
    first = (pid - n * num_blocks) * BLOCK_V
    offs_v = first + tl.arange(0, BLOCK_V)
    mask_v = offs_v < V
    grad_row_start = row_start(n, inner_size, grad_stride_outer, grad_stride_inner, ALIGNED)
    out_ptr = grad_ptr + grad_row_start + offs_v
    token_id = tl.load(token_ids_ptr + n)
    if token_id == ignore_index:
        tl.store(out_ptr, tl.zeros([BLOCK_V], grad_ptr.dtype.element_ty), mask=mask_v)
        return
    row_ptr = logits_ptr + row_start(n, inner_size, stride_outer, stride_inner, ALIGNED)
    x = tl.load(row_ptr + offs_v, mask=mask_v, other=float("-inf")).to(tl.float32)
    logprob = tl.load(logprobs_ptr + n)
    log_total = tl.load(log_total_ptr + n)
    g, h, entropy = 0.0, 0.0, 0.0
    if LOGPROBS:
        g = tl.load(grad_logprobs_ptr + n)
    if ENTROPY:
        h = tl.load(grad_entropy_ptr + n)
        entropy = tl.load(entropy_ptr + n)
    g = tl.where(logprob == logprob, g, float("nan"))  # an id outside the whole vocabulary
    # -p / T first: of p = 0 it is 0 at any temperature, where a gradient over T could be infinite.
    share = -tl.exp(-log_total) * inverse_temperature
    t = (x - tl.load(row_max_ptr + n)) * scale
    if ENTROPY:
        t = tl.maximum(t, -200.0)  # where 2^t is 0; -inf times 0 would be NaN
        a, b = g + h * (entropy - log_total), h * _LN2
        grad = tl.exp2(t) * share * tl.math.fma(b, t, a)
    else:
        grad = tl.exp2(t) * share * g
    target = token_id - vocab_start - first
    if (target >= 0) & (target < BLOCK_V):
        # From "everything but the target", or p -> 1 would cancel. logprob comes from the forward
        # pass: in place, another program may have overwritten the target's logit.
        p_target = tl.exp(logprob)
        own = -g * expm1(logprob)
        if ENTROPY:
            own -= tl.where(p_target > 0, h * p_target * (logprob + entropy), 0.0)
        is_target = tl.arange(0, BLOCK_V) == target.to(tl.int32)
        grad = tl.where(is_target, own * inverse_temperature, grad)
    tl.store(out_ptr, grad.to(grad_ptr.dtype.element_ty), mask=mask_v)


def token_logprobs_fwd(
    logits: Tensor,
    token_ids: Tensor,
    temperature: float,
    ignore_index: int,
    return_entropy: bool,
    inplace_backward: bool,  # autograd's affair
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """logprobs, entropy ([0] unless asked for), row max, log total: [...] float32 each."""
    logprobs = logits.new_empty(token_ids.shape, dtype=torch.float32)
    entropy = torch.empty_like(logprobs) if return_entropy else logprobs.new_empty(0)
    if token_ids.numel() == 0:
        return logprobs, entropy, torch.empty_like(logprobs), torch.empty_like(logprobs)
    partials = partial_states(logits, token_ids, temperature, ignore_index, return_entropy)
    return logprobs, entropy, *merge(partials, logprobs, entropy, temperature)


def token_logprobs_state(
    logits: Tensor,
    token_ids: Tensor,
    temperature: float,
    ignore_index: int,
    vocab_start: int,
    return_entropy: bool,
) -> Tensor:
    """[N, 6] float64, as fastrl._vocabulary describes it: of a slice of the vocabulary."""
    N, V = token_ids.numel(), logits.shape[-1]
    if N == 0:
        return logits.new_empty((0, _vocabulary.SIZE), dtype=torch.float64)
    partials = partial_states(logits, token_ids, temperature, ignore_index, return_entropy)
    column = token_ids.reshape(-1) - vocab_start
    found = (column >= 0) & (column < V)
    target = logits.gather(-1, column.clamp(0, V - 1).view(*token_ids.shape, 1)).reshape(-1)
    counted = token_ids.reshape(-1) != ignore_index
    if not return_entropy:
        partials["state_ptr"][..., 3] = 0.0
    states = _vocabulary.partial_states(partials["state_ptr"], target, found, counted)
    return _vocabulary.merge_states(states, temperature)


def token_logprobs_bwd(
    grad_logprobs: Tensor | None, grad_entropy: Tensor | None, logits: Tensor, *saved: Any
) -> Tensor:
    """The gradient of logits. saved: as `_backward` lists it."""
    grad = torch.empty_like(logits, memory_format=torch.contiguous_format)
    _backward(grad, grad_logprobs, grad_entropy, logits, *saved)
    return grad


def token_logprobs_bwd_out(
    grad: Tensor,
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
    logits: Tensor,
    *saved: Any,
) -> None:
    """The same, into `grad` [N, V], which may be of a narrower dtype."""
    _backward(grad, grad_logprobs, grad_entropy, logits, *saved)


def token_logprobs_bwd_(
    grad_logprobs: Tensor | None, grad_entropy: Tensor | None, logits: Tensor, *saved: Any
) -> None:
    """The same, over the logits."""
    rows, *_ = rows_of(logits)
    _backward(rows, grad_logprobs, grad_entropy, rows, *saved)
    if rows.data_ptr() != logits.data_ptr():  # their axes did not fold, and they had to be copied
        logits.copy_(rows.view(logits.shape))


def _backward(
    grad: Tensor,
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
    logits: Tensor,
    token_ids: Tensor,
    logprobs: Tensor,
    entropy: Tensor | None,
    row_max: Tensor,
    log_total: Tensor,
    temperature: float,
    ignore_index: int,
    vocab_start: int,
) -> None:
    V, N = logits.shape[-1], token_ids.numel()
    if N == 0:
        return
    source, inner_size, stride_outer, stride_inner = rows_of(logits)
    target, _, grad_stride_outer, grad_stride_inner = rows_of(grad)
    aligned = (stride_outer | stride_inner | grad_stride_outer | grad_stride_inner) % 16 == 0
    block = block_for(V, BACKWARD if aligned else BACKWARD_UNALIGNED)
    num_blocks = triton.cdiv(V, block["BLOCK_V"])
    _token_logprobs_bwd_kernel[(N * num_blocks,)](
        grad_logprobs_ptr=grad_logprobs, grad_entropy_ptr=grad_entropy, logits_ptr=source,
        token_ids_ptr=token_ids, logprobs_ptr=logprobs, entropy_ptr=entropy, row_max_ptr=row_max,
        log_total_ptr=log_total, grad_ptr=target, V=V, num_blocks=num_blocks,
        inner_size=inner_size, stride_outer=stride_outer, stride_inner=stride_inner,
        grad_stride_outer=grad_stride_outer, grad_stride_inner=grad_stride_inner,
        scale=finite(LOG2E / temperature), inverse_temperature=finite(1.0 / temperature),
        ignore_index=ignore_index, vocab_start=vocab_start, LOGPROBS=grad_logprobs is not None,
        ENTROPY=grad_entropy is not None, ALIGNED=aligned, **block, **AS_WRITTEN,
    )  # fmt: skip
