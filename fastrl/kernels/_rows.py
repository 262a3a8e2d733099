"""Rows of logits with any strides, and the running sums over them: shared by the kernels that must
give a row the same log-probability, bit for bit."""

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def row_start(n, inner_size, stride_outer, stride_inner, ALIGNED: tl.constexpr):
    """Offset of row n of an [outer, inner, V] tensor with any strides on its first two axes."""
    offset = (n // inner_size) * stride_outer + (n % inner_size) * stride_inner
    if ALIGNED:
        offset = tl.multiple_of(offset, 16)
    return offset


@triton.jit
def below(m, m_new, rest, count, weighted, scale):
    """Sums relative to the maximum m, made relative to m_new >= m."""
    gap = m_new - m
    shrink = tl.exp2(-gap * scale)
    total = rest + count
    moved = m < m_new
    # gap is infinite between entries at the two ends of float32.
    shifted = tl.where(shrink > 0, shrink * (weighted + gap * total), 0.0)
    return (
        tl.where(moved, shrink * total, rest),
        tl.where(moved, 0.0, count),
        tl.where(moved, shifted, weighted),
    )


def block_for(vocab: int, blocks: tuple[dict[str, int], ...]) -> dict[str, int]:
    """Configuration of a kernel that walks a row: of the vocabulary's size alone."""
    return blocks[0] if vocab <= blocks[0]["BLOCK_V"] else blocks[1]


def rows_of(x: Tensor) -> tuple[Tensor, int, int, int]:
    """x [..., V], dense along V, as (x, inner_size, stride_outer, stride_inner); a copy only where
    its leading axes do not fold into two."""
    if x.dim() == 1:
        return x, 1, 0, x.shape[0]  # as in a batch of one
    if x.dim() == 2:
        return x, max(1, x.shape[0]), 0, x.stride(0)
    if x.dim() > 3:
        x = x.flatten(0, -3)
    return x, max(1, x.shape[1]), x.stride(0), x.stride(1)


def finite(scale: float) -> float:
    """Of float32: infinity times the 0 of a row's maximum would be NaN."""
    return min(scale, 3e38)
