"""Lambda returns, in one pass."""

from typing import Any

import torch
from torch import Tensor

from fastrl import reference
from fastrl.ops import _binary, _returns

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
        "lambda_returns", rewards, values, gamma, gae_lambda, bootstrap_value, next_values,
        terminated, truncated, mask, cu_seqlens,
    )  # fmt: skip
    return _lambda_returns(*steps)


lambda_returns.__doc__ = reference.lambda_returns.__doc__


def _fake(rewards: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(rewards)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _, _, bootstrap_value, next_values, *steps, gamma, gae_lambda = inputs
    _returns.save(ctx, bootstrap_value, next_values, tuple(steps), (gamma, gae_lambda))


def _backward(ctx: Any, grad_returns: Tensor | None) -> Any:
    if grad_returns is None:
        return (None,) * 12
    g = _returns.transposed_scan(ctx, grad_returns, bootstraps_every_step=True)
    grad_values = g.shifted_values - g.rewards + _returns.keep_steps(ctx, grad_returns)
    return g.rewards, grad_values, g.bootstrap_value, g.next_values, *(None,) * 8


_binary.register_fake("lambda_returns", _fake)
_binary.register_autograd("lambda_returns", _backward, setup_context=_setup_context)
