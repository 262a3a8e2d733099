"""Lambda returns, in one pass."""

from typing import Any

from torch import Tensor

from fastrl import reference
from fastrl.ops import _binary, _returns, _returns_grad

_lambda_returns = _binary.op("lambda_returns", differentiable=4)


def lambda_returns(
    rewards: Tensor,
    values: Tensor,
    *,
    gamma: float | Tensor,
    gae_lambda: float | Tensor,
    bootstrap_value: Tensor | None = None,
    next_values: Tensor | None = None,
    terminated: Tensor | None = None,
    truncated: Tensor | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    steps = _returns.check(
        "lambda_returns", rewards, {"values": values}, gamma, gae_lambda,
        bootstrap_value, next_values, terminated, truncated, mask, cu_seqlens,
    )  # fmt: skip
    return _lambda_returns(*steps)


lambda_returns.__doc__ = reference.lambda_returns.__doc__


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _returns_grad.Path.save(ctx, inputs, 2)


def _backward(ctx: Any, grad_returns: Tensor | None) -> Any:
    return _returns_grad.td_backward(ctx, grad_returns)


_binary.register_fake("lambda_returns", _returns.empty_returns)
_binary.register_autograd("lambda_returns", _backward, setup_context=_setup_context)
