"""Products of rows with a weight on a CPU, through oneDNN where that is quicker than torch's own.

torch gives float32 products to MKL, which splits those of few rows badly over threads and packs the
weight anew each time. oneDNN reads the weight as it lies, a transposed one too. Two cores with
AVX-512, GFLOP/s: 64 rows of 256 to 1024 columns 111 and 154; 256 rows to 8192 columns 137 and 193;
5120 rows 170 and 211. The gradient of a weight stays with MKL: 182 and 143.
"""

import platform

import torch
from torch import Tensor

_FEWEST_ROWS = 16  # 8 rows of 256 to 1024 columns: 66 and 57
_IS_X86 = platform.machine().lower() in ("x86_64", "amd64")  # measured nowhere else


def is_quick(x: Tensor, weight: Tensor) -> bool:
    """Whether `quick_product` takes x [N, K] and weight [V, K], and is the better way."""
    return bool(
        _IS_X86
        and x.is_cpu
        and x.dtype == weight.dtype == torch.float32
        and x.dim() == weight.dim() == 2
        and x.shape[0] >= _FEWEST_ROWS
        and weight.numel() > 0
        and torch.backends.mkldnn.is_available()
        and torch.backends.mkldnn.enabled
    )


def quick_product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x weight^T + bias: [N, K], [V, K] of any strides, [V] -> [N, V]; without a graph."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class PackedWeight:
    """A weight [V, K] in oneDNN's own layout, and a bias; all products are without a graph.

    Args:
        weight, bias: what is written to them later has no effect on the products.
        rows: how many of x there mostly are; any number works.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, rows: int) -> None:
        self._bias = None if bias is None else bias.detach()
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), rows)

    def product(self, x: Tensor) -> Tensor:
        """x weight^T + bias: [..., K] -> [..., V]."""
        return quick_product(x, self._weight, self._bias)

    def activated(self, x: Tensor, name: str, algorithm: str) -> Tensor:
        """An activation of the product, by oneDNN's name for it."""
        return torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, name, [], algorithm)

    def times(self, x: Tensor, other: Tensor) -> Tensor:
        """The product times other [..., V], number by number."""
        return torch.ops.mkldnn._linear_pointwise.binary(x, other, self._weight, self._bias, "mul")
