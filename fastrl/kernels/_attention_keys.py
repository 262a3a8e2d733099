"""The kernels of attention's backward pass that go by keys: the gradients of keys and values.

One program holds a tile of keys and walks all queries that see any of them, head after head of
those that share the keys, in order: nothing is added by atomics. Blocks of queries are counted from
the first key of the row, or of the tree, so that its sums are the same wherever it stands.
"""

import triton
import triton.language as tl

from fastrl.kernels._attention_runs import row_keys
from fastrl.kernels._attention_tiles import (
    FAR,
    capped,
    lane_and_item,
    load_rows,
    product,
    store_rows,
)

_RUNTIME = [
    "T", "S", "items", "lanes", "lanes_of_section", "query_heads", "queries_per_key", "window",
    "query_b", "query_h", "query_t", "key_b", "key_h", "key_s", "value_b", "value_h", "value_s",
    "grad_b", "grad_h", "grad_t", "grad_key_b", "grad_key_h", "grad_key_s", "grad_value_b",
    "grad_value_h", "grad_value_s", "target_b", "target_h", "target_s", "key_heads",
]  # fmt: skip
_TABLES = [
    "key_start_ptr", "key_end_ptr", "visible_until_ptr", "position_ids_ptr", "key_tiles_ptr",
    "segments_ptr", "key_sums_ptr", "log_total_ptr", "delta_ptr",
]  # fmt: skip


