"""bfloat16 in Triton's interpreter as a GPU has it.

The interpreter keeps the bits in whole numbers, cuts digits off where a GPU rounds to the nearest,
and computes with the bits themselves. Here casts from and to float32 round as torch does, sums and
products are those of the numbers, and other casts are an error.
"""

from typing import Any

import numpy as np
import torch
import triton.language as tl
from numpy.typing import NDArray


def to_float32(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def from_float32(x: NDArray[np.float32]) -> NDArray[np.uint16]:
    return torch.from_numpy(np.array(x)).bfloat16().view(torch.uint16).numpy()


def install() -> None:
    from triton.runtime import interpreter

    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    cast, dot, binary = builder.cast_impl, builder.create_dot, builder.binary_op

    def is_ours(*tensors: Any) -> bool:
        return any(x.dtype.scalar == tl.bfloat16 for x in tensors)

    def cast_rounded(self: Any, x: Any, dst_type: Any, *_: Any) -> Any:
        kinds = x.dtype.scalar, dst_type.scalar
        if kinds == (tl.bfloat16, tl.float32):
            return handle(to_float32(x.data), tl.float32)
        if kinds == (tl.float32, tl.bfloat16):
            return handle(from_float32(x.data), tl.bfloat16)
        if tl.bfloat16 in kinds:
            raise TypeError(f"a kernel casts {kinds[0]} to {kinds[1]}")
        return cast(self, x, dst_type)

    def dot_of_numbers(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        if is_ours(a, b):
            a, b = (handle(to_float32(x.data), tl.float32) for x in (a, b))
        return dot(self, a, b, *rest)

    def rounded_once(self: Any, a: Any, b: Any, op: Any) -> Any:
        """Two roundings of numbers of 8 bits, the first of them to 24, are as one."""
        if not is_ours(a, b):
            return binary(self, a, b, op)
        found = op(to_float32(a.data), to_float32(b.data))
        return handle(found if found.dtype == bool else from_float32(found), tl.bfloat16)

    def constant(_: Any, value: float) -> Any:
        return handle(from_float32(np.array([value], np.float32)), tl.bfloat16)

    builder.cast_impl, builder.create_dot = cast_rounded, dot_of_numbers
    builder.binary_op, builder.get_bf16 = rounded_once, constant
