"""Which ids of a row top_k and top_p keep, found without sorting.

    kept = {j : x_j > lowest, or x_j = lowest and j <= last_id}

Weights exp((x - m) / T) are added as integers, of 2^-WEIGHT_BITS each: every order of addition
gives the same sum, and what the searches compare are the very sums that a draw meets.

`lowest` is looked for in the integers that order the logits as their values do: the greatest t for
which the entries >= t are k, or weigh top_p of what top_k left. Each pass over the row counts or
weighs at 7 values and leaves an eighth of the interval: at most 6 passes for 16-bit logits, 11 for
float32. Of those that stand at `lowest` the lowest ids are kept.

Bytes: V b for each pass, b a logit; from L2, where a row that was just read still lies.
"""

import triton
import triton.language as tl

WEIGHT_BITS = 40  # weights are at most 1: a sum over 4 million columns stays below 2^62
ONE = tl.constexpr(1 << WEIGHT_BITS)


@triton.jit
def weight(x, m, scale):
    """exp((x - m) / T) in units of 2^-WEIGHT_BITS; whole also at m = +inf."""
    return (tl.where(x == m, 1.0, tl.exp2((x - m) * scale)) * ONE).to(tl.int64)


@triton.jit
def is_kept(x, offs_v, lowest, last_id):
    return (x > lowest) | ((x == lowest) & (offs_v <= last_id) & (x > float("-inf")))


@triton.jit
def _to_key(x, DTYPE: tl.constexpr):
    """The integer that stands among integers as x, of type DTYPE, among numbers."""
    if DTYPE == tl.float32:
        bits = x.to(tl.int32, bitcast=True)
        key = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    else:
        bits = x.to(DTYPE).to(tl.int16, bitcast=True).to(tl.int32)
        key = bits ^ ((bits >> 31) & 0x7FFF)
    return tl.where(key == -1, 0, key).to(tl.int64)  # -0.0 equals 0.0


@triton.jit
def _from_key(key, DTYPE: tl.constexpr):
    bits = key.to(tl.int32)
    if DTYPE == tl.float32:
        return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
    else:
        bits = (bits ^ ((bits >> 31) & 0x7FFF)).to(tl.int16)
        return bits.to(DTYPE, bitcast=True).to(tl.float32)


@triton.jit
def _measure(x, m, scale, WEIGH: tl.constexpr):
    """What an entry adds to a sum."""
    if WEIGH:
        return weight(x, m, scale)
    else:
        return tl.full(x.shape, 1, tl.int32)


@triton.jit
def _compare(sums, wanted):
    """Whether the sum reaches wanted, and the sum if it does not."""
    total = tl.sum(sums).to(tl.int64)
    return (total >= wanted).to(tl.int64), tl.where(total >= wanted, 0, total)


@triton.jit
def _search(row_ptr, stop, low, high, wanted, m, scale, WEIGH: tl.constexpr, BLOCK_V: tl.constexpr):
    """The greatest key t in [low, high) whose entries >= t are, or weigh, at least wanted, and the
    sum of those beyond it. That low is such a key is taken for granted; from high on there are no
    entries."""
    DTYPE: tl.constexpr = row_ptr.dtype.element_ty
    above = tl.full([], 0, tl.int64)
    while high - low > 1:
        gap = (high - low + 7) // 8
        p1 = _from_key(low + gap, DTYPE)
        p2 = _from_key(tl.minimum(low + 2 * gap, high), DTYPE)
        p3 = _from_key(tl.minimum(low + 3 * gap, high), DTYPE)
        p4 = _from_key(tl.minimum(low + 4 * gap, high), DTYPE)
        p5 = _from_key(tl.minimum(low + 5 * gap, high), DTYPE)
        p6 = _from_key(tl.minimum(low + 6 * gap, high), DTYPE)
        p7 = _from_key(tl.minimum(low + 7 * gap, high), DTYPE)
        zero = tl.zeros([BLOCK_V], tl.int64 if WEIGH else tl.int32)
        a1, a2, a3, a4, a5, a6, a7 = zero, zero, zero, zero, zero, zero, zero
        for v0 in tl.range(0, stop, BLOCK_V, num_stages=4):
            offs_v = v0 + tl.arange(0, BLOCK_V)
            x = tl.load(row_ptr + offs_v, mask=offs_v < stop, other=float("-inf")).to(tl.float32)
            one = _measure(x, m, scale, WEIGH)
            a1 += tl.where(x >= p1, one, 0)
            a2 += tl.where(x >= p2, one, 0)
            a3 += tl.where(x >= p3, one, 0)
            a4 += tl.where(x >= p4, one, 0)
            a5 += tl.where(x >= p5, one, 0)
            a6 += tl.where(x >= p6, one, 0)
            a7 += tl.where(x >= p7, one, 0)
        e1, s1 = _compare(a1, wanted)
        e2, s2 = _compare(a2, wanted)
        e3, s3 = _compare(a3, wanted)
        e4, s4 = _compare(a4, wanted)
        e5, s5 = _compare(a5, wanted)
        e6, s6 = _compare(a6, wanted)
        e7, s7 = _compare(a7, wanted)
        low += (e1 + e2 + e3 + e4 + e5 + e6 + e7) * gap
        high = tl.minimum(low + gap, high)
        # The sums fall from value to value: what is beyond is the greatest that is too small.
        most = tl.maximum(tl.maximum(tl.maximum(s1, s2), tl.maximum(s3, s4)), tl.maximum(s5, s6))
        above = tl.maximum(above, tl.maximum(most, s7))
    return low, above


