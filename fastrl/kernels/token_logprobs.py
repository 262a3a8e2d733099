"""Token log-probabilities and entropy from logits, and their gradient, on a GPU.

    log p_y = (x_y - m) / T - L,    m = max_j x_j,  L = log sum_j exp((x_j - m) / T)
    entropy = L + sum_j p_j (m - x_j) / T
    d/dx_j  = [g (delta_jy - p_j) - h p_j (log p_j + entropy)] / T

The forward pass reads the logits once. A row is cut into stretches of CHUNK columns, one program
each, and a second small kernel merges their partial states in order: a single row fills the GPU as
a million rows do, and a row's result depends on the vocabulary's size alone, never on its batch.
Nor on its address: what a thread holds of a block follows from the row's alignment, so columns
SUMS apart are summed, and at a stretch's end these sums, in a fixed order. The maximum stays out of
every sum (log1p of the rest), so that p -> 1 keeps its digits. The backward pass reads the logits
once and writes the gradient once, over the logits on request.

Bytes: forward N V b, backward 2 N V b, with b bytes a logit; the partial states are 16 bytes for
each CHUNK columns. While a multiprocessor of an H200 reads a column of bfloat16 it has some 15
instructions of a thread for it. The forward pass takes 11, and 16 in blocks that reach the maximum
so far, as a rule a fifth of them; the backward pass, with twice the time, about 15.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastrl import _vocabulary
from fastrl.kernels._math import LOG2E, expm1, folded, log1p, ordered_sum
from fastrl.kernels._rows import below, finite, row_start, rows_of

# Not measured on a GPU yet. Compiled for sm_90: no spills, 16 bytes a load. SUMS: as many as the
# threads load at once, so that a thread folds what it holds.
CHUNK = 32768
FORWARD = (
    {"BLOCK_V": 1024, "SUMS": 1024, "num_warps": 4},
    {"BLOCK_V": 2048, "SUMS": 512, "num_warps": 2},
)
BACKWARD = ({"BLOCK_V": 1024, "num_warps": 4}, {"BLOCK_V": 4096, "num_warps": 4})
# Of rows off 16-byte bounds each entry has an address, and a thread registers for half as many.
BACKWARD_UNALIGNED = ({"BLOCK_V": 1024, "num_warps": 4}, {"BLOCK_V": 4096, "num_warps": 8})
MERGE = {"BLOCK_N": 128, "num_warps": 4}
_LN2 = tl.constexpr(0.6931471805599453)

# What changes from step to step: neither its value nor its divisors make another kernel. Of the
# strides, which in logits [B, T, V] change with T, ALIGNED says what a kernel needs to know.
_RUNTIME = [
    "N", "num_chunks", "num_blocks", "inner_size", "ignore_index", "vocab_start",
    "stride_outer", "stride_inner", "grad_stride_outer", "grad_stride_inner",
]  # fmt: skip
# Read once a row: where a slice of them begins does not matter.
_OF_A_ROW = [
    "token_ids_ptr", "grad_logprobs_ptr", "grad_entropy_ptr", "logprobs_ptr", "entropy_ptr",
    "row_max_ptr", "log_total_ptr",
]  # fmt: skip


def block_for(vocab: int, blocks: tuple[dict[str, int], ...]) -> dict[str, int]:
    """Configuration of a kernel that walks a row: of the vocabulary's size alone."""
    return blocks[0] if vocab <= blocks[0]["BLOCK_V"] else blocks[1]


@triton.jit
def _with_block(
    x, m, rest, count, weighted, scale,
    BLOCK_V: tl.constexpr, SUMS: tl.constexpr, ENTROPY: tl.constexpr,
):  # fmt: skip
    """The state of the columns so far, and of another block's entries x."""
    top = tl.max(x, axis=0)
    if top > m:
        rest, count, weighted = below(m, top, rest, count, weighted, scale)
        m = top
    d = x - m
    e = tl.exp2(d * scale)
    if top == m:  # no other block has entries that equal m, and most blocks have none
        at_max = (d == 0.0).to(tl.float32)  # 0 for inf - inf: +inf and NaN reach the sum as NaN
        e -= at_max  # 2^0 is 1 to the bit
        count += folded(at_max, BLOCK_V, SUMS)
    rest += folded(e, BLOCK_V, SUMS)
    if ENTROPY:  # where d is -inf, e is 0
        weighted -= folded(e * tl.maximum(d, -3.4028234663852886e38), BLOCK_V, SUMS)
    return m, rest, count, weighted


