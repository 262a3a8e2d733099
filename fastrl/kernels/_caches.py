"""Which keys a row of a decoding batch has, which of them its queries see, and which prefix is its
own: worked out by each program from bounds that only the GPU knows. And what addresses are made of
them."""

import triton
import triton.language as tl


@triton.jit
def bound(ptr, i, mask, most):
    """Entry i of key_start, key_end or prefix_end, moved into [0, most]."""
    return tl.minimum(tl.maximum(tl.load(ptr + i, mask=mask, other=0), 0), most)


@triton.jit
def own_keys(key_start_ptr, key_end_ptr, b, mask, S):
    """A row's first key and the number of its keys."""
    start, end = b * 0, b * 0 + S
    if key_start_ptr is not None:
        start = bound(key_start_ptr, b, mask, S)
    if key_end_ptr is not None:
        end = bound(key_end_ptr, b, mask, S)
    return start, tl.maximum(end - start, 0)


@triton.jit
def sees(shared, own, t, T, window, PREFIX: tl.constexpr):
    """The first key that query t of a row sees, and the one behind the last, of its prefix or of
    its own: `own` keys stand behind `shared` ones, the last of T queries at the last of them."""
    behind = own - T + t + 1  # the query's position and one, from the first of the row's own keys
    last = behind
    if PREFIX:
        behind += shared
        last = tl.minimum(behind, shared)
    return tl.maximum(behind - window, 0), last


@triton.jit
def first_row(prefix_cu_rows_ptr, p, B, P):
    """prefix_cu_rows[p]."""
    if prefix_cu_rows_ptr is not None:
        return tl.minimum(tl.maximum(tl.load(prefix_cu_rows_ptr + p), 0), B)
    else:
        return p * (B // P)


@triton.jit
def first_tile(prefix_cu_rows_ptr, p, B, P, per_row, BLOCK_M: tl.constexpr):
    """The tiles of BLOCK_M queries of prefix p: as many as it needs and at times one more, and the
    number of all of them is known without the bounds."""
    return first_row(prefix_cu_rows_ptr, p, B, P) * per_row // BLOCK_M + p


@triton.jit
def prefix_of(
    prefix_cu_rows_ptr, x, B, P, per_row, BLOCK_M: tl.constexpr, ROW: tl.constexpr,
    SEARCH: tl.constexpr,
):  # fmt: skip
    """The last prefix whose first tile, or whose first row, is at most x.

    Unrolled: behind a loop Triton does not know how addresses made of its result are aligned.
    """
    found = tl.full([], 0, tl.int32)
    for i in tl.static_range(SEARCH):
        further = tl.minimum(found + (1 << (SEARCH - 1 - i)), P - 1)
        if ROW:
            first = first_row(prefix_cu_rows_ptr, further, B, P)
        else:
            first = first_tile(prefix_cu_rows_ptr, further, B, P, per_row, BLOCK_M)
        found = tl.where(first <= x, further, found)
    return found


@triton.jit
def aligned(x, ALIGNED: tl.constexpr):
    """x, telling the compiler where it is a multiple of 16."""
    if ALIGNED:
        x = tl.multiple_of(x // 16 * 16, 16)
    return x
