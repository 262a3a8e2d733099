"""Discounted returns, in one pass."""

from typing import Any

from torch import Tensor

from fastrl import reference
from fastrl.ops import _binary, _returns, _returns_grad

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
        "discounted_returns", rewards, {}, gamma, 1.0,
        bootstrap_value, next_values, terminated, truncated, mask, cu_seqlens,
    )  # fmt: skip
    return _discounted_returns(*steps)


discounted_returns.__doc__ = reference.discounted_returns.__doc__


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _returns_grad.Path.save(ctx, inputs, 1)


def _backward(ctx: Any, grad_returns: Tensor | None) -> Any:
    return _returns_grad.td_backward(ctx, grad_returns, own=False, only_at_cuts=True)


_binary.register_fake("discounted_returns", _returns.empty_returns)
_binary.register_autograd("discounted_returns", _backward, setup_context=_setup_context)