@triton.jit(do_not_specialize=_RUNTIME, do_not_specialize_on_alignment=_OF_A_ROW)
def _token_logprobs_fwd_kernel(
    logits_ptr, token_ids_ptr, state_ptr,  # [N, V], [N] -> [N, num_chunks, 4]
    V, num_chunks, inner_size, stride_outer: tl.int64, stride_inner: tl.int64,
    scale, ignore_index: tl.int64,
    CHUNK: tl.constexpr, BLOCK_V: tl.constexpr, SUMS: tl.constexpr, ENTROPY: tl.constexpr,
    ALIGNED: tl.constexpr,
):  # fmt: skip
    """One program per stretch of a row: (max, rest, count, weighted) of its entries."""
    pid = tl.program_id(0)
    n = pid // num_chunks
    if tl.load(token_ids_ptr + n) == ignore_index:
        return
    row_ptr = logits_ptr + row_start(n, inner_size, stride_outer, stride_inner, ALIGNED)
    start = (pid - n * num_chunks) * CHUNK
    stop = tl.minimum(start + CHUNK, V)
    tail = start + (stop - start) // BLOCK_V * BLOCK_V
    offs_v = tl.arange(0, BLOCK_V)
    m = -3.4028234663852886e38  # a finite floor: a block of -inf must not give inf - inf
    rest = tl.zeros([SUMS], tl.float32)  # over the columns j, j + SUMS, ..., for each j
    count, weighted = rest, rest
    for v0 in tl.range(start, tail, BLOCK_V, num_stages=3):
        x = tl.load(row_ptr + (v0 + offs_v)).to(tl.float32)
        m, rest, count, weighted = _with_block(
            x, m, rest, count, weighted, scale, BLOCK_V, SUMS, ENTROPY
        )
    if tail < stop:  # apart: a mask is a selection for each entry
        offs_v = tail + offs_v
        x = tl.load(row_ptr + offs_v, mask=offs_v < stop, other=float("-inf")).to(tl.float32)
        m, rest, count, weighted = _with_block(
            x, m, rest, count, weighted, scale, BLOCK_V, SUMS, ENTROPY
        )
    out_ptr = state_ptr + pid.to(tl.int64) * 4
    tl.store(out_ptr, m)
    tl.store(out_ptr + 1, ordered_sum(rest, SUMS))
    tl.store(out_ptr + 2, ordered_sum(count, SUMS))
    if ENTROPY:
        tl.store(out_ptr + 3, ordered_sum(weighted, SUMS))


