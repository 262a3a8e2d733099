"""Generalised advantage estimation, in one pass."""

from typing import Any

from torch import Tensor

from fastrl import reference
from fastrl.ops import _binary, _returns, _returns_grad

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
        "gae", rewards, {"values": values}, gamma, gae_lambda,
        bootstrap_value, next_values, terminated, truncated, mask, cu_seqlens,
    )  # fmt: skip
    return _gae(*steps)


gae.__doc__ = reference.gae.__doc__


def _fake(rewards: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    dtype = _returns.result_dtype((rewards, *options))
    return _returns.empty_like_rows(rewards, dtype), _returns.empty_like_rows(rewards, dtype)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _returns_grad.Path.save(ctx, inputs, 2)


def _backward(ctx: Any, grad_advantages: Tensor | None, grad_returns: Tensor | None) -> Any:
    return _returns_grad.td_backward(ctx, grad_advantages, grad_returns)


_binary.register_fake("gae", _fake)
_binary.register_autograd("gae", _backward, setup_context=_setup_context)
