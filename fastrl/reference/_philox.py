"""Philox-4x32-10, a counter-based random number generator (Salmon et al. 2011, Random123)."""

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


def philox_4x32_10(counter: tuple[Tensor, ...], key: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Four random words from a counter of four words and a key of two.

    Words are int64 tensors in [0, 2^32), of shapes that broadcast.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        high0, low0 = _multiply(_MULTIPLIERS[0], c0)
        high1, low1 = _multiply(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _KEY_STEPS[0]) & _MASK, (k1 + _KEY_STEPS[1]) & _MASK
    return c0, c1, c2, c3


def uniform(seeds: Tensor, step: int, dtype: torch.dtype) -> Tensor:
    """One number in [0, 1) per seed: 24 bits of it for float32, 53 for float64.

    The key is the seed's low and high word, the counter (step low, step high, 0, 0). float32
    takes the upper 24 bits of the first word, float64 the upper 27 of the first before the upper
    26 of the second, so that both begin with the same bits.
    """
    zero = torch.zeros_like(seeds)
    counter = (zero + (step & _MASK), zero + ((step >> 32) & _MASK), zero, zero)
    first, second, _, _ = philox_4x32_10(counter, (seeds & _MASK, (seeds >> 32) & _MASK))
    if dtype == torch.float64:
        return (((first >> 5) << 26) + (second >> 6)).double() * 2.0**-53
    return (first >> 8).float() * 2.0**-24


def _multiply(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """High and low word of a * b, which itself would not fit into a signed int64."""
    upper, lower = a * (b >> 16), a * (b & 0xFFFF)  # a * b = upper * 2^16 + lower
    middle = upper + (lower >> 16)
    return middle >> 16, ((middle & 0xFFFF) << 16) | (lower & 0xFFFF)