@triton.jit
def _walk(
    state, k, v, inner, outer, of_keys, source, heads,
    begin, mid, full_end, end, first, stop, shift,
    NEEDS_KEY: tl.constexpr, NEEDS_VALUE: tl.constexpr, TREE_WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr, DESCRIPTORS: tl.constexpr,
    HEAD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The blocks of queries at [begin, end) of some heads, one head after the other; those outside
    [mid, full_end) are masked. Query c - shift stands at c, and there is one for [first, stop); no
    key is seen from outside of it.

    Returns state, and the head behind the last.
    """
    query, grad_output, log_total_ptr, delta_ptr, position_ids_ptr, b, h0, T, strides = source
    lo, hi, reach = of_keys
    blocks = tl.cdiv(end - begin, BLOCK_M)
    h, c0 = h0, begin
    for _ in tl.range(0, heads * tl.maximum(blocks, 0), disable_licm=True):
        i0 = c0 - shift
        i = tl.arange(0, BLOCK_M)
        exists = (i >= first - c0) & (i < stop - c0)
        if DESCRIPTORS:  # without a mask: where the tensor goes on, other trees have p = 0
            q = load_rows(query, b, h, i0, 0, 0, 0, True, HEAD, BLOCK_M, BLOCK_D)
            do = load_rows(grad_output, b, h, i0, 0, 0, 0, True, HEAD, BLOCK_M, BLOCK_D)
        else:
            query_h, query_t, grad_h, grad_t = strides
            q = load_rows(
                query + h * query_h, b, h, i0, first - shift, stop - shift, query_t,
                False, HEAD, BLOCK_M, BLOCK_D,
            )  # fmt: skip
            do = load_rows(
                grad_output + h * grad_h, b, h, i0, first - shift, stop - shift, grad_t,
                False, HEAD, BLOCK_M, BLOCK_D,
            )  # fmt: skip
        of_row = tl.cast(h, tl.int64) * T + i0
        log_total = tl.load(log_total_ptr + of_row + i, mask=exists, other=0.0)
        x = product(k, q.T, None)  # [BLOCK_N, BLOCK_M], as all that follows
        # Early for tensor cores; in float32 the threads have no room for it beside other products.
        EARLY: tl.constexpr = NEEDS_KEY and k.dtype != tl.float32
        if NEEDS_KEY:
            delta = tl.load(delta_ptr + of_row + i, mask=exists, other=0.0)
        if EARLY:
            ds = product(v, do.T, None) - delta[None, :]
        if SOFTCAP:
            x = capped(x * inner, k.dtype == tl.float32)
        p = tl.exp2(tl.math.fma(x, outer, -log_total[None, :]))
        if (c0 < mid) | (c0 >= full_end):
            c = c0 + i
            seen = (c[None, :] >= lo[:, None]) & (c[None, :] < hi[:, None])
            if TREE_WINDOW:
                position = tl.load(position_ids_ptr + c, mask=exists, other=0).to(tl.int32)
                seen &= position[None, :] < reach[:, None]
            p = tl.where(seen, p, 0.0)
        dk, dv = state
        if EARLY:
            ds *= p
        if NEEDS_VALUE:
            dv = product(p.to(do.dtype), do, dv)
        if NEEDS_KEY:
            if not EARLY:
                ds = p * (product(v, do.T, None) - delta[None, :])
            if SOFTCAP:
                ds *= tl.math.fma(-x, x, 1.0)
            dk = product(ds.to(q.dtype), q, dk)
        state = (dk, dv)
        c0 += BLOCK_M
        h = tl.where(c0 < end, h, h + 1)
        c0 = tl.where(c0 < end, c0, begin)
    return state, h


@triton.jit
def _tree_tile(
    key_tiles_ptr, visible_until_ptr, position_ids_ptr, item, window,
    WINDOW: tl.constexpr, TILE: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A tile of a layout: see fastrl._tiles. A key is seen by the queries in [lo, hi) that stand
    before `reach`."""
    PARTS: tl.constexpr = TILE // BLOCK_N
    tile_ptr = key_tiles_ptr + (item // PARTS).to(tl.int64) * 7
    j0 = tl.load(tile_ptr) + item % PARTS * BLOCK_N
    j_end = tl.load(tile_ptr + 1)
    j = j0 + tl.arange(0, BLOCK_N)
    hi = tl.load(visible_until_ptr + j, mask=j < j_end, other=-1)
    reach = hi
    if WINDOW:
        reach = tl.load(position_ids_ptr + j, mask=j < j_end, other=0).to(tl.int32) + window
    return j0, j_end, tl.load(tile_ptr + 2), tl.load(tile_ptr + 3), j, hi, reach


@triton.jit
def _row_tile(
    key_start_ptr, key_end_ptr, b, item, T, S, window,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A tile of a row of a dense batch, whose queries are counted by their positions if CAUSAL."""
    start, j_end, first_position = row_keys(key_start_ptr, key_end_ptr, b, T, S)
    j0 = start + item * BLOCK_N
    j = j0 + tl.arange(0, BLOCK_N)
    exists = j < j_end
    if CAUSAL:
        hi = tl.where(exists, FAR, -FAR)
        if WINDOW:
            hi = tl.where(exists, j + window, -FAR)
        return j0, j_end, first_position, first_position, j, hi, start
    else:
        return j0, j_end, 0, 0, j * 0 - FAR, tl.where(exists, FAR, -FAR), 0


@triton.jit
def _walk_tree_window(
    state, k, v, inner, outer, of_keys, source, segments_ptr, segment, end_segment,
    begin, end, first, stop,
    NEEDS_KEY: tl.constexpr, NEEDS_VALUE: tl.constexpr, SOFTCAP: tl.constexpr,
    DESCRIPTORS: tl.constexpr, HEAD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Of each segment the queries that stand near enough: positions begin again in each of them.

    Returns state, and where the walk ended.
    """
    reach = tl.max(of_keys[2])
    for s in tl.range(segment, end_segment, disable_licm=True):
        at = segments_ptr + tl.cast(s, tl.int64) * 5
        last = tl.minimum(tl.minimum(tl.load(at + 1), reach - tl.load(at + 3)), end)
        from_here = first + tl.maximum(tl.load(at) - first, 0) // BLOCK_M * BLOCK_M
        begin = tl.maximum(begin, from_here)  # a block that two segments share is walked once
        state, _ = _walk(
            state, k, v, inner, outer, of_keys, source, 1, begin, last, last, last, first, stop, 0,
            NEEDS_KEY, NEEDS_VALUE, True, SOFTCAP, DESCRIPTORS, HEAD, BLOCK_M, BLOCK_D,
        )  # fmt: skip
        begin += tl.cdiv(tl.maximum(last - begin, 0), BLOCK_M) * BLOCK_M
    return state, begin


@triton.jit(do_not_specialize=_RUNTIME, do_not_specialize_on_alignment=_TABLES)
def _attention_dkdv_kernel(
    grad_output, query, key_ptr, value_ptr, log_total_ptr, delta_ptr,
    grad_key_ptr, grad_value_ptr, key_parts_ptr, value_parts_ptr,  # parts [slots, Hkv, TILE, HEAD]
    key_start_ptr, key_end_ptr, visible_until_ptr, position_ids_ptr, key_tiles_ptr, segments_ptr,
    T, S, items, lanes, lanes_of_section, query_heads, queries_per_key, window,
    grad_b: tl.int64, grad_h: tl.int64, grad_t: tl.int32,
    query_b: tl.int64, query_h: tl.int64, query_t: tl.int32,
    key_b: tl.int64, key_h: tl.int64, key_s: tl.int32,
    value_b: tl.int64, value_h: tl.int64, value_s: tl.int32,
    grad_key_b: tl.int64, grad_key_h: tl.int64, grad_key_s: tl.int32,
    grad_value_b: tl.int64, grad_value_h: tl.int64, grad_value_s: tl.int32,
    inner, outer, scale,
    SIGN: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    LAYOUT: tl.constexpr, DESCRIPTORS: tl.constexpr,
    NEEDS_KEY: tl.constexpr, NEEDS_VALUE: tl.constexpr,
    UNIT: tl.constexpr, OUT_UNIT: tl.constexpr, HEAD: tl.constexpr, TILE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program per BLOCK_N keys of a head, or in a layout per stretch of their queries."""
    lane, item = lane_and_item(items, lanes, lanes_of_section)
    key_heads = query_heads // queries_per_key
    b, h_key = lane // key_heads, lane % key_heads
    if LAYOUT:
        j0, j_end, first, stop, lo, hi, reach = _tree_tile(
            key_tiles_ptr, visible_until_ptr, position_ids_ptr, item, window, WINDOW, TILE, BLOCK_N
        )
        shift, origin = 0, first
    else:
        j0, j_end, first, shift, lo, hi, origin = _row_tile(
            key_start_ptr, key_end_ptr, b, item, T, S, window, CAUSAL, WINDOW, BLOCK_N
        )
        stop, reach = first + T, hi
    if j0 >= j_end:
        return
    k_ptr = key_ptr + b * key_b * UNIT + h_key * key_h * UNIT
    v_ptr = value_ptr + b * value_b * UNIT + h_key * value_h * UNIT
    k = load_rows(k_ptr, b, h_key, j0, 0, j_end, key_s * UNIT, False, HEAD, BLOCK_N, BLOCK_D)
    v = load_rows(v_ptr, b, h_key, j0, 0, j_end, value_s * UNIT, False, HEAD, BLOCK_N, BLOCK_D)
    if SIGN != 1:
        k = (k * SIGN).to(k_ptr.dtype.element_ty)
    # Blocks outside [begin, end) see none of the keys, those at [mid, full_end) see all of them.
    end = tl.minimum(tl.max(hi), stop)
    begin = origin + tl.maximum(tl.maximum(tl.min(lo), first) - origin, 0) // BLOCK_M * BLOCK_M
    mid = origin + tl.cdiv(tl.maximum(tl.maximum(tl.max(lo), first) - origin, 0), BLOCK_M) * BLOCK_M
    full_end = tl.minimum(tl.min(hi), stop)
    full_end = origin + tl.maximum(full_end - origin, 0) // BLOCK_M * BLOCK_M
    of_keys = (tl.maximum(lo, first), tl.minimum(hi, stop), reach)
    state = (tl.zeros([BLOCK_N, BLOCK_D], tl.float32), tl.zeros([BLOCK_N, BLOCK_D], tl.float32))
    h0 = h_key * queries_per_key
    strides = (query_h * UNIT, query_t * UNIT, grad_h * UNIT, grad_t * UNIT)
    if not DESCRIPTORS:
        query += b * query_b * UNIT
        grad_output += b * grad_b * UNIT
    at = (b * query_heads).to(tl.int64) * T
    if LAYOUT and WINDOW:
        tile_ptr = key_tiles_ptr + (item // (TILE // BLOCK_N)).to(tl.int64) * 7
        segment, end_segment = tl.load(tile_ptr + 5), tl.load(tile_ptr + 6)
        walked = begin
        for h in tl.range(h0, h0 + queries_per_key, disable_licm=True):
            source = (
                query, grad_output, log_total_ptr, delta_ptr, position_ids_ptr, b, h, T, strides
            )  # fmt: skip
            state, walked = _walk_tree_window(
                state, k, v, inner, outer, of_keys, source, segments_ptr, segment, end_segment,
                begin, end, first, stop,
                NEEDS_KEY, NEEDS_VALUE, SOFTCAP, DESCRIPTORS, HEAD, BLOCK_M, BLOCK_D,
            )  # fmt: skip
    else:
        source = (
            query, grad_output, log_total_ptr + at, delta_ptr + at, position_ids_ptr, b, h0, T,
            strides,
        )  # fmt: skip
        state, walked = _walk(
            state, k, v, inner, outer, of_keys, source, queries_per_key, begin, mid, full_end, end,
            first, stop, shift,
            NEEDS_KEY, NEEDS_VALUE, False, SOFTCAP, DESCRIPTORS, HEAD, BLOCK_M, BLOCK_D,
        )  # fmt: skip
    j0 += tl.minimum(walked, 0)  # 0: or the addresses of k would stay in registers for those of dk
    dk, dv = state
    dk *= scale
    if LAYOUT:
        PARTS: tl.constexpr = TILE // BLOCK_N
        slot = tl.load(key_tiles_ptr + (item // PARTS).to(tl.int64) * 7 + 4)
        if slot >= 0:
            at = (tl.cast(slot, tl.int64) * key_heads + h_key) * TILE * HEAD
            row = item % PARTS * BLOCK_N
            if NEEDS_KEY:
                store_rows(key_parts_ptr + at, dk, row, 0, TILE, HEAD, HEAD, BLOCK_N, BLOCK_D)
            if NEEDS_VALUE:
                store_rows(value_parts_ptr + at, dv, row, 0, TILE, HEAD, HEAD, BLOCK_N, BLOCK_D)
            return
    if NEEDS_KEY:
        dk_ptr = grad_key_ptr + b * grad_key_b * OUT_UNIT + h_key * grad_key_h * OUT_UNIT
        store_rows(dk_ptr, dk, j0, 0, j_end, grad_key_s * OUT_UNIT, HEAD, BLOCK_N, BLOCK_D)
    if NEEDS_VALUE:
        dv_ptr = grad_value_ptr + b * grad_value_b * OUT_UNIT + h_key * grad_value_h * OUT_UNIT
        store_rows(dv_ptr, dv, j0, 0, j_end, grad_value_s * OUT_UNIT, HEAD, BLOCK_N, BLOCK_D)


@triton.jit(do_not_specialize=_RUNTIME, do_not_specialize_on_alignment=_TABLES)
def _attention_key_sums_kernel(
    parts_ptr, target_ptr, key_sums_ptr, key_heads,  # [slots, Hkv, TILE, HEAD] -> [1, Hkv, N, HEAD]
    target_b: tl.int64, target_h: tl.int64, target_s: tl.int32,  # b: of one
    OUT_UNIT: tl.constexpr, HEAD: tl.constexpr, TILE: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Adds up the slots of a tile, first to last. One program per slot and head: those of one tile
    share its rows."""
    row, h = tl.program_id(0) // key_heads, tl.program_id(0) % key_heads
    at = key_sums_ptr + tl.cast(row, tl.int64) * 4
    j0, j_end, slot, slots = tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3)
    for block in range(row - slot, TILE // BLOCK, slots):
        offset = block * BLOCK
        total = tl.zeros([BLOCK, BLOCK_D], tl.float32)
        for s in range(slot, slot + slots):
            part_ptr = parts_ptr + (tl.cast(s, tl.int64) * key_heads + h) * TILE * HEAD
            total += load_rows(
                part_ptr, 0, h, offset, 0, j_end - j0, HEAD, False, HEAD, BLOCK, BLOCK_D
            )
        target = target_ptr + h * target_h * OUT_UNIT
        store_rows(target, total, j0 + offset, 0, j_end, target_s * OUT_UNIT, HEAD, BLOCK, BLOCK_D)
