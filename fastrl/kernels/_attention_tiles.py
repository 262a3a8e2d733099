"""What the attention kernels share: which program does what, how tiles are loaded and stored, and
softcap."""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
FAR = tl.constexpr(2**30)  # beyond every token and position, and far from overflow


@triton.jit
def lane_and_item(items, lanes, lanes_of_section):
    """Which head of which row, and which of its tiles, is this program's: lanes whose keys fit in
    the L2 cache together are one section after the other, heavy tiles first in each."""
    pid = tl.program_id(0)
    section = pid // (items * lanes_of_section)
    first = section * lanes_of_section
    here = tl.minimum(lanes_of_section, lanes - first)
    within = pid - items * first
    return first + within % here, within // here


@triton.jit
def load_rows(
    source, b, h, row, first, stop, stride,
    DESCRIPTORS: tl.constexpr, HEAD: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """[BLOCK, BLOCK_D]: the rows from `row` on.

    source: a pointer to row 0 of b and h: 0 for rows outside [first, stop). Or a descriptor of
    [.., .., rows, HEAD], which gives 0 only outside the tensor.
    """
    if DESCRIPTORS:
        return tl.reshape(source.load([b, h, row, 0]), [BLOCK, BLOCK_D])
    else:
        offs, offs_d = row + tl.arange(0, BLOCK), tl.arange(0, BLOCK_D)
        exists = ((offs >= first) & (offs < stop))[:, None]
        if HEAD != BLOCK_D:
            exists = exists & (offs_d < HEAD)[None, :]
        # In 64 bits up to the block's first row; within a block 32 do.
        pointers = source + tl.cast(row, tl.int64) * stride
        pointers += tl.arange(0, BLOCK)[:, None] * stride + offs_d[None, :]
        return tl.load(pointers, mask=exists, other=0.0)


@triton.jit
def product(a, b, acc):
    """acc + a @ b, in fp32 if that is what they are. There the operands of one product, which come
    from shared memory, are not to be loaded before the product ahead of it is done: two of them do
    not fit into the registers."""
    if a.dtype == tl.float32:
        tl.debug_barrier()
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def store_rows(
    target, x, row, first, stop, stride,
    HEAD: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """x [BLOCK, BLOCK_D] to those of the rows from `row` on that lie in [first, stop)."""
    offs, offs_d = row + tl.arange(0, BLOCK), tl.arange(0, BLOCK_D)
    mask = ((offs >= first) & (offs < stop))[:, None] & (offs_d < HEAD)[None, :]
    pointers = target + tl.cast(row, tl.int64) * stride
    pointers += tl.arange(0, BLOCK)[:, None] * stride + offs_d[None, :]
    tl.store(pointers, x.to(target.dtype.element_ty), mask=mask)


@triton.jit
def capped(x, PRECISE: tl.constexpr):
    """tanh from exp2; where that has few digits, near 0, by a polynomial if PRECISE: within 1e-7,
    fitted to (tanh(x) / x - 1) / x^2."""
    e = tl.exp2(tl.abs(x) * (-2.0 * LOG2E))
    t = (1.0 - e) / (1.0 + e)
    t = tl.where(x < 0, -t, t)
    if PRECISE:
        z = x * x
        series = tl.math.fma(z, tl.math.fma(z, -0.00661576, 0.02131275), -0.05391007)
        series = tl.math.fma(z, tl.math.fma(z, series, 0.13333118), -0.33333332)
        t = tl.where(z < 0.3, tl.math.fma(z * series, x, x), t)
    return t