@triton.jit(do_not_specialize=[*_RUNTIME, "V"], do_not_specialize_on_alignment=_OF_A_ROW)
def _token_logprobs_merge_kernel(
    logits_ptr, token_ids_ptr, state_ptr,
    logprobs_ptr, entropy_ptr, row_max_ptr, log_total_ptr,  # [N] each
    N, V, num_chunks, inner_size, stride_outer: tl.int64, stride_inner: tl.int64,
    scale, inverse_temperature, ignore_index: tl.int64,
    BLOCK_N: tl.constexpr, ENTROPY: tl.constexpr,
):  # fmt: skip
    """Merges each row's stretches, first to last, and writes what the row gives."""
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = n < N
    token_id = tl.load(token_ids_ptr + n, mask=mask_n, other=0)
    counted = mask_n & (token_id != ignore_index)
    m = tl.full([BLOCK_N], -3.4028234663852886e38, tl.float32)
    rest, count, weighted = tl.zeros_like(m), tl.zeros_like(m), tl.zeros_like(m)
    for chunk in range(0, num_chunks):
        at = state_ptr + (n * num_chunks + chunk) * 4
        m_next = tl.load(at, mask=counted, other=-3.4028234663852886e38)
        rest_next = tl.load(at + 1, mask=counted, other=0.0)
        count_next = tl.load(at + 2, mask=counted, other=0.0)
        weighted_next = tl.zeros_like(m)
        if ENTROPY:
            weighted_next = tl.load(at + 3, mask=counted, other=0.0)
        m_new = tl.maximum(m, m_next)
        rest, count, weighted = below(m, m_new, rest, count, weighted, scale)
        rest_next, count_next, weighted_next = below(
            m_next, m_new, rest_next, count_next, weighted_next, scale
        )
        rest, count, weighted = rest + rest_next, count + count_next, weighted + weighted_next
        m = m_new
    log_total = log1p(rest + (count - 1.0))
    # Ids outside [0, V) give NaN: a wild read hides, a host check synchronises.
    in_range = counted & (token_id >= 0) & (token_id < V)
    start_of_row = row_start(n, inner_size, stride_outer, stride_inner, False)
    target_ptr = logits_ptr + start_of_row + token_id
    logit = tl.load(target_ptr, mask=in_range, other=float("nan")).to(tl.float32)
    logprob = (logit - m) * inverse_temperature - log_total
    tl.store(logprobs_ptr + n, tl.where(counted, logprob, 0.0), mask=mask_n)
    if ENTROPY:
        entropy = log_total + weighted / (rest + count) * inverse_temperature
        tl.store(entropy_ptr + n, tl.where(counted, entropy, 0.0), mask=mask_n)
    tl.store(row_max_ptr + n, tl.where(counted, m, 0.0), mask=mask_n)
    tl.store(log_total_ptr + n, tl.where(counted, log_total, 0.0), mask=mask_n)


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
        grad = tl.exp2(t) * share * (a + b * t)
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
    N = token_ids.numel()
    logprobs = logits.new_empty(token_ids.shape, dtype=torch.float32)
    row_max, log_total = torch.empty_like(logprobs), torch.empty_like(logprobs)
    entropy = torch.empty_like(logprobs) if return_entropy else logprobs.new_empty(0)
    if N == 0:
        return logprobs, entropy, row_max, log_total
    shared = _partial_states(logits, token_ids, temperature, ignore_index, return_entropy)
    _token_logprobs_merge_kernel[(triton.cdiv(N, MERGE["BLOCK_N"]),)](
        logprobs_ptr=logprobs, entropy_ptr=entropy, row_max_ptr=row_max, log_total_ptr=log_total,
        N=N, inverse_temperature=finite(1.0 / temperature), **shared, **MERGE,
    )  # fmt: skip
    return logprobs, entropy, row_max, log_total


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
    partials = _partial_states(logits, token_ids, temperature, ignore_index, return_entropy)
    column = token_ids.reshape(-1) - vocab_start
    found = (column >= 0) & (column < V)
    target = logits.gather(-1, column.clamp(0, V - 1).view(*token_ids.shape, 1)).reshape(-1)
    counted = token_ids.reshape(-1) != ignore_index
    if not return_entropy:
        partials["state_ptr"][..., 3] = 0.0
    states = _vocabulary.partial_states(partials["state_ptr"], target, found, counted)
    return _vocabulary.merge_states(states, temperature)


def _partial_states(
    logits: Tensor, token_ids: Tensor, temperature: float, ignore_index: int, return_entropy: bool
) -> dict[str, Any]:
    """Launches the pass over the logits; returns what the merge takes as well."""
    V, N = logits.shape[-1], token_ids.numel()
    source, inner_size, stride_outer, stride_inner = rows_of(logits)
    num_chunks = triton.cdiv(V, CHUNK)
    state = logits.new_empty((N, num_chunks, 4), dtype=torch.float32)
    shared = dict(
        logits_ptr=source, token_ids_ptr=token_ids, state_ptr=state, V=V, num_chunks=num_chunks,
        inner_size=inner_size, stride_outer=stride_outer, stride_inner=stride_inner,
        scale=finite(LOG2E / temperature), ignore_index=ignore_index, ENTROPY=return_entropy,
    )  # fmt: skip
    aligned = (stride_outer | stride_inner) % 16 == 0  # both are
    _token_logprobs_fwd_kernel[(N * num_chunks,)](
        CHUNK=CHUNK, ALIGNED=aligned, **shared, **block_for(V, FORWARD)
    )
    return shared


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
        ENTROPY=grad_entropy is not None, ALIGNED=aligned, **block,
    )  # fmt: skip
