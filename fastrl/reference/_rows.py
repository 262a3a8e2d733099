"""Sequences as padded rows: [..., T] and packed [N] become one case."""

import math

import torch
from torch import Tensor


class Rows:
    """Lays per-token tensors out as [R, T] rows, and takes them back to the caller's shape.

    The caller's shape is that of `like`: [..., T], or packed [N] with cu_seqlens [R + 1].
    `valid` [R, T] is True where a row has a token that `mask` (True = counts) does not exclude.
    """

    valid: Tensor

    def __init__(self, like: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None) -> None:
        self.caller_shape = like.shape
        self._packed_index: Tensor | None = None
        if cu_seqlens is None:
            self._exists = like.new_ones(like.shape, dtype=torch.bool)
            self._exists = self._to_rows(self._exists)
        else:
            bounds = cu_seqlens.to(like.device, torch.int64)
            lengths = bounds.diff()
            longest = int(lengths.max()) if lengths.numel() else 0
            offsets = torch.arange(longest, device=like.device)  # [T]
            self._exists = offsets < lengths[:, None]  # [R, T]
            self._packed_index = (bounds[:-1, None] + offsets).masked_fill(~self._exists, 0)
        self.valid = self._exists if mask is None else self._exists & self._to_rows(mask)

    def pad(self, tensor: Tensor) -> Tensor:
        """[R, T] rows of a tensor in the caller's shape; 0 (False) wherever not valid.

        What stands there is replaced and not multiplied, so that a NaN reaches no gradient either.
        """
        return self._to_rows(tensor).masked_fill(~self.valid, 0)

    def unpad(self, rows: Tensor) -> Tensor:
        """The caller's shape from [R, T] rows; 0 at excluded tokens."""
        rows = rows.masked_fill(~self.valid, 0)
        return rows.reshape(self.caller_shape) if self._packed_index is None else rows[self._exists]

    def _to_rows(self, tensor: Tensor) -> Tensor:
        if self._packed_index is not None:
            return tensor[self._packed_index]
        *leading, steps = self.caller_shape
        return tensor.reshape(math.prod(leading), steps)  # -1 would be ambiguous for T = 0
