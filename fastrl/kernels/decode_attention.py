"""Attention of a few new tokens a row to its cache and to a prompt that rows share, on a GPU.

    output_i = sum_j softmax_j(s_ij) value_j,    s_ij = scale <query_i, key_j>

The keys of each prefix, and each row's own, are cut into chunks of a fixed length from where they
start. A program takes one chunk, one head of keys and a tile of the queries that see them: of a
prefix those of many rows, so that its keys are read once for all of them; of a row's own keys the
queries of the heads that share them. It leaves a maximum, a sum and a weighted sum of values, which
a second kernel merges in the order of the chunks. Where chunks begin, and what is done to a query,
follows from its own row alone; what it does not see has the weight 0 exactly. So its result does
not depend on the other rows, to the bit.

How many keys there are only the GPU knows: as many programs start as the tensors have room for, and
those whose chunk no query sees return at once.

Bytes: 2 Hkv D b for each key that exists, once a prefix and once a row, b a number; partial sums
are 8 (D + 2) bytes for each query and chunk.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastrl.kernels._caches import aligned, bound, first_row, first_tile, own_keys, prefix_of, sees
from fastrl.kernels._launch import AS_WRITTEN
from fastrl.kernels._math import LOG2E, ordered_sums, tanh

# Keys in a chunk, and queries of a prefix that a program takes. Not measured on a GPU yet: enough
# keys that the partial sums are few beside what is read, and few enough that one row fills a GPU.
OWN_CHUNK = 256
PREFIX_CHUNK = 512
NO_WINDOW = 2**30  # more positions than there are
_SEARCH = 20  # steps: 2^20 prefixes

_FLOOR = tl.constexpr(-3.0e38)  # finite: before a query's first key, floor - floor is 0
_LOG2E = tl.constexpr(LOG2E)
_RUNTIME = [
    "B", "Hkv", "T", "S", "own_size", "P", "num_tiles", "tiles_per_row", "num_chunks",
    "first_chunk", "window", "stride_q_b", "stride_q_h", "stride_q_t", "stride_k_b",
    "stride_k_h", "stride_k_s", "stride_v_b", "stride_v_h", "stride_v_s",
]  # fmt: skip
_MERGE_RUNTIME = ["B", "Hq", "T", "S", "Sp", "P", "first_own_chunk", "window"]
# A number or two of each are read; where a slice of them begins does not matter.
_BOUNDS = ["key_start_ptr", "key_end_ptr", "prefix_end_ptr", "prefix_cu_rows_ptr"]


def config_for(itemsize: int, num_queries: int, block_d: int) -> dict[str, int]:
    """Configuration of the kernel that reads keys. num_queries: that may share a program.

    Not measured on a GPU yet. Compiled for sm_80, sm_90 and sm_100 without spills, and with its
    stages in the shared memory of each.
    """
    few = num_queries <= 16
    if itemsize == 4:  # products without the matrix unit: what a thread holds decides
        keys = 32 if block_d <= 64 else 16
        return {"BLOCK_M": 16, "BLOCK_N": keys, "num_warps": 8, "num_stages": 2}
    if block_d > 128:
        tiles = {"BLOCK_M": 16, "num_stages": 3} if few else {"BLOCK_M": 32, "num_stages": 2}
        return {"BLOCK_N": 32, "num_warps": 4, **tiles}
    if few:
        return {"BLOCK_M": 16, "BLOCK_N": 64, "num_warps": 4, "num_stages": 3}
    return {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 8, "num_stages": 3}


@triton.jit(do_not_specialize=_RUNTIME, do_not_specialize_on_alignment=_BOUNDS)
def _decode_attention_chunk_kernel(
    query_ptr, key_ptr, value_ptr,  # [B, Hq, T, D]; [B, Hkv, S, D], or of prefixes [P, Hkv, S, D]
    key_start_ptr, key_end_ptr, prefix_end_ptr, prefix_cu_rows_ptr,  # [B], [B], [P], [P + 1] | None
    sums_ptr, states_ptr,  # -> [chunks, B Hq T, D], [chunks, B Hq T, 2]
    B: tl.int32, Hkv: tl.int32, T: tl.int32, S: tl.int32, own_size: tl.int32, P: tl.int32,
    num_tiles: tl.int32, tiles_per_row: tl.int32, num_chunks: tl.int32, first_chunk: tl.int32,
    window: tl.int32,
    stride_q_b: tl.int64, stride_q_h: tl.int64, stride_q_t: tl.int64,
    stride_k_b: tl.int64, stride_k_h: tl.int64, stride_k_s: tl.int64,
    stride_v_b: tl.int64, stride_v_h: tl.int64, stride_v_s: tl.int64,
    scale, softcap,
    G: tl.constexpr, D: tl.constexpr, CHUNK: tl.constexpr, PREFIX: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr,
    SOFTCAP: tl.constexpr, ALIGNED: tl.constexpr, SEARCH: tl.constexpr,
):  # fmt: skip
    """One program per chunk of keys, head of keys and tile of queries; the tiles of a chunk side by
    side, so that they find its keys in the cache."""
    pid = tl.program_id(0)
    tile, chunk = pid % num_tiles, pid // num_tiles % num_chunks
    head = pid // num_tiles // num_chunks
    per_row = G * T
    if PREFIX:
        source = prefix_of(prefix_cu_rows_ptr, tile, B, P, per_row, BLOCK_M, False, SEARCH)
        block = tile - first_tile(prefix_cu_rows_ptr, source, B, P, per_row, BLOCK_M)
        row = first_row(prefix_cu_rows_ptr, source, B, P)
        rows = first_row(prefix_cu_rows_ptr, source + 1, B, P) - row
    else:
        source, block = tile // tiles_per_row, tile % tiles_per_row
        row, rows = source, 1
    m = block * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = m < rows * per_row
    b, g, t = row + m // per_row, m % per_row // T, m % T
    start, own = own_keys(key_start_ptr, key_end_ptr, b, mask_m, own_size)
    shared = S
    first_key = tl.full([], 0, tl.int32)
    if PREFIX:
        if prefix_end_ptr is not None:
            shared = bound(prefix_end_ptr, source, source >= 0, S)
    else:
        first_key = tl.max(start)  # of one row
    low, high = sees(shared, own, t, T, window, PREFIX)
    high = tl.where(mask_m, high, 0)
    low = tl.where(low < high, low, 2147483647)
    begin, end = chunk * CHUNK, tl.minimum(chunk * CHUNK + CHUNK, tl.max(high))
    begin += tl.maximum(tl.min(low) - begin, 0) // BLOCK_N * BLOCK_N
    if begin >= end:
        return
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    q_rows = b * stride_q_b + (head * G + g) * stride_q_h + t * stride_q_t
    q_rows = aligned(q_rows, ALIGNED)
    q = tl.load(
        query_ptr + q_rows[:, None] + offs_d[None, :],
        mask=mask_m[:, None] & mask_d[None, :], other=0.0,
    )  # fmt: skip
    step_k, step_v = aligned(stride_k_s, ALIGNED), aligned(stride_v_s, ALIGNED)
    key_ptr += aligned(source * stride_k_b + head * stride_k_h + first_key * step_k, ALIGNED)
    value_ptr += aligned(source * stride_v_b + head * stride_v_h + first_key * step_v, ALIGNED)
    top = tl.full([BLOCK_M], _FLOOR, tl.float32)
    weights = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)  # summed at the end, in a fixed order
    sums = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for n0 in tl.range(begin, end, BLOCK_N, num_stages=STAGES):
        offs_n = n0 + tl.arange(0, BLOCK_N)
        mask_n = offs_n < end
        k = tl.load(
            key_ptr + offs_n[None, :] * step_k + offs_d[:, None],
            mask=mask_n[None, :] & mask_d[:, None], other=0.0,
        )  # fmt: skip
        s = tl.dot(q, k, input_precision="ieee") * scale
        if SOFTCAP:
            s = tanh(s / softcap) * softcap
        s *= _LOG2E
        s = tl.where((offs_n >= low[:, None]) & (offs_n < high[:, None]), s, float("-inf"))
        new_top = tl.maximum(top, tl.max(s, axis=1))
        shrink = tl.exp2(top - new_top)[:, None]
        w = tl.exp2(s - new_top[:, None])
        v = tl.load(
            value_ptr + offs_n[:, None] * step_v + offs_d[None, :],
            mask=mask_n[:, None] & mask_d[None, :], other=0.0,
        )  # fmt: skip
        weights = tl.math.fma(weights, shrink, w)
        sums = tl.dot(w.to(v.dtype), v, sums * shrink, input_precision="ieee")
        top = new_top
    index = ((b * Hkv + head) * G + g) * T + t
    index = (first_chunk + chunk).to(tl.int64) * (B * Hkv * per_row) + index
    tl.store(states_ptr + index * 2, top, mask=mask_m)
    tl.store(states_ptr + index * 2 + 1, ordered_sums(weights, BLOCK_M, BLOCK_N), mask=mask_m)
    out_ptr = sums_ptr + index[:, None] * D + offs_d[None, :]
    tl.store(out_ptr, sums, mask=mask_m[:, None] & mask_d[None, :])


@triton.jit
def _add_chunks(
    sums_ptr, states_ptr, index, count, low, high, first_chunk, top, total, sums, offs_d,
    D: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """The partial sums of the chunks in which a query sees keys from low to high, in order."""
    for chunk in range(low // CHUNK, tl.where(low < high, (high + CHUNK - 1) // CHUNK, 0)):
        at = (first_chunk + chunk) * count + index
        part_top = tl.load(states_ptr + at * 2)
        part_total = tl.load(states_ptr + at * 2 + 1)
        part = tl.load(sums_ptr + at * D + offs_d, mask=offs_d < D, other=0.0)
        new_top = tl.maximum(top, part_top)
        shrink, weight = tl.exp2(top - new_top), tl.exp2(part_top - new_top)
        total = tl.math.fma(total, shrink, part_total * weight)
        sums = tl.math.fma(sums, shrink, part * weight)
        top = new_top
    return top, total, sums


@triton.jit(do_not_specialize=_MERGE_RUNTIME, do_not_specialize_on_alignment=_BOUNDS)
def _decode_attention_merge_kernel(
    sums_ptr, states_ptr,  # [chunks, B Hq T, D], [chunks, B Hq T, 2]
    key_start_ptr, key_end_ptr, prefix_end_ptr, prefix_cu_rows_ptr,
    output_ptr, lse_ptr,  # -> [B, Hq, T, D], [B, Hq, T]
    B: tl.int32, Hq: tl.int32, T: tl.int32, S: tl.int32, Sp: tl.int32, P: tl.int32,
    first_own_chunk: tl.int32, window: tl.int32,
    D: tl.constexpr, BLOCK_D: tl.constexpr, PREFIX: tl.constexpr,
    OWN_CHUNK: tl.constexpr, PREFIX_CHUNK: tl.constexpr, SEARCH: tl.constexpr,
):  # fmt: skip
    """One program per query: its chunks, those of the prefix first."""
    index = tl.program_id(0)
    b, t = index // (Hq * T), index % T
    count = (B * Hq * T).to(tl.int64)  # times the chunks it may exceed int32
    _, own = own_keys(key_start_ptr, key_end_ptr, b, b >= 0, S)
    offs_d = tl.arange(0, BLOCK_D)
    top, total = tl.full([], _FLOOR, tl.float32), tl.full([], 0.0, tl.float32)
    sums = tl.zeros([BLOCK_D], tl.float32)
    if PREFIX:
        shared = Sp
        if prefix_end_ptr is not None:
            p = prefix_of(prefix_cu_rows_ptr, b, B, P, 0, 1, True, SEARCH)
            shared = bound(prefix_end_ptr, p, p >= 0, Sp)
        low, high = sees(shared, own, t, T, window, True)
        top, total, sums = _add_chunks(
            sums_ptr, states_ptr, index, count, low, high, 0, top, total, sums, offs_d,
            D, PREFIX_CHUNK,
        )  # fmt: skip
        seen = tl.maximum(high - low, 0)
    else:
        seen = tl.full([], 0, tl.int32)
    low, high = sees(0, own, t, T, window, False)
    top, total, sums = _add_chunks(
        sums_ptr, states_ptr, index, count, low, high, first_own_chunk, top, total, sums, offs_d,
        D, OWN_CHUNK,
    )  # fmt: skip
    seen += tl.maximum(high - low, 0)
    output = tl.where(seen > 0, sums / total, 0.0)
    lse = tl.where(seen > 0, (top + tl.log2(total)) / _LOG2E, float("-inf"))
    out_ptr = output_ptr + index.to(tl.int64) * D + offs_d
    tl.store(out_ptr, output.to(output_ptr.dtype.element_ty), mask=offs_d < D)
    tl.store(lse_ptr + index, lse)


def _launch_chunks(
    query: Tensor, key: Tensor, value: Tensor, *, is_prefix: bool, **shared: Any
) -> None:
    batch, query_heads, queries, _ = query.shape
    source_rows, key_heads, num_keys, _ = key.shape
    if key.numel() == 0:
        return
    group, chunk = query_heads // key_heads, PREFIX_CHUNK if is_prefix else OWN_CHUNK
    # Of a prefix always the largest block: how many rows share it must not change a bit.
    sharing = 64 if is_prefix else group * queries
    config = config_for(query.element_size(), sharing, shared["BLOCK_D"])
    tiles_per_row = triton.cdiv(group * queries, config["BLOCK_M"])
    tiles = batch * tiles_per_row
    if is_prefix:
        tiles = batch * group * queries // config["BLOCK_M"] + source_rows
    num_chunks = triton.cdiv(num_keys, chunk)
    strides = {
        f"stride_{name}_{axis}": stride
        for name, x, axes in (("q", query, "bht"), ("k", key, "bhs"), ("v", value, "bhs"))
        for axis, stride in zip(axes, x.stride(), strict=False)
    }
    _decode_attention_chunk_kernel[(tiles * num_chunks * key_heads,)](
        query_ptr=query, key_ptr=key, value_ptr=value, Hkv=key_heads, S=num_keys,
        num_tiles=tiles, tiles_per_row=tiles_per_row, num_chunks=num_chunks, G=group, CHUNK=chunk,
        PREFIX=is_prefix, STAGES=config["num_stages"],
        ALIGNED=all(stride % 16 == 0 for stride in strides.values()), **strides, **shared, **config,
        **AS_WRITTEN,
    )  # fmt: skip


def decode_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_start: Tensor | None,
    key_end: Tensor | None,
    prefix_key: Tensor | None,
    prefix_value: Tensor | None,
    prefix_end: Tensor | None,
    prefix_cu_rows: Tensor | None,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """output [B, Hq, T, D] like query, lse [B, Hq, T] float32. The last axes must be dense."""
    batch, query_heads, queries, width = query.shape
    output = query.new_empty(query.shape)
    lse = query.new_empty(query.shape[:-1], dtype=torch.float32)
    if lse.numel() == 0:
        return output, lse
    prefixes, num_shared = (0, 0) if prefix_key is None else prefix_key.shape[::2]
    shared_chunks = triton.cdiv(num_shared, PREFIX_CHUNK)
    num_chunks = shared_chunks + triton.cdiv(key.shape[2], OWN_CHUNK)
    sums = query.new_empty((num_chunks, lse.numel(), width), dtype=torch.float32)
    states = sums.new_empty((num_chunks, lse.numel(), 2))
    of_rows = dict(
        sums_ptr=sums, states_ptr=states, key_start_ptr=key_start, key_end_ptr=key_end, B=batch,
        T=queries, window=NO_WINDOW if window is None else min(window, NO_WINDOW), D=width,
        BLOCK_D=max(32, triton.next_power_of_2(width)),
    )  # fmt: skip
    of_prefixes = dict(
        prefix_end_ptr=prefix_end, prefix_cu_rows_ptr=prefix_cu_rows, P=prefixes,
        SEARCH=0 if prefixes <= 1 else _SEARCH,
    )  # fmt: skip
    common = dict(
        own_size=key.shape[2], scale=scale, softcap=1.0 if softcap is None else softcap,
        SOFTCAP=softcap is not None, **of_rows,
    )  # fmt: skip
    if prefix_key is not None and prefix_value is not None:
        further = dict(first_chunk=0, **of_prefixes)
        _launch_chunks(query, prefix_key, prefix_value, is_prefix=True, **further, **common)
    none = dict(prefix_end_ptr=None, prefix_cu_rows_ptr=None, P=0, SEARCH=0)
    _launch_chunks(query, key, value, is_prefix=False, first_chunk=shared_chunks, **none, **common)
    _decode_attention_merge_kernel[(lse.numel(),)](
        output_ptr=output, lse_ptr=lse, Hq=query_heads, S=key.shape[2], Sp=num_shared,
        first_own_chunk=shared_chunks, PREFIX=shared_chunks > 0, OWN_CHUNK=OWN_CHUNK,
        PREFIX_CHUNK=PREFIX_CHUNK, num_warps=1, **of_rows, **of_prefixes, **AS_WRITTEN,
    )  # fmt: skip
    return output, lse
