"""RMSNorm layers of a model on a CPU, by fewer passes over small tensors than the model's own.

A step of sampling normalises few rows, where each operation costs more than its arithmetic: 64 rows
of 256 behind a product take 46 us as transformers computes them and 21 us here, on two cores.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

_WORST = 2e-6  # of the largest output, where both ways are within rounding of the exact one


@dataclass(frozen=True)
class Norm:
    """x factor / sqrt(mean x^2 + eps); without a factor x itself."""

    factor: Tensor | None  # [D]
    eps: float


def quick_norms(module: nn.Module) -> dict[Any, Callable[[Tensor], Tensor]]:
    """By layer, another forward that computes the same, without gradients.

    Of layers in float32 alone whose output on a trial is what weight and eps lead to expect. What
    is written to the weight later has no effect.
    """
    if torch.is_autocast_enabled("cpu"):
        return {}
    found = {layer: norm_of(layer) for layer in module.modules()}
    return {layer: _rms_norm(norm, layer.forward) for layer, norm in found.items() if norm}


@torch.no_grad()
def norm_of(layer: Any) -> Norm | None:
    """What an RMSNorm layer computes, by its output on a trial; None of another layer."""
    eps = _eps(layer)
    if eps is None or not _is_ours(layer):
        return None
    weight = layer.weight.detach()
    # Rows of different sizes: in the second eps is half of what counts.
    row = torch.linspace(-1.0, 2.0, weight.numel(), dtype=torch.float32, device="cpu")
    trial = torch.stack([row, row * (eps**0.5 / row.norm() * weight.numel() ** 0.5)])[:, None]
    expected = layer.forward(trial)
    if not isinstance(expected, Tensor) or expected.shape != trial.shape:
        return None
    for factor in (weight, 1.0 + weight):  # as in Llama, as in Gemma
        norm = Norm(factor, eps)
        error = (_rms_norm(norm, layer.forward)(trial) - expected).abs().max()
        if error <= _WORST * expected.abs().max():
            return norm
    return None


def _is_ours(layer: Any) -> bool:
    weight = getattr(layer, "weight", None)
    return (
        type(layer).__name__.endswith("RMSNorm")
        and "forward" not in layer.__dict__  # where somebody else has put one
        and isinstance(weight, Tensor)
        and weight.is_cpu
        and weight.dtype == torch.float32
        and weight.dim() == 1
        and weight.numel() > 0
    )


def _eps(layer: Any) -> float | None:
    eps = getattr(layer, "variance_epsilon", getattr(layer, "eps", None))
    return eps if isinstance(eps, float) and eps >= 0 else None


def _rms_norm(kind: Norm, own: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """As x (factor sqrt D) / sqrt(|x|^2 + D eps)."""
    assert kind.factor is not None
    width = len(kind.factor)
    scaled = kind.factor * width**0.5
    floor = kind.factor.new_tensor((width * kind.eps) ** 0.5)

    def norm(x: Tensor) -> Tensor:
        if x.dtype != torch.float32 or x.shape[-1] != width:
            return own(x)
        size = torch.linalg.vector_norm(x, dim=-1, keepdim=True).hypot_(floor)
        return torch.mul(x, scaled).div_(size)

    return norm
