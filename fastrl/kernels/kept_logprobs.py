"""Token log-probabilities over the ids that sampling kept, and their gradient, on a GPU.

    log p_y = (x_y - m) / T - L,    m = max_j x_j,  L = log sum_j exp((x_j - m) / T),  j kept
    entropy = L + sum_j p_j (m - x_j) / T
    d/dx_j  = [g (delta_jy - p_j) - h p_j (log p_j + entropy)] / T    for j kept, and 0 elsewhere

As token_logprobs, over ids[cu_seqlens[i]:cu_seqlens[i + 1]] in row i: one program per row gathers
its logits, with the maximum kept out of the sums. Column k of a block takes each BLOCK_K-th id, and
the columns are added up in a fixed order, so a row does not depend on its batch. The backward pass
fills a dense gradient with zeros and scatters: ids are distinct within a row, so that no entry is
written twice.

Bytes, for K kept ids: forward 8 K, and a sector of 32 for each logit that has no neighbour there;
backward the same twice, and N V b to fill, with b bytes a logit.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastrl.kernels._launch import AS_WRITTEN
from fastrl.kernels._math import LOG2E, expm1, log1p, ordered_sum
from fastrl.kernels._rows import below, finite, row_start, rows_of

# Not measured on a GPU yet. Compiled without spills, which 4 warps have on sm_100 with Triton 3.6.
# Kept sets have tens to thousands of ids.
BLOCK = {"BLOCK_K": 1024, "num_warps": 8}

_RUNTIME = [
    "V", "K", "inner_size", "stride_outer", "stride_inner", "grad_stride", "scale",
    "inverse_temperature", "ignore_index",
]  # fmt: skip
# Gathered, or read once a row: where any of them begins does not matter.
_POINTERS = [
    "grad_logprobs_ptr", "grad_entropy_ptr", "logits_ptr", "token_ids_ptr", "kept_ids_ptr",
    "cu_seqlens_ptr", "logprobs_ptr", "entropy_ptr", "row_max_ptr", "log_total_ptr", "grad_ptr",
]  # fmt: skip


@triton.jit
def _bounds(cu_seqlens_ptr, n, K):
    """The row's stretch of kept_ids, within it whatever cu_seqlens says."""
    first, end = tl.load(cu_seqlens_ptr + n), tl.load(cu_seqlens_ptr + n + 1)
    return tl.maximum(first, 0), tl.minimum(end, K)


