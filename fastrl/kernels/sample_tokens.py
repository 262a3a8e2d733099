"""Sampling tokens from logits, cut by top_k and top_p without sorting, on a GPU.

    token  = min {j : sum_{i <= j, i kept} w_i > u sum_{i kept} w_i},   w_i = exp((x_i - m) / T)
    kept   = {j : x_j > lowest, or x_j = lowest and j <= last_id}

The pass of token_logprobs reads the logits and leaves (max, rest, count) of each stretch of CHUNK
columns: enough to tell in which stretch u falls, which is then walked again, and enough for the
log-probability, so that it is that of token_logprobs to the bit. u is one number of Philox-4x32-10.

Weights are added as integers: a row's draw depends neither on its batch nor on its address. What
top_k and top_p keep is found before the draw (_truncation.py), which then walks the whole row.

kept_ids writes such a set out, a program for each stretch of a row: it counts, and writes once the
counts are added up. How much there is to write the host must know: the one op here that waits for
the GPU.

Bytes: N V b from memory, b a logit, and a stretch again; truncated, the passes from L2 on top.
kept_ids: 2 N V b, and 8 for each id.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastrl.kernels._launch import AS_WRITTEN
from fastrl.kernels._row_states import CHUNK, merge, partial_states
from fastrl.kernels._rows import row_start, rows_of
from fastrl.kernels._truncation import ONE, is_kept, truncate, weight

# Not measured on a GPU yet. Compiled for sm_90: no spills. One program works on a row, with 4
# columns a thread: to truncate it holds 7 sums of 64 bits for each of them.
DRAW = {"BLOCK_V": 2048, "num_warps": 16}
TRUNCATE_AND_DRAW = {"BLOCK_V": 1024, "num_warps": 8}
KEPT_IDS = {"BLOCK_V": 2048, "num_warps": 8}
_CHUNK = tl.constexpr(CHUNK)

_RUNTIME = [
    "V", "num_chunks", "inner_size", "stride_outer", "stride_inner", "scale", "step_low",
    "step_high", "top_k", "top_p", "greedy",
]  # fmt: skip
_KEPT_RUNTIME = ["V", "num_chunks", "inner_size", "stride_outer", "stride_inner"]
_OF_A_ROW = ["seeds_ptr", "state_ptr", "token_ids_ptr", "lowest_ptr", "last_id_ptr"]
_KEPT_POINTERS = ["logits_ptr", "lowest_ptr", "last_id_ptr", "counts_ptr", "ends_ptr", "ids_ptr"]


@triton.jit
def _uniform(seed, step_low, step_high):
    """24 random bits of the stream that seed names, at position step, given by its words."""
    low, high = step_low.to(tl.uint32, bitcast=True), step_high.to(tl.uint32, bitcast=True)
    word, _, _, _ = tl.philox(seed, low, high, low * 0, low * 0)
    return (word >> 8).to(tl.int64)


@triton.jit
def _first_beyond(
    row_ptr, start, stop, lowest, last_id, target, m, scale, BLOCK_V: tl.constexpr
):  # fmt: skip
    """The first id kept in [start, stop) up to which the weights exceed target; where they end
    before, the last one of any weight, and -1 without any."""
    found = tl.full([], -1, tl.int32)
    before = tl.full([], 0, tl.int64)
    last = tl.full([BLOCK_V], -1, tl.int32)
    for v0 in tl.range(start, stop, BLOCK_V):
        if found < 0:
            offs_v = v0 + tl.arange(0, BLOCK_V)
            x = tl.load(row_ptr + offs_v, mask=offs_v < stop, other=float("-inf")).to(tl.float32)
            kept = is_kept(x, offs_v, lowest, last_id)
            mass = tl.where(kept, weight(x, m, scale), 0)
            last = tl.where(mass > 0, offs_v, last)
            upto = before + tl.sum(mass)
            if upto > target:
                beyond = before + tl.cumsum(mass, axis=0) > target
                found = tl.min(tl.where(beyond, offs_v, stop))
            before = upto
    return tl.where(found < 0, tl.max(last), found)


@triton.jit
def _stretch_total(at, m, scale):
    """Weight of a stretch relative to m, from that relative to its own maximum."""
    return (tl.load(at + 1) + tl.load(at + 2)) * tl.exp2((tl.load(at) - m) * scale)


@triton.jit
def _stretch_of(state_ptr, num_chunks, m, scale, row_total, u, greedy):
    """The stretch in which the draw falls, its maximum, and the weight in it to be exceeded."""
    found, reference, reached = 0, m, 0
    rest, before = tl.full([], 0.0, tl.float64), tl.full([], 0.0, tl.float64)
    aim = row_total * (u.to(tl.float64) * (1.0 / 16777216))
    for chunk in range(0, num_chunks):
        at = state_ptr + chunk * 4
        chunk_max = tl.load(at)
        total = _stretch_total(at, m, scale)
        # Subnormal numbers are nothing here: u = 0, one draw in 2^24, would find the first of them.
        eligible = tl.where(greedy != 0, chunk_max == m, total >= 1.1754943508222875e-38)
        if eligible & (reached == 0):
            found, reference = chunk, chunk_max  # the last one where rounding leaves none beyond
            rest = (aim - before) * tl.exp2((m - chunk_max) * scale).to(tl.float64)
            before += total.to(tl.float64)
            reached = ((greedy != 0) | (before > aim)).to(tl.int32)
    # A stretch weighs no more than its columns; NaN becomes some number.
    rest = tl.minimum(tl.maximum(rest, 0.0), 1.0 * _CHUNK)
    return found, reference, (rest * ONE).to(tl.int64)


@triton.jit(do_not_specialize=_RUNTIME, do_not_specialize_on_alignment=_OF_A_ROW)
def _sample_tokens_kernel(
    logits_ptr, seeds_ptr, state_ptr,  # [N, V], [N], [N, num_chunks, 4]
    token_ids_ptr, lowest_ptr, last_id_ptr,  # [N] each
    V: tl.int32, num_chunks: tl.int32, inner_size, stride_outer: tl.int64, stride_inner: tl.int64,
    scale, step_low: tl.int32, step_high: tl.int32, top_k: tl.int32, top_p,
    greedy: tl.int32, BLOCK_V: tl.constexpr, TRUNCATE: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """One program per row: which ids are kept, and which one is drawn."""
    n = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row_start(n, inner_size, stride_outer, stride_inner, ALIGNED)
    size = V
    if ALIGNED:
        size = (V // 16) * 16  # is V, and tells so
    state_ptr += n * num_chunks * 4
    m = -3.4028234663852886e38
    for chunk in range(0, num_chunks):
        m = tl.maximum(m, tl.load(state_ptr + chunk * 4))
    row_total = tl.full([], 0.0, tl.float64)
    for chunk in range(0, num_chunks):
        row_total += _stretch_total(state_ptr + chunk * 4, m, scale).to(tl.float64)
    is_distribution = (row_total > 0) & (row_total < float("inf"))  # false for NaN
    lowest = tl.where(is_distribution, float("-inf"), float("nan"))  # NaN: nothing is kept
    last_id = tl.full([], -1, tl.int32)
    u = _uniform(tl.load(seeds_ptr + n), step_low, step_high)
    if TRUNCATE:
        start, stop, reference = 0, size, m
        total = tl.full([], 0, tl.int64)
        if is_distribution:
            lowest, last_id, total = truncate(row_ptr, size, V, m, scale, top_k, top_p, BLOCK_V)
        target = u * (total >> 24) + ((u * (total & 0xFFFFFF)) >> 24)  # u is a number of 24 bits
    else:
        chunk, reference, target = _stretch_of(
            state_ptr, num_chunks, m, scale, row_total, u, greedy
        )
        start = chunk * _CHUNK
        stop = tl.minimum(start + _CHUNK, size)
    tl.store(lowest_ptr + n, lowest)
    tl.store(last_id_ptr + n, last_id.to(tl.int64))
    if not TRUNCATE:
        lowest = float("-inf")  # a row without a distribution gives any id
    if greedy != 0:
        lowest, last_id, target = m, V, tl.full([], 0, tl.int64)  # the first that equals m
    token_id = _first_beyond(
        row_ptr, start, stop, lowest, last_id, target, reference, scale, BLOCK_V
    )
    # Without anything to draw some id of the vocabulary, whose log-probability will be NaN.
    tl.store(token_ids_ptr + n, tl.maximum(token_id, 0).to(tl.int64))


@triton.jit(do_not_specialize=_KEPT_RUNTIME, do_not_specialize_on_alignment=_KEPT_POINTERS)
def _kept_count_kernel(
    logits_ptr, lowest_ptr, last_id_ptr, counts_ptr,  # [N, V], [N] each -> [N, num_chunks]
    V: tl.int32, num_chunks: tl.int32, inner_size, stride_outer: tl.int64, stride_inner: tl.int64,
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    n, start = pid // num_chunks, (pid % num_chunks).to(tl.int32) * _CHUNK
    row_ptr = logits_ptr + row_start(n, inner_size, stride_outer, stride_inner, False)
    lowest, last_id = tl.load(lowest_ptr + n), tl.load(last_id_ptr + n)
    stop = tl.minimum(start + _CHUNK, V)
    count = tl.zeros([BLOCK_V], tl.int32)
    for v0 in tl.range(start, stop, BLOCK_V):
        offs_v = v0 + tl.arange(0, BLOCK_V)
        x = tl.load(row_ptr + offs_v, mask=offs_v < stop, other=float("-inf")).to(tl.float32)
        count += is_kept(x, offs_v, lowest, last_id).to(tl.int32)
    tl.store(counts_ptr + pid, tl.sum(count))


@triton.jit(do_not_specialize=_KEPT_RUNTIME, do_not_specialize_on_alignment=_KEPT_POINTERS)
def _kept_write_kernel(
    logits_ptr, lowest_ptr, last_id_ptr, counts_ptr, ends_ptr,  # ... counts and their running sum
    ids_ptr,  # -> [K]
    V: tl.int32, num_chunks: tl.int32, inner_size, stride_outer: tl.int64, stride_inner: tl.int64,
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    n, start = pid // num_chunks, (pid % num_chunks).to(tl.int32) * _CHUNK
    row_ptr = logits_ptr + row_start(n, inner_size, stride_outer, stride_inner, False)
    lowest, last_id = tl.load(lowest_ptr + n), tl.load(last_id_ptr + n)
    stop = tl.minimum(start + _CHUNK, V)
    remaining = tl.load(counts_ptr + pid)
    ids_ptr += tl.load(ends_ptr + pid) - remaining
    for v0 in tl.range(start, stop, BLOCK_V):
        if remaining > 0:
            offs_v = v0 + tl.arange(0, BLOCK_V)
            x = tl.load(row_ptr + offs_v, mask=offs_v < stop, other=float("-inf")).to(tl.float32)
            kept = is_kept(x, offs_v, lowest, last_id)
            rank = tl.cumsum(kept.to(tl.int32), axis=0)
            tl.store(ids_ptr + (rank - 1), offs_v.to(tl.int64), mask=kept)
            count = tl.sum(kept.to(tl.int32))
            ids_ptr += count
            remaining -= count


def signed_word(x: int) -> int:
    """The low 32 bits of x, as the int32 that they make up."""
    return ((x & 0xFFFFFFFF) ^ 2**31) - 2**31


def sample_tokens(
    logits: Tensor,
    seeds: Tensor,
    step: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """token_ids int64, logprobs float32, lowest float32, last_id int64: [...] each.

    step is the two's complement of a number in [0, 2^64). Without truncation lowest is -inf and
    last_id -1; in a row without a distribution lowest is NaN: nothing is kept.
    """
    V, N = logits.shape[-1], seeds.numel()
    seeds = seeds.contiguous()
    token_ids = torch.zeros_like(seeds)  # no row is to be ignored in the first pass
    logprobs = torch.empty_like(seeds, dtype=torch.float32)
    lowest, last_id = torch.empty_like(logprobs), torch.empty_like(seeds)
    if N == 0:
        return token_ids, logprobs, lowest, last_id
    scaled_by = temperature if temperature > 0 else 1.0
    partials = partial_states(logits, token_ids, scaled_by, -1, False)
    shared = {k: v for k, v in partials.items() if k not in ("ignore_index", "ENTROPY")}
    aligned = (shared["stride_outer"] | shared["stride_inner"] | V) % 16 == 0
    top_k = V if top_k is None else min(top_k, V)
    top_p = 1.0 if top_p is None else float(top_p)
    truncates = top_k < V or top_p < 1
    _sample_tokens_kernel[(N,)](
        seeds_ptr=seeds, lowest_ptr=lowest, last_id_ptr=last_id,
        step_low=signed_word(step), step_high=signed_word(step >> 32), top_k=top_k, top_p=top_p,
        greedy=int(temperature == 0), TRUNCATE=truncates,
        ALIGNED=aligned, **shared, **(TRUNCATE_AND_DRAW if truncates else DRAW),
        **AS_WRITTEN,
    )  # fmt: skip
    merge(partials, logprobs, logprobs, scaled_by)
    return token_ids, logprobs, lowest, last_id


def kept_ids(logits: Tensor, lowest: Tensor, last_id: Tensor) -> tuple[Tensor, Tensor]:
    """ids int64 [K], ascending within a row; cu_seqlens int32 [rows + 1]. Waits for the GPU."""
    V, N = logits.shape[-1], lowest.numel()
    cu_seqlens = last_id.new_zeros(N + 1, dtype=torch.int32)
    if N == 0:
        return last_id.new_empty(0), cu_seqlens
    source, inner_size, stride_outer, stride_inner = rows_of(logits)
    num_chunks = triton.cdiv(V, CHUNK)
    counts = cu_seqlens.new_zeros((N, num_chunks))
    shared = dict(
        logits_ptr=source, lowest_ptr=lowest, last_id_ptr=last_id, counts_ptr=counts, V=V,
        num_chunks=num_chunks, inner_size=inner_size, stride_outer=stride_outer,
        stride_inner=stride_inner, **KEPT_IDS, **AS_WRITTEN,
    )  # fmt: skip
    _kept_count_kernel[(N * num_chunks,)](**shared)
    ends = counts.view(-1).cumsum(0)
    total = int(ends[-1])
    if total >= 2**31:
        raise ValueError(
            f"kept_ids: expected fewer than 2^31 kept ids, which cu_seqlens int32 can count, got "
            f"{total}. Pass fewer rows at once."
        )
    cu_seqlens[1:] = ends[num_chunks - 1 :: num_chunks]
    ids = last_id.new_empty(total)
    _kept_write_kernel[(N * num_chunks,)](ends_ptr=ends, ids_ptr=ids, **shared)
    return ids, cu_seqlens
