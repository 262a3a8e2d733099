"""The dtype in which a reference computes."""

import torch
from torch import Tensor


def compute_dtype(*inputs: Tensor | float | None) -> torch.dtype:
    """float64 if any of the tensors is float64, else float32: 16-bit inputs are promoted."""
    if any(isinstance(x, Tensor) and x.dtype == torch.float64 for x in inputs):
        return torch.float64
    return torch.float32


def promote(tensor: Tensor) -> Tensor:
    """The tensor in its compute dtype."""
    return tensor.to(compute_dtype(tensor))
