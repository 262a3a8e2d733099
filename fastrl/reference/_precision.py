"""The dtype in which a reference computes."""

import torch
from torch import Tensor


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """float64 if any of the tensors is float64, else float32: 16-bit inputs are promoted."""
    if any(tensor is not None and tensor.dtype == torch.float64 for tensor in tensors):
        return torch.float64
    return torch.float32


def promote(tensor: Tensor) -> Tensor:
    """The tensor in its compute dtype."""
    return tensor.to(compute_dtype(tensor))
