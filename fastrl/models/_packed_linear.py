"""Linear layers while their weights stay: on a CPU, laid out once for all products of a rollout.

A decoding step multiplies few rows with every weight. There oneDNN, given a weight in its own
layout, takes half the time of the product that torch calls (64 rows, two cores: 200 GFLOP/s
against 115). The layout is a copy of the weight, which lives as long as the rollout.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

_FEWEST_ROWS = 4  # a matrix times a vector or two is as fast without
Linear = Callable[[Tensor], Tensor]


def packed_linear(weight: Tensor, bias: Tensor | None, rows: int) -> Linear | None:
    """x [..., K] -> x weight^T + bias, [..., N], without gradient; None where torch's own is best.

    Args:
        weight: [N, K]; what is written to it later has no effect.
        bias: [N], or None.
        rows: how many there mostly are; any number works.
    """
    if rows < _FEWEST_ROWS:
        return None
    is_float = weight.dtype == torch.float32 and (bias is None or bias.dtype == torch.float32)
    if not (weight.is_cpu and is_float and torch.backends.mkldnn.is_available()):
        return None
    product = torch.ops.mkldnn._linear_pointwise
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), rows)
    bias = None if bias is None else bias.detach()

    def linear(x: Tensor) -> Tensor:
        return product(x, packed, bias, "none", [], "")

    return linear


class PackedLayers:
    """The linear layers of a module, packed for products with few rows.

    Where autocast is on, they stay as they are: it has weights of its own.

    Args:
        module: with nn.Linear and transformers' Conv1D in it, at any depth.
        rows: how many there mostly are.
    """

    def __init__(self, module: nn.Module, rows: int) -> None:
        self._layers: list[tuple[dict[str, Any], Linear]] = []
        if torch.is_autocast_enabled("cpu"):
            return
        for layer in module.modules():
            if "forward" in layer.__dict__:  # somebody else has put one there
                continue
            if type(layer) is nn.Linear:
                packed = packed_linear(layer.weight, layer.bias, rows)
            elif type(layer).__name__ == "Conv1D":  # whose weight is [K, N]
                packed = packed_linear(layer.weight.t(), layer.bias, rows)  # type: ignore
            else:
                continue
            if packed is not None:
                self._layers.append((layer.__dict__, packed))

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """The layers compute with what was packed."""
        try:
            for attributes, packed in self._layers:
                attributes["forward"] = packed  # before the one of the class
            yield
        finally:
            for attributes, _ in self._layers:
                attributes.pop("forward", None)