@triton.jit(do_not_specialize=_RUNTIME, do_not_specialize_on_alignment=_POINTERS)
def _kept_logprobs_fwd_kernel(
    logits_ptr, token_ids_ptr, kept_ids_ptr, cu_seqlens_ptr,  # [N, V], [N], [K], [N + 1]
    logprobs_ptr, entropy_ptr, row_max_ptr, log_total_ptr,  # -> [N] each
    V: tl.int32, K: tl.int32, inner_size, stride_outer: tl.int64, stride_inner: tl.int64,
    scale, inverse_temperature, ignore_index: tl.int64,
    BLOCK_K: tl.constexpr, ENTROPY: tl.constexpr,
):  # fmt: skip
    """One program per row: (max, rest, count, weighted) of its kept entries, and what they give."""
    n = tl.program_id(0).to(tl.int64)
    token_id = tl.load(token_ids_ptr + n)
    if token_id == ignore_index:
        tl.store(logprobs_ptr + n, 0.0)
        tl.store(row_max_ptr + n, 0.0)
        tl.store(log_total_ptr + n, 0.0)
        if ENTROPY:
            tl.store(entropy_ptr + n, 0.0)
        return
    row_ptr = logits_ptr + row_start(n, inner_size, stride_outer, stride_inner, False)
    first, end = _bounds(cu_seqlens_ptr, n, K)
    m = -3.4028234663852886e38  # a finite floor: a block of -inf must not give inf - inf
    rest = tl.zeros([BLOCK_K], tl.float32)
    count, weighted = rest, rest
    is_target = tl.zeros([BLOCK_K], tl.int32)
    for k0 in tl.range(first, end, BLOCK_K):
        offs_k = k0 + tl.arange(0, BLOCK_K)
        ids = tl.load(kept_ids_ptr + offs_k, mask=offs_k < end, other=-1)
        mask_k = (ids >= 0) & (ids < V)
        x = tl.load(row_ptr + ids, mask=mask_k, other=float("-inf")).to(tl.float32)
        is_target |= (mask_k & (ids == token_id)).to(tl.int32)
        m_new = tl.maximum(m, tl.max(x, axis=0))
        if m_new > m:
            rest, count, weighted = below(m, m_new, rest, count, weighted, scale)
            m = m_new
        d = x - m
        at_max = d == 0.0  # false for inf - inf: +inf and NaN logits reach the sum as NaN
        e = tl.where(at_max, 0.0, tl.exp2(d * scale))
        rest += e
        count += at_max.to(tl.float32)
        if ENTROPY:
            weighted -= tl.where(e > 0, e * d, 0.0)
    rest, count = ordered_sum(rest, BLOCK_K), ordered_sum(count, BLOCK_K)
    log_total = log1p(rest + (count - 1.0))  # -inf where nothing is kept, and then NaN below
    kept = tl.max(is_target, axis=0) > 0
    outside = tl.where((token_id >= 0) & (token_id < V), float("-inf"), float("nan"))
    # Read only where it is kept, so within the row.
    logit = tl.load(row_ptr + token_id, mask=kept, other=0.0).to(tl.float32)
    logprob = (tl.where(kept, logit, outside) - m) * inverse_temperature - log_total
    tl.store(logprobs_ptr + n, logprob)
    tl.store(row_max_ptr + n, m)
    tl.store(log_total_ptr + n, log_total)
    if ENTROPY:
        weighted = ordered_sum(weighted, BLOCK_K)
        entropy = log_total + weighted / (rest + count) * inverse_temperature
        tl.store(entropy_ptr + n, entropy)


