"""The kernels of attention that go by queries: forward, what the backward pass needs of each row,
and the gradient of the queries."""

import triton
import triton.language as tl

from fastrl.kernels._attention_runs import walk_row, walk_segments
from fastrl.kernels._attention_tiles import LOG2E, lane_and_item, load_rows, store_rows

# What changes from step to step: neither its value nor its divisors make another kernel. Strides
# count units of UNIT elements, of 16 bytes where all of them are multiples of that.
_RUNTIME = [
    "T", "S", "items", "lanes", "lanes_of_section", "query_heads", "queries_per_key", "window",
    "query_b", "query_h", "query_t", "key_b", "key_h", "key_s", "value_b", "value_h", "value_s",
    "output_b", "output_h", "output_t", "residue_b", "residue_h", "residue_t", "grad_b", "grad_h",
    "grad_t", "tiles",
]  # fmt: skip
# A few numbers a tile: where a slice of them begins does not matter.
_TABLES = [
    "key_start_ptr", "key_end_ptr", "position_ids_ptr", "query_tiles_ptr", "segments_ptr",
    "lse_ptr", "grad_lse_ptr", "log_total_ptr", "delta_ptr",
]  # fmt: skip


@triton.jit
def _first_query(
    query_tiles_ptr, item, T, LAYOUT: tl.constexpr, TILE: tl.constexpr, BLOCK_M: tl.constexpr
):
    """Of the item-th tile to begin, and in a layout the last segment that begins in it."""
    if LAYOUT:
        PARTS: tl.constexpr = TILE // BLOCK_M
        tile_ptr = query_tiles_ptr + item // PARTS * 2
        return tl.load(tile_ptr) + item % PARTS * BLOCK_M, tl.load(tile_ptr + 1)
    else:
        return (T - 1) // BLOCK_M * BLOCK_M - item * BLOCK_M, item  # the last tiles see most


