"""How attention's tensors come into its kernels: their strides, descriptors of them, and copies of
the few that fit neither."""

from typing import Any

import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fastrl.kernels._attention_configs import chip, descriptors_fit

_MAX_ROW_STRIDE = 2**24  # so that the rows of a block lie within 32 bits of its first


def rows(x: Tensor) -> Tensor:
    """x, or a copy where its rows are not dense, do not begin at multiples of 16 bytes, or lie too
    far apart. Neither transposed heads nor parts of one projection need one."""
    unit = 16 // x.element_size()
    strides = [s for n, s in zip(x.shape[:3], x.stride(), strict=False) if n > 1]
    dense = x.stride(3) == 1 or x.shape[3] == 1
    aligned = x.data_ptr() % 16 == 0 and all(s % unit == 0 for s in strides)
    near = x.stride(2) < _MAX_ROW_STRIDE or x.shape[2] == 1
    if dense and aligned and near:
        return x
    head_size = x.shape[3]
    copy = x.new_empty((*x.shape[:3], triton.cdiv(head_size, unit) * unit))[..., :head_size]
    return copy.copy_(x)


def like(x: Tensor) -> Tensor:
    """Empty, of the shape of x, in memory order [B, T, H, D] whatever that of x is: torch.compile
    is told so, and models want it so."""
    batch, heads, tokens, width = x.shape
    return x.new_empty((batch, tokens, heads, width)).transpose(1, 2)


def sources(exist: bool, block: int, block_d: int, **tensors: Tensor) -> dict[str, Any]:
    """What a kernel walks through in blocks: descriptors where they fit, or the tensors.

    exist: whether all of their rows do; a descriptor would load NaN from one that does not.
    """
    if not exist or not descriptors_fit(chip(), *tensors.values()):
        return {**tensors, "DESCRIPTORS": False}
    descriptors = {
        name: TensorDescriptor(x, list(x.shape), _legal_strides(x), [1, 1, block, block_d])
        for name, x in tensors.items()
    }
    return {**descriptors, "DESCRIPTORS": True}


def _legal_strides(x: Tensor) -> list[int]:
    """Of an axis of size 1 the stride means nothing, and may be anything."""
    return [8 if n == 1 else s for n, s in zip(x.shape[:3], x.stride(), strict=False)] + [1]


def strides(unit_name: str, **tensors: Tensor) -> dict[str, int]:
    """Of batch, heads and rows, in units of 16 bytes where all of them are multiples of that."""
    found = {}
    for name, x in tensors.items():
        of_rows = "t" if name in ("query", "output", "residue", "grad") else "s"
        for axis, letter in enumerate(("b", "h", of_rows)):
            found[f"{name}_{letter}"] = x.stride(axis) if x.shape[axis] > 1 else 0
    unit = 16 // next(iter(tensors.values())).element_size()
    if any(stride % unit for stride in found.values()):
        unit = 1
    return {**{name: stride // unit for name, stride in found.items()}, unit_name: unit}