@triton.jit(do_not_specialize=_RUNTIME, do_not_specialize_on_alignment=_POINTERS)
def _kept_logprobs_bwd_kernel(
    grad_logprobs_ptr, grad_entropy_ptr, logits_ptr, token_ids_ptr, kept_ids_ptr, cu_seqlens_ptr,
    logprobs_ptr, entropy_ptr, row_max_ptr, log_total_ptr,
    grad_ptr,  # [N, V], zeros -> the gradient
    V: tl.int32, K: tl.int32, inner_size, stride_outer: tl.int64, stride_inner: tl.int64,
    grad_stride: tl.int64, scale, inverse_temperature, ignore_index: tl.int64,
    BLOCK_K: tl.constexpr, LOGPROBS: tl.constexpr, ENTROPY: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    token_id = tl.load(token_ids_ptr + n)
    if token_id == ignore_index:
        return
    row_ptr = logits_ptr + row_start(n, inner_size, stride_outer, stride_inner, False)
    out_ptr = grad_ptr + n * grad_stride
    first, end = _bounds(cu_seqlens_ptr, n, K)
    row_max, log_total = tl.load(row_max_ptr + n), tl.load(log_total_ptr + n)
    logprob = tl.load(logprobs_ptr + n)
    g, h, entropy = 0.0, 0.0, 0.0
    if LOGPROBS:
        g = tl.load(grad_logprobs_ptr + n)
    if ENTROPY:
        h = tl.load(grad_entropy_ptr + n)
        entropy = tl.load(entropy_ptr + n)
    g = tl.where((token_id < 0) | (token_id >= V), float("nan"), g)
    # The target's own entry from "everything but the target", or p -> 1 would cancel.
    p_target = tl.exp(logprob)
    grad_target = -g * expm1(logprob)
    if ENTROPY:
        grad_target -= tl.where(p_target > 0, h * p_target * (logprob + entropy), 0.0)
    inverse_total = tl.exp(-log_total)
    for k0 in tl.range(first, end, BLOCK_K):
        offs_k = k0 + tl.arange(0, BLOCK_K)
        ids = tl.load(kept_ids_ptr + offs_k, mask=offs_k < end, other=-1)
        mask_k = (ids >= 0) & (ids < V)
        x = tl.load(row_ptr + ids, mask=mask_k, other=float("-inf")).to(tl.float32)
        d = x - row_max
        p = tl.exp2(d * scale) * inverse_total
        grad = -g * p
        if ENTROPY:
            log_p = tl.math.fma(d, inverse_temperature, -log_total)
            grad -= tl.where(p > 0, h * p * (log_p + entropy), 0.0)
        grad = tl.where(ids == token_id, grad_target, grad) * inverse_temperature
        tl.store(out_ptr + ids, grad.to(grad_ptr.dtype.element_ty), mask=mask_k)


def kept_logprobs_fwd(
    logits: Tensor,
    token_ids: Tensor,
    kept_ids: Tensor,
    cu_seqlens: Tensor,
    temperature: float,
    ignore_index: int,
    return_entropy: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """logprobs, entropy ([0] unless asked for), row max, log total: [...] float32 each."""
    V, N = logits.shape[-1], token_ids.numel()
    logprobs = logits.new_empty(token_ids.shape, dtype=torch.float32)
    row_max, log_total = torch.empty_like(logprobs), torch.empty_like(logprobs)
    entropy = torch.empty_like(logprobs) if return_entropy else logprobs.new_empty(0)
    if N == 0:
        return logprobs, entropy, row_max, log_total
    source, inner_size, stride_outer, stride_inner = rows_of(logits)
    _kept_logprobs_fwd_kernel[(N,)](
        logits_ptr=source, token_ids_ptr=token_ids, kept_ids_ptr=kept_ids,
        cu_seqlens_ptr=cu_seqlens, logprobs_ptr=logprobs, entropy_ptr=entropy, row_max_ptr=row_max,
        log_total_ptr=log_total, V=V, K=kept_ids.numel(), inner_size=inner_size,
        stride_outer=stride_outer, stride_inner=stride_inner, scale=finite(LOG2E / temperature),
        inverse_temperature=finite(1.0 / temperature), ignore_index=ignore_index,
        ENTROPY=return_entropy, **BLOCK, **AS_WRITTEN,
    )  # fmt: skip
    return logprobs, entropy, row_max, log_total


def kept_logprobs_bwd(
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
    logits: Tensor,
    token_ids: Tensor,
    kept_ids: Tensor,
    cu_seqlens: Tensor,
    logprobs: Tensor,
    entropy: Tensor | None,
    row_max: Tensor,
    log_total: Tensor,
    temperature: float,
    ignore_index: int,
) -> Tensor:
    """The gradient of logits: dense, zero for ids that were not kept."""
    V, N = logits.shape[-1], token_ids.numel()
    grad = logits.new_zeros(logits.shape)
    if N == 0:
        return grad
    source, inner_size, stride_outer, stride_inner = rows_of(logits)
    _kept_logprobs_bwd_kernel[(N,)](
        grad_logprobs_ptr=grad_logprobs, grad_entropy_ptr=grad_entropy, logits_ptr=source,
        token_ids_ptr=token_ids, kept_ids_ptr=kept_ids, cu_seqlens_ptr=cu_seqlens,
        logprobs_ptr=logprobs, entropy_ptr=entropy, row_max_ptr=row_max, log_total_ptr=log_total,
        grad_ptr=grad, V=V, K=kept_ids.numel(), inner_size=inner_size, stride_outer=stride_outer,
        stride_inner=stride_inner, grad_stride=V, scale=finite(LOG2E / temperature),
        inverse_temperature=finite(1.0 / temperature), ignore_index=ignore_index,
        LOGPROBS=grad_logprobs is not None, ENTROPY=grad_entropy is not None, **BLOCK, **AS_WRITTEN,
    )  # fmt: skip
    return grad