@triton.jit
def _weight_above(row_ptr, stop, lowest, m, scale, BLOCK_V: tl.constexpr):
    total = tl.zeros([BLOCK_V], tl.int64)
    for v0 in tl.range(0, stop, BLOCK_V, num_stages=4):
        offs_v = v0 + tl.arange(0, BLOCK_V)
        x = tl.load(row_ptr + offs_v, mask=offs_v < stop, other=float("-inf")).to(tl.float32)
        total += tl.where(x > lowest, weight(x, m, scale), 0)
    return tl.sum(total)


@triton.jit
def _nth_equal(row_ptr, stop, value, wanted, BLOCK_V: tl.constexpr):
    """The id of the wanted-th entry, from 1 on, that equals value; -1 if there is none."""
    found = tl.full([], -1, tl.int32)
    seen = tl.full([], 0, tl.int32)
    for v0 in tl.range(0, stop, BLOCK_V):
        if seen < wanted:
            offs_v = v0 + tl.arange(0, BLOCK_V)
            x = tl.load(row_ptr + offs_v, mask=offs_v < stop, other=float("-inf")).to(tl.float32)
            equal = (x == value).to(tl.int32)
            seen_next = seen + tl.sum(equal)
            if seen_next >= wanted:
                rank = seen + tl.cumsum(equal, axis=0)
                found = tl.min(tl.where((equal > 0) & (rank == wanted), offs_v, stop))
            seen = seen_next
    return found


@triton.jit
def _times(one, wanted):
    """How many of `one` make up `wanted` >= 1, bit by bit: a division takes many registers."""
    times = tl.full([], 0, tl.int64)
    for i in range(0, 22):  # more than there are columns
        more = times + (2097152 >> i)
        times = tl.where(more * one < wanted, more, times)
    return times + 1


@triton.jit
def truncate(row_ptr, stop, V, m, scale, top_k, top_p, BLOCK_V: tl.constexpr):
    """lowest, last_id (-1 where nobody kept stands at lowest) and the weight of all that is kept.

    The row is row_ptr[:stop], its maximum m finite. top_k >= V or top_p >= 1 cut nothing.
    """
    DTYPE: tl.constexpr = row_ptr.dtype.element_ty
    least = _to_key(tl.full([], float("-inf"), tl.float32), DTYPE)
    low, high = least, _to_key(m, DTYPE) + 1
    ties = tl.full([], 0, tl.int64)  # kept of those that stand at `low`
    if top_k < V:
        wanted = top_k.to(tl.int64)
        low, above = _search(row_ptr, stop, low, high, wanted, m, scale, False, BLOCK_V)
        ties = tl.where(low > least, wanted - above, 0)
    lowest = _from_key(low, DTYPE)
    above = _weight_above(row_ptr, stop, lowest, m, scale, BLOCK_V)
    total = above + ties * weight(lowest, m, scale)
    if top_p < 1.0:
        share = total.to(tl.float64) * top_p
        wanted = share.to(tl.int64)
        wanted += (wanted.to(tl.float64) < share).to(tl.int64)
        wanted = tl.minimum(tl.maximum(wanted, 1), total)
        # No more than top_k left of equals: together they weigh total, and wanted is no more.
        low, above = _search(row_ptr, stop, low, high, wanted, m, scale, True, BLOCK_V)
        lowest = _from_key(low, DTYPE)
        one = weight(lowest, m, scale)
        ties = _times(one, wanted - above)
        total = above + ties * one
    last_id = tl.full([], -1, tl.int32)
    if ties > 0:
        last_id = _nth_equal(row_ptr, stop, lowest, ties.to(tl.int32), BLOCK_V)
    return lowest, last_id, total
