"""The sums of rows of logits that make their log-probabilities, on a GPU: in one pass over them.

A row is cut into stretches of CHUNK columns, one program each, and a second small kernel merges
their partial states in order: a few rows are shared out, too, and a row's result depends on the
vocabulary's size alone, never on its batch. Nor on its address: what a thread holds of a block
follows from the row's alignment, so columns SUMS apart are summed, and at a stretch's end these
sums, in a fixed order. The maximum stays out of every sum (log1p of the rest), so that p -> 1 keeps
its digits.

Bytes: N V b, with b bytes a logit; the partial states are 16 bytes for each CHUNK columns. While a
multiprocessor of an H200 reads a column of bfloat16 it has some 15 instructions of a thread for it.
The pass takes 11, and 16 in blocks that reach the maximum so far, as a rule a fifth of them.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastrl.kernels._launch import AS_WRITTEN
from fastrl.kernels._math import LOG2E, folded, folded_products, log1p, ordered_sum
from fastrl.kernels._rows import below, block_for, finite, row_start, rows_of

# Not measured on a GPU yet. Compiled for sm_90: no spills, 16 bytes a load. SUMS: as many as the
# threads load at once, so that a thread folds what it holds.
CHUNK = 32768
FORWARD = (
    {"BLOCK_V": 1024, "SUMS": 1024, "num_warps": 4},
    {"BLOCK_V": 2048, "SUMS": 512, "num_warps": 2},
)
MERGE = {"BLOCK_N": 128, "num_warps": 4}

# What changes from step to step: neither its value nor its divisors make another kernel. Of the
# strides, which in logits [B, T, V] change with T, ALIGNED says what a kernel needs to know.
_RUNTIME = ["N", "num_chunks", "inner_size", "ignore_index", "stride_outer", "stride_inner"]
# Read once a row: where a slice of them begins does not matter.
_OF_A_ROW = [
    "token_ids_ptr", "logprobs_ptr", "entropy_ptr", "row_max_ptr", "log_total_ptr",
]  # fmt: skip


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
        weighted -= folded_products(e, tl.maximum(d, -3.4028234663852886e38), BLOCK_V, SUMS)
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


def partial_states(
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
        CHUNK=CHUNK, ALIGNED=aligned, **shared, **block_for(V, FORWARD), **AS_WRITTEN
    )
    return shared


def merge(
    partials: dict[str, Any], logprobs: Tensor, entropy: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """Fills logprobs, and entropy where partial_states was asked for it; row max, log total."""
    N = logprobs.numel()
    row_max, log_total = torch.empty_like(logprobs), torch.empty_like(logprobs)
    _token_logprobs_merge_kernel[(triton.cdiv(N, MERGE["BLOCK_N"]),)](
        logprobs_ptr=logprobs, entropy_ptr=entropy, row_max_ptr=row_max, log_total_ptr=log_total,
        N=N, inverse_temperature=finite(1.0 / temperature), **partials, **MERGE, **AS_WRITTEN,
    )  # fmt: skip
    return row_max, log_total