@triton.jit(do_not_specialize=_RUNTIME, do_not_specialize_on_alignment=_TABLES)
def _attention_fwd_kernel(
    query_ptr, key, value,  # [B, Hq, T, HEAD], [B, Hkv, S, HEAD] ->
    output_ptr, lse_ptr, residue_ptr,  # the last with the strides of the output
    key_start_ptr, key_end_ptr, position_ids_ptr, query_tiles_ptr, segments_ptr,
    T, S, items, lanes, lanes_of_section, query_heads, queries_per_key, window,
    query_b: tl.int64, query_h: tl.int64, query_t: tl.int32,
    key_b: tl.int64, key_h: tl.int64, key_s: tl.int32,
    value_b: tl.int64, value_h: tl.int64, value_s: tl.int32,
    output_b: tl.int64, output_h: tl.int64, output_t: tl.int32,
    inner, outer,
    SIGN: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    LAYOUT: tl.constexpr, DESCRIPTORS: tl.constexpr, UNIT: tl.constexpr, OUT_UNIT: tl.constexpr,
    HEAD: tl.constexpr, TILE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program per BLOCK_M queries of a head."""
    lane, item = lane_and_item(items, lanes, lanes_of_section)
    b, h = lane // query_heads, lane % query_heads
    h_key = h // queries_per_key
    i0, segment = _first_query(query_tiles_ptr, item, T, LAYOUT, TILE, BLOCK_M)
    q_ptr = query_ptr + b * query_b * UNIT + h * query_h * UNIT
    q = load_rows(q_ptr, b, h, i0, 0, T, query_t * UNIT, False, HEAD, BLOCK_M, BLOCK_D)
    if SIGN != 1:  # outer is positive, so that max(x outer) is at max x
        q = (q * SIGN).to(q_ptr.dtype.element_ty)
    if not DESCRIPTORS:
        key += b * key_b * UNIT + h_key * key_h * UNIT
        value += b * value_b * UNIT + h_key * value_h * UNIT
    rows = (q,)
    source = (key, value, b, h_key, key_s * UNIT, value_s * UNIT)
    state = (
        tl.zeros([BLOCK_M, BLOCK_D], tl.float32),
        tl.zeros([BLOCK_M], tl.float32),
        tl.full([BLOCK_M], -3.0e38, tl.float32),
    )
    if LAYOUT:
        state = walk_segments(
            state, rows, inner, outer, source, position_ids_ptr, segments_ptr, segment, i0, T,
            window, False, WINDOW, SOFTCAP, DESCRIPTORS, HEAD,
            BLOCK_M, BLOCK_N, BLOCK_D,
        )  # fmt: skip
    else:
        state = walk_row(
            state, rows, inner, outer, source, key_start_ptr, key_end_ptr, b, i0, T, S, window,
            False, CAUSAL, WINDOW, SOFTCAP, DESCRIPTORS, HEAD,
            BLOCK_M, BLOCK_N, BLOCK_D,
        )  # fmt: skip
    acc, total, m = state
    i = i0 + tl.arange(0, BLOCK_M)
    lse = tl.where(total == 0, float("-inf"), (m + tl.log2(total)) / LOG2E)
    tl.store(lse_ptr + lane.to(tl.int64) * T + i, lse, mask=i < T)
    output = acc / tl.where(total == 0, 1.0, total)[:, None]
    rounded = output.to(output_ptr.dtype.element_ty)
    at = b * output_b * OUT_UNIT + h * output_h * OUT_UNIT
    if residue_ptr is not None:  # ahead of the output, or both would lie in registers
        rest = output - rounded.to(tl.float32)
        store_rows(residue_ptr + at, rest, i0, 0, T, output_t * OUT_UNIT, HEAD, BLOCK_M, BLOCK_D)
    store_rows(output_ptr + at, rounded, i0, 0, T, output_t * OUT_UNIT, HEAD, BLOCK_M, BLOCK_D)


@triton.jit(do_not_specialize=_RUNTIME, do_not_specialize_on_alignment=_TABLES)
def _attention_rows_kernel(
    grad_output_ptr, output_ptr, residue_ptr, lse_ptr, grad_lse_ptr,
    log_total_ptr, delta_ptr,  # -> [B, Hq, T] each
    T, tiles, query_heads,
    grad_b: tl.int64, grad_h: tl.int64, grad_t: tl.int32,
    output_b: tl.int64, output_h: tl.int64, output_t: tl.int32,
    residue_b: tl.int64, residue_h: tl.int64, residue_t: tl.int32,
    UNIT: tl.constexpr, HEAD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """lse / ln 2, and delta = sum_d grad_output_d (output_d + residue_d) - grad_lse: with them the
    gradient of a score is p (<grad_output, value> - delta)."""
    lane, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    b, h = lane // query_heads, lane % query_heads
    i0 = tile * BLOCK_M
    i = i0 + tl.arange(0, BLOCK_M)
    at = lane.to(tl.int64) * T + i
    do_ptr = grad_output_ptr + b * grad_b * UNIT + h * grad_h * UNIT
    o_ptr = output_ptr + b * output_b * UNIT + h * output_h * UNIT
    do = load_rows(do_ptr, b, h, i0, 0, T, grad_t * UNIT, False, HEAD, BLOCK_M, BLOCK_D)
    o = load_rows(o_ptr, b, h, i0, 0, T, output_t * UNIT, False, HEAD, BLOCK_M, BLOCK_D)
    o = o.to(tl.float32)
    if residue_ptr is not None:
        r_ptr = residue_ptr + b * residue_b * UNIT + h * residue_h * UNIT
        rest = load_rows(r_ptr, b, h, i0, 0, T, residue_t * UNIT, False, HEAD, BLOCK_M, BLOCK_D)
        o += rest.to(tl.float32)
    delta = do.to(tl.float32) * o
    # By neighbours, in one order for all alignments of the two in memory.
    for k in tl.static_range(16):
        if BLOCK_D >> k > 1:
            delta = tl.sum(tl.reshape(delta, [BLOCK_M, BLOCK_D >> (k + 1), 2]), axis=2)
    delta = tl.reshape(delta, [BLOCK_M])
    if grad_lse_ptr is not None:
        delta -= tl.load(grad_lse_ptr + at, mask=i < T, other=0.0)
    lse = tl.load(lse_ptr + at, mask=i < T, other=0.0)
    # Without keys every p is to be 0, and whatever comes from above is to reach nothing.
    seen = lse != float("-inf")
    tl.store(log_total_ptr + at, tl.where(seen, lse * LOG2E, float("inf")), mask=i < T)
    tl.store(delta_ptr + at, tl.where(seen, delta, 0.0), mask=i < T)


@triton.jit(do_not_specialize=_RUNTIME, do_not_specialize_on_alignment=_TABLES)
def _attention_dq_kernel(
    grad_output_ptr, query_ptr, key, value, log_total_ptr, delta_ptr, grad_query_ptr,
    key_start_ptr, key_end_ptr, position_ids_ptr, query_tiles_ptr, segments_ptr,
    T, S, items, lanes, lanes_of_section, query_heads, queries_per_key, window,
    grad_b: tl.int64, grad_h: tl.int64, grad_t: tl.int32,
    query_b: tl.int64, query_h: tl.int64, query_t: tl.int32,
    key_b: tl.int64, key_h: tl.int64, key_s: tl.int32,
    value_b: tl.int64, value_h: tl.int64, value_s: tl.int32,
    output_b: tl.int64, output_h: tl.int64, output_t: tl.int32,  # of grad_query
    inner, outer, scale,
    SIGN: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    LAYOUT: tl.constexpr, DESCRIPTORS: tl.constexpr, UNIT: tl.constexpr, OUT_UNIT: tl.constexpr,
    HEAD: tl.constexpr, TILE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program per BLOCK_M queries of a head."""
    lane, item = lane_and_item(items, lanes, lanes_of_section)
    b, h = lane // query_heads, lane % query_heads
    h_key = h // queries_per_key
    i0, segment = _first_query(query_tiles_ptr, item, T, LAYOUT, TILE, BLOCK_M)
    q_ptr = query_ptr + b * query_b * UNIT + h * query_h * UNIT
    do_ptr = grad_output_ptr + b * grad_b * UNIT + h * grad_h * UNIT
    q = load_rows(q_ptr, b, h, i0, 0, T, query_t * UNIT, False, HEAD, BLOCK_M, BLOCK_D)
    do = load_rows(do_ptr, b, h, i0, 0, T, grad_t * UNIT, False, HEAD, BLOCK_M, BLOCK_D)
    if SIGN != 1:
        q = (q * SIGN).to(q_ptr.dtype.element_ty)
    i = i0 + tl.arange(0, BLOCK_M)
    at = lane.to(tl.int64) * T + i
    log_total = tl.load(log_total_ptr + at, mask=i < T, other=float("inf"))
    delta = tl.load(delta_ptr + at, mask=i < T, other=0.0)
    if not DESCRIPTORS:
        key += b * key_b * UNIT + h_key * key_h * UNIT
        value += b * value_b * UNIT + h_key * value_h * UNIT
    rows = (q, do, log_total, delta)
    source = (key, value, b, h_key, key_s * UNIT, value_s * UNIT)
    state = (tl.zeros([BLOCK_M, BLOCK_D], tl.float32),)
    if LAYOUT:
        state = walk_segments(
            state, rows, inner, outer, source, position_ids_ptr, segments_ptr, segment, i0, T,
            window, True, WINDOW, SOFTCAP, DESCRIPTORS, HEAD,
            BLOCK_M, BLOCK_N, BLOCK_D,
        )  # fmt: skip
    else:
        state = walk_row(
            state, rows, inner, outer, source, key_start_ptr, key_end_ptr, b, i0, T, S, window,
            True, CAUSAL, WINDOW, SOFTCAP, DESCRIPTORS, HEAD,
            BLOCK_M, BLOCK_N, BLOCK_D,
        )  # fmt: skip
    dq_ptr = grad_query_ptr + b * output_b * OUT_UNIT + h * output_h * OUT_UNIT
    store_rows(dq_ptr, state[0] * scale, i0, 0, T, output_t * OUT_UNIT, HEAD, BLOCK_M, BLOCK_D)
