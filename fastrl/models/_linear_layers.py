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

from fastrl.models._norms import quick_norms
from fastrl.models._quick_blocks import quick_attention, quick_mlp
from fastrl.ops._quick_product import PackedWeight, is_quick, quick_product

Linear = Callable[[Tensor], Tensor]
_uncounted = itertools.count(1)
# Names of layers of one module that read the same input.
_GATED = ("gate_proj", "up_proj")
_SHARING = (("q_proj", "k_proj", "v_proj"), _GATED)


@contextmanager
def quick_layers(module: nn.Module) -> Iterator[None]:
    """Linear layers of a module compute by quick products, gradients too."""
    with _replaced({layer: _learning(layer) for layer in _layers(module)}):
        yield


class PackedLayers:
    """What a module's layers and blocks compute with while few rows go through it, on a CPU and
    without gradients: packed weights, quick norms, quick blocks.

    Args:
        module: with nn.Linear and transformers' Conv1D in it, at any depth. What is written to
            their weights later has no effect.
        rows: how many there mostly are.
    """

    def __init__(self, module: nn.Module, rows: int) -> None:
        self._forwards: dict[Any, Callable[..., Any]] = {}
        self._rows = rows
        if torch.is_autocast_enabled("cpu") or _is_compiled(module):
            return
        self._forwards.update(quick_norms(module))
        # Those that are not packed yet.
        self._left = {layer: None for layer in _layers(module) if _is_quick(_weight(layer), rows)}
        for parent in module.modules():
            if not self._pack_mlp(parent):
                self._pack_attention(parent, self._pack_together(parent))
        for layer in self._left:
            self._forwards[layer] = self._pack(layer).product

    def _pack(self, layer: Any) -> PackedWeight:
        return PackedWeight(_weight(layer), layer.bias, self._rows)

    def _pack_mlp(self, parent: Any) -> bool:
        layers = self._found(parent, _GATED)
        quick = quick_mlp(parent, self._pack) if layers else None
        if quick is not None:
            self._forwards[parent] = quick
            self._take(layers)
        return quick is not None

    def _pack_attention(self, parent: Any, product: Linear | None) -> None:
        parameters = parent.parameters()
        if any(not x.is_cpu or x.dtype != torch.float32 for x in parameters):
            return
        quick = quick_attention(parent, product)
        if quick is not None:
            self._forwards[parent] = quick

    def _pack_together(self, parent: Any) -> Linear | None:
        """Layers that read one input as one product, which is returned."""
        for names in _SHARING:
            layers = self._found(parent, names)
            kinds = {(_weight(x).shape[1], x.bias is None) for x in layers}
            if len(kinds) != 1:
                continue
            weights = [_weight(layer) for layer in layers]
            bias = None if layers[0].bias is None else torch.cat([x.bias for x in layers])
            product = PackedWeight(torch.cat(weights), bias, self._rows).product
            together = _OneInput(product, [len(weight) for weight in weights])
            self._forwards |= {layer: together.part(i) for i, layer in enumerate(layers)}
            self._take(layers)
            return product
        return None

    def _found(self, parent: Any, names: tuple[str, ...]) -> list[Any]:
        """Its layers of these names that are still to be packed; none where one is missing, or
        stands there twice."""
        layers = [getattr(parent, name, None) for name in names]
        different = set(layers)
        return layers if len(different) == len(layers) and self._left.keys() >= different else []

    def _take(self, layers: list[Any]) -> None:
        for layer in layers:
            del self._left[layer]

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """The module computes with what was packed. Not under autocast, which may have begun later:
        its inputs are of another dtype."""
        with _replaced({} if torch.is_autocast_enabled("cpu") else self._forwards):
            yield


def packed_linear(weight: Tensor, bias: Tensor | None, rows: int) -> Linear | None:
    """x [..., K] -> x weight^T + bias, [..., N], without gradient; None where torch's own is best.

    Args:
        weight: [N, K]; what is written to it later has no effect.
        bias: [N], or None.
        rows: how many there mostly are; any number works.
    """
    return PackedWeight(weight, bias, rows).product if _is_quick(weight, rows) else None


def _is_quick(weight: Tensor, rows: int) -> bool:
    return is_quick(weight.new_empty(rows, weight.shape[1]), weight)


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


def _by_columns(x: Tensor, weight: Tensor) -> Tensor:
    return quick_product(x, weight.t())


class _QuickLinear(torch.autograd.Function):
    """x [N, K], weight [V, K], bias [V] or None -> [N, V]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return quick_product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        needs = ctx.needs_input_grad
        # With create_graph by what autograd knows how to differentiate again.
        product = torch.matmul if torch.is_grad_enabled() else _by_columns
        return (
            product(grad, weight) if needs[0] else None,
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
    if torch.is_autocast_enabled("cpu") or _is_compiled(module):
        return []
    return [
        layer
        for layer in module.modules()
        if (type(layer) is nn.Linear or type(layer).__name__ == "Conv1D")
        and "forward" not in layer.__dict__  # where somebody else has put one
        and _weight(layer).is_cpu
    ]


def _is_compiled(module: nn.Module) -> bool:
    """Whether torch.compile stands around any part, which has no place for oneDNN's products."""
    parts: Iterator[Any] = module.modules()
    return any(x._compiled_call_impl is not None or "_orig_mod" in x._modules for x in parts)


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
