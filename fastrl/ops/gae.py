"""Generalised advantage estimation, in one pass."""

from typing import Any

import torch
from torch import Tensor

from fastrl import reference
from fastrl.ops import _binary, _returns

_gae = _binary.op("gae", differentiable=4)


def gae(
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
) -> tuple[Tensor, Tensor]:
    steps = _returns.check(
        "gae", rewards, values, gamma, gae_lambda, bootstrap_value, next_values, terminated,
        truncated, mask, cu_seqlens,
    )  # fmt: skip
    return _gae(*steps)


gae.__doc__ = reference.gae.__doc__


def _fake(rewards: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(rewards), torch.empty_like(rewards)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _, _, bootstrap_value, next_values, *steps, gamma, gae_lambda = inputs
    _returns.save(ctx, bootstrap_value, next_values, tuple(steps), (gamma, gae_lambda))


def _backward(ctx: Any, grad_advantages: Tensor | None, grad_returns: Tensor | None) -> Any:
    grads = [g for g in (grad_advantages, grad_returns) if g is not None]
    if not grads:
        return (None,) * 12
    # returns = advantages + values
    g = _returns.transposed_scan(ctx, sum(grads[1:], grads[0]), bootstraps_every_step=True)
    grad_values = g.shifted_values - g.rewards
    if grad_returns is not None:
        grad_values = grad_values + _returns.keep_steps(ctx, grad_returns)
    return g.rewards, grad_values, g.bootstrap_value, g.next_values, *(None,) * 8


_binary.register_fake("gae", _fake)
_binary.register_autograd("gae", _backward, setup_context=_setup_context)
