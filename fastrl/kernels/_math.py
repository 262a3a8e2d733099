"""Sums in a fixed order, and log1p and expm1 that are exact near 0 wherever the kernel runs.

The hardware's logarithm is exact to a fixed number of digits after the point, which near 1 are
none of the digits that count; libdevice has better ones, but not in the interpreter. These are
called once a row.
"""

import triton
import triton.language as tl

LOG2E = 1.4426950408889634


@triton.jit
def log1p(z):
    """log(1 + z) = 2 artanh(s), s = z / (2 + z), by its series where z is small; z >= -1."""
    near = (z < 0.5) & (z > -0.3)
    s = tl.where(near, z / (2.0 + z), 0.0)
    q = s * s  # at most 0.04
    series = 1.0 + q * (1 / 3 + q * (1 / 5 + q * (1 / 7 + q * (1 / 9 + q * (1 / 11)))))
    far = tl.log(tl.where(near, 1.0, 1.0 + z))
    return tl.where(near, 2.0 * s * series, far)


@triton.jit
def expm1(y):
    """exp(y) - 1 for y <= 0, by its series where y is small."""
    near = y > -0.5
    t = tl.where(near, y, 0.0)
    series = t * (1 / 5040 + t * (1 / 40320 + t * (1 / 362880)))
    series = t * (1 / 6 + t * (1 / 24 + t * (1 / 120 + t * (1 / 720 + series))))
    series = t + t * t * 0.5 + t * t * series
    return tl.where(near, series, tl.exp(y) - 1.0)


@triton.jit
def folded(x, SIZE: tl.constexpr, INTO: tl.constexpr):
    """Sums of x [SIZE], powers of two, over the entries INTO apart, by halves: [INTO].

    tl.sum adds first what one thread holds, and that follows from the alignment of x in memory.
    Between two numbers there is but one order.
    """
    for i in tl.static_range(31):
        if SIZE >> i > INTO:
            x = tl.sum(tl.reshape(x, [2, SIZE >> (i + 1)]), axis=0)
    return x


@triton.jit
def _halves(x, SIZE: tl.constexpr):
    return tl.split(tl.trans(tl.reshape(x, [2, SIZE // 2])))


@triton.jit
def folded_products(a, b, SIZE: tl.constexpr, INTO: tl.constexpr):
    """folded(a * b), where half of the products are rounded with their first sum."""
    if SIZE == INTO:
        return a * b
    else:
        a, more_a = _halves(a, SIZE)
        b, more_b = _halves(b, SIZE)
        return folded(tl.math.fma(a, b, more_a * more_b), SIZE // 2, INTO)


@triton.jit
def ordered_sum(x, SIZE: tl.constexpr):
    """Sum of x [SIZE], a power of two, with the same bits however threads share x.

    From neighbours up: threads that hold neighbours, as they do of what they load 16 bytes at a
    time, add those first, and hand on a single number.
    """
    for i in tl.static_range(31):
        if SIZE >> i > 1:
            x = tl.sum(tl.reshape(x, [SIZE >> (i + 1), 2]), axis=1)
    return tl.sum(x, axis=0)


@triton.jit
def ordered_sums(x, ROWS: tl.constexpr, SIZE: tl.constexpr):
    """The sum of each row of x [ROWS, SIZE], powers of two, by halves as folded."""
    x = tl.reshape(tl.trans(x), [SIZE * ROWS])
    for i in tl.static_range(31):
        if SIZE >> i > 1:
            x = tl.sum(tl.reshape(x, [2, (SIZE >> (i + 1)) * ROWS]), axis=0)
    return x


@triton.jit
def tanh(x):
    """By an odd polynomial near 0, where 1 - exp(-2 |x|) would cancel."""
    size = tl.abs(x)
    e = tl.exp(-2.0 * size)
    far = (1.0 - e) / (1.0 + e)
    z = x * x
    p = tl.math.fma(z, -5.70498872745e-3, 2.06390887954e-2)
    p = tl.math.fma(p, z, -5.37397155531e-2)
    p = tl.math.fma(p, z, 1.33314422036e-1)
    p = tl.math.fma(p, z, -3.33332819422e-1)
    near = tl.math.fma(p * z, x, x)
    return tl.where(size < 0.625, near, tl.where(x < 0, -far, far))
