"""How a tile of queries meets the keys that it sees: the walk of attention's forward kernel and of
the kernel for the gradient of the queries.

A run is a stretch of keys of which query i of the tile sees those with lo_i < j <= hi_i: in a dense
batch all of a row's keys, in a packed layout those of one segment. Blocks of keys are counted from
the run's first key, and a layout's runs come last to first, so that what a query meets, block by
block, is the same in whichever tile it stands; a block of which it sees nothing adds exact zeros.
"""

import triton
import triton.language as tl

from fastrl.kernels._attention_tiles import FAR, capped, load_rows, product


@triton.jit
def _forward(
    state, x, outer, source, j0, end,
    DESCRIPTORS: tl.constexpr, HEAD: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A block's part in the sums. m is finite from the start: inf - inf is NaN."""
    acc, total, m = state
    m_new = tl.maximum(m, tl.max(x, axis=1) * outer)
    p = tl.exp2(tl.math.fma(x, outer, -m_new[:, None]))
    shrink = tl.exp2(m - m_new)
    # In the order of the product's layout, in which no alignment has a part: test_compiled.py.
    total = tl.math.fma(total, shrink, tl.sum(p, axis=1))
    acc *= shrink[:, None]
    _, value, b, h, _, value_s = source
    v = load_rows(value, b, h, j0, 0, end, value_s, DESCRIPTORS, HEAD, BLOCK_N, BLOCK_D)
    acc = product(p.to(v.dtype), v, acc)
    return acc, total, m_new


@triton.jit
def _backward(
    state, rows, k, x, outer, source, j0, end,
    SOFTCAP: tl.constexpr, DESCRIPTORS: tl.constexpr,
    HEAD: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A block's part in the gradient of the queries."""
    _, grad_output, log_total, delta = rows
    p = tl.exp2(tl.math.fma(x, outer, -log_total[:, None]))
    _, value, b, h, _, value_s = source
    v = load_rows(value, b, h, j0, 0, end, value_s, DESCRIPTORS, HEAD, BLOCK_N, BLOCK_D)
    ds = p * (product(grad_output, v.T, None) - delta[:, None])
    if SOFTCAP:
        ds *= tl.where(p > 0, tl.math.fma(-x, x, 1.0), 0.0)  # -inf where it is not seen
    return (product(ds.to(k.dtype), k, state[0]),)


@triton.jit
def walk_run(
    state, rows, inner, outer, hi, lo, source, start, end, hi_min, hi_max, lo_min, lo_max,
    BACKWARD: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    DESCRIPTORS: tl.constexpr, HEAD: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The keys [start, end), block after block; the bounds are those of hi and lo over the tile.

    Blocks outside [begin, stop) are seen by no query, those at [full, full_end) whole by every one:
    these are not masked.
    """
    stop = tl.minimum(end, hi_max + 1)
    full_end = start + tl.maximum(tl.minimum(end, hi_min + 1) - start, 0) // BLOCK_N * BLOCK_N
    begin, full = start, start
    if WINDOW:
        begin += tl.maximum(lo_min + 1 - start, 0) // BLOCK_N * BLOCK_N
        full += tl.cdiv(tl.maximum(lo_max + 1 - start, 0), BLOCK_N) * BLOCK_N
    key, _, b, h, key_s, _ = source
    # What could be computed once would hold registers that the products need.
    for j0 in tl.range(begin, stop, BLOCK_N, disable_licm=True):
        k = load_rows(key, b, h, j0, 0, end, key_s, DESCRIPTORS, HEAD, BLOCK_N, BLOCK_D)
        x = product(rows[0], k.T, None)
        if SOFTCAP:
            x = capped(x * inner, k.dtype == tl.float32)
        if (j0 < full) | (j0 >= full_end):
            j = j0 + tl.arange(0, BLOCK_N)
            seen = j[None, :] <= hi[:, None]
            if WINDOW:
                seen &= j[None, :] > lo[:, None]
            x = tl.where(seen, x, float("-inf"))
        if BACKWARD:
            state = _backward(
                state, rows, k, x, outer, source, j0, end,
                SOFTCAP, DESCRIPTORS, HEAD, BLOCK_N, BLOCK_D,
            )  # fmt: skip
        else:
            state = _forward(state, x, outer, source, j0, end, DESCRIPTORS, HEAD, BLOCK_N, BLOCK_D)
    return state


@triton.jit
def walk_segments(
    state, rows, inner, outer, source, position_ids_ptr, segments_ptr, segment, i0, T, window,
    BACKWARD: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    DESCRIPTORS: tl.constexpr, HEAD: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The runs of a layout: segments that begin in the tile, last to first, and then the way from
    that of its first token to the root. A token's own segments are met in this order in any tile.
    """
    i = i0 + tl.arange(0, BLOCK_M)
    i_last = tl.minimum(i0 + BLOCK_M, T) - 1
    reach = i
    if WINDOW:
        reach = tl.load(position_ids_ptr + i, mask=i < T, other=0).to(tl.int32) - window
    while segment >= 0:
        at = segments_ptr + segment.to(tl.int64) * 5
        start, end, until = tl.load(at), tl.load(at + 1), tl.load(at + 2)
        inside = i < until
        hi = tl.where(inside, tl.minimum(i, end - 1), -1)
        hi_min = tl.where(until > i_last, i0, -1)
        lo, lo_min, lo_max = hi, 0, 0
        if WINDOW:
            lo = reach - tl.load(at + 3)
            lo_min = tl.min(tl.where(inside & (i >= start), lo, FAR))
            lo_max = tl.max(tl.where(inside & (i >= start), lo, -FAR))
        state = walk_run(
            state, rows, inner, outer, hi, lo, source, start, end, hi_min, i_last, lo_min, lo_max,
            BACKWARD, WINDOW, SOFTCAP, DESCRIPTORS, HEAD, BLOCK_N, BLOCK_D,
        )  # fmt: skip
        segment = tl.where(start > i0, segment - 1, tl.load(at + 4))
    return state


@triton.jit
def walk_row(
    state, rows, inner, outer, source, key_start_ptr, key_end_ptr, b, i0, T, S, window,
    BACKWARD: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    DESCRIPTORS: tl.constexpr, HEAD: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The keys of a row of a dense batch."""
    start, end, first_position = row_keys(key_start_ptr, key_end_ptr, b, T, S)
    position = first_position + i0 + tl.arange(0, BLOCK_M)
    position_min, position_max = first_position + i0, first_position + i0 + BLOCK_M - 1
    hi = tl.zeros_like(position) + (end - 1)
    lo, hi_min, hi_max, lo_min, lo_max = hi, end - 1, end - 1, 0, 0
    if CAUSAL:
        hi = tl.minimum(position, end - 1)
        hi_min, hi_max = position_min, position_max
    if WINDOW:
        lo, lo_min, lo_max = position - window, position_min - window, position_max - window
    return walk_run(
        state, rows, inner, outer, hi, lo, source, start, end, hi_min, hi_max, lo_min, lo_max,
        BACKWARD, WINDOW, SOFTCAP, DESCRIPTORS, HEAD, BLOCK_N, BLOCK_D,
    )  # fmt: skip


@triton.jit
def row_keys(key_start_ptr, key_end_ptr, b, T, S):
    """start and end of the keys of row b, never outside [0, S], and the position of query 0."""
    start, end = 0, S
    if key_start_ptr is not None:
        start = tl.minimum(tl.maximum(tl.load(key_start_ptr + b), 0), S)
    if key_end_ptr is not None:
        end = tl.load(key_end_ptr + b)
    return start, tl.maximum(tl.minimum(end, S), start), end - T
