"""The linear layers of a model on a CPU, with the products of `fastrl.ops._quick_product`.

While weights stay, as in a rollout, each one can also be laid out once in oneDNN's own way: for 64
rows on two cores 200 GFLOP/s, against 154 with the weight as it lies and 111 with torch's product.
The layout is a copy of the weight, which lives as long as the rollout. Layers that read one input
are then one product: queries, keys and values of 64 rows of 256 take 157 us, and one by one 202.
"""

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fastrl.models._norms import quick_norms
from fastrl.ops._quick_product import is_quick, quick_product

Linear = Callable[[Tensor], Tensor]
_uncounted = itertools.count(1)
# Names of layers of one module that read the same input.
_SHARING = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


@contextmanager
def quick_layers(module: nn.Module) -> Iterator[None]:
    """Linear layers of a module compute by quick products, gradients too."""
    with _replaced({layer: _learning(layer) for layer in _layers(module)}):
        yield


class PackedLayers:
    """Linear layers of a module, packed for products with few rows, and quick norms; without
    gradients.

    Args:
        module: with nn.Linear and transformers' Conv1D in it, at any depth. What is written to
            their weights later has no effect.
        rows: how many there mostly are.
    """

    def __init__(self, module: nn.Module, rows: int) -> None:
        self._packed = quick_norms(module)
        layers = _layers(module)
        for group in _sharing(module, layers):
            self._packed.update(_packed_together(group, rows))
        for layer in layers:
            if layer in self._packed:
                continue
            packed = packed_linear(_weight(layer), layer.bias, rows)
            if packed is not None:
                self._packed[layer] = packed

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """The layers compute with what was packed."""
        with _replaced(self._packed):
            yield


def packed_linear(weight: Tensor, bias: Tensor | None, rows: int) -> Linear | None:
    """x [..., K] -> x weight^T + bias, [..., N], without gradient; None where torch's own is best.

    Args:
        weight: [N, K]; what is written to it later has no effect.
        bias: [N], or None.
        rows: how many there mostly are; any number works.
    """
    if not is_quick(weight.new_empty(rows, weight.shape[1]), weight):
        return None
    weight, bias = weight.detach().contiguous(), None if bias is None else bias.detach()
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, rows)

    def linear(x: Tensor) -> Tensor:
        return quick_product(x, packed, bias)

    return linear


class _OneInput:
    """The parts of one product of x, for the layers that read x one after the other.

    Any other order of calls, and an x that was written to in between, is computed anew.
    """

    def __init__(self, product: Linear, sizes: list[int]) -> None:
        self._product, self._sizes = product, sizes
        self._x: Tensor | None = None
        self._version = 0
        self._parts: dict[int, Tensor] = {}  # those that no layer has taken

    def part(self, i: int) -> Linear:
        """The i-th layer's forward."""

        def linear(x: Tensor) -> Tensor:
            if self._x is not x or i not in self._parts or self._version != _version(x):
                parts = self._product(x).split(self._sizes, -1)
                self._x, self._version, self._parts = x, _version(x), dict(enumerate(parts))
            part = self._parts.pop(i)
            if not self._parts:  # of long prompts they are large
                self._x = None
            return part

        return linear


def _version(x: Tensor) -> int:
    """How often x was written to; below 0, equal to no earlier one, where that is not counted."""
    return -next(_uncounted) if x.is_inference() else x._version


def _sharing(module: nn.Module, layers: list[Any]) -> list[list[Any]]:
    """Groups of layers that read one input."""
    ours, groups = set(layers), []
    for parent in module.modules():
        for names in _SHARING:
            group = [getattr(parent, name, None) for name in names]
            if ours.issuperset(group) and len(set(group)) == len(group):
                groups.append(group)
    return groups


def _packed_together(group: list[Any], rows: int) -> dict[Any, Linear]:
    """By layer, its part of one product; nothing where they must be computed one by one."""
    weights, biases = [_weight(layer) for layer in group], [layer.bias for layer in group]
    kinds = {(weight.shape[1], weight.dtype) for weight in weights}
    if len(kinds) > 1 or len({bias is None for bias in biases}) > 1:
        return {}
    bias = None if biases[0] is None else torch.cat(biases)
    product = packed_linear(torch.cat(weights), bias, rows)
    if product is None:
        return {}
    together = _OneInput(product, [len(weight) for weight in weights])
    return {layer: together.part(i) for i, layer in enumerate(group)}


class _QuickLinear(torch.autograd.Function):
    """x [N, K], weight [V, K], bias [V] or None -> [N, V]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return quick_product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        needs = ctx.needs_input_grad
        return (
            quick_product(grad, weight.t()) if needs[0] else None,
            grad.t() @ x if needs[1] else None,
            grad.sum(0) if needs[2] else None,
        )


def _learning(layer: Any) -> Linear:
    def linear(x: Tensor) -> Tensor:
        weight, rows = _weight(layer), x.reshape(-1, x.shape[-1])
        if not is_quick(rows, weight):
            return F.linear(x, weight, layer.bias)
        return _QuickLinear.apply(rows, weight, layer.bias).view(*x.shape[:-1], -1)

    return linear


def _layers(module: nn.Module) -> list[Any]:
    """Those whose computation is ours to replace. Autocast has weights of its own."""
    if torch.is_autocast_enabled("cpu"):
        return []
    return [
        layer
        for layer in module.modules()
        if (type(layer) is nn.Linear or type(layer).__name__ == "Conv1D")
        and "forward" not in layer.__dict__  # where somebody else has put one
        and _weight(layer).is_cpu
    ]


def _weight(layer: Any) -> Tensor:
    """[N, K]; transformers' Conv1D has [K, N]."""
    return layer.weight if type(layer) is nn.Linear else layer.weight.t()


@contextmanager
def _replaced(forwards: dict[Any, Linear]) -> Iterator[None]:
    """Layers with another forward, in the instance and so before that of the class."""
    try:
        for layer, forward in forwards.items():
            layer.__dict__["forward"] = forward
        yield
    finally:
        for layer in forwards:
            layer.__dict__.pop("forward", None)
