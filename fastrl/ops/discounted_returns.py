"""Discounted returns, in one pass."""

from typing import Any

import torch
from torch import Tensor

from fastrl import reference
from fastrl.ops import _binary, _returns

_discounted_returns = _binary.op("discounted_returns", differentiable=3)


def discounted_returns(
    rewards: Tensor,
    *,
    gamma: float | Tensor,
    bootstrap_value: Tensor | None = None,
    next_values: Tensor | None = None,
    terminated: Tensor | None = None,
    truncated: Tensor | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    steps = _returns.check(
        "discounted_returns", rewards, None, gamma, 1.0, bootstrap_value, next_values, terminated,
        truncated, mask, cu_seqlens,
    )  # fmt: skip
    rewards, _, *others, _, number, _ = steps  # no values, and no lambda
    return _discounted_returns(rewards, *others, number)


discounted_returns.__doc__ = reference.discounted_returns.__doc__


def _fake(rewards: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(rewards)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _, bootstrap_value, next_values, *steps, gamma = inputs
    _returns.save(ctx, bootstrap_value, next_values, (*steps, None), (gamma, 1.0))


def _backward(ctx: Any, grad_returns: Tensor | None) -> Any:
    if grad_returns is None:
        return (None,) * 9
    g = _returns.transposed_scan(ctx, grad_returns, bootstraps_every_step=False)
    return g.rewards, g.bootstrap_value, g.next_values, *(None,) * 6


_binary.register_fake("discounted_returns", _fake)
_binary.register_autograd("discounted_returns", _backward, setup_context=_setup_context)
