"""Retrace, in one pass."""

import math
from typing import Any

from torch import Tensor

from fastrl import reference
from fastrl.ops import _binary, _checks, _returns, _returns_grad

_CLIP = "Pass the largest importance weight; math.inf for none."

_bwd = _binary.op("retrace_returns_bwd")
_retrace_returns = _binary.op("retrace_returns", differentiable=6)


def retrace_returns(
    rewards: Tensor,
    values: Tensor,
    q_values: Tensor,
    log_ratio: Tensor,
    *,
    gamma: float | Tensor,
    gae_lambda: float | Tensor = 1.0,
    c_clip: float = 1.0,
    bootstrap_value: Tensor | None = None,
    next_values: Tensor | None = None,
    terminated: Tensor | None = None,
    truncated: Tensor | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    _checks.number("retrace_returns", "c_clip", c_clip, 0.0, math.inf, _CLIP)
    steps = _returns.check(
        "retrace_returns", rewards,
        {"values": values, "q_values": q_values, "log_ratio": log_ratio}, gamma, gae_lambda,
        bootstrap_value, next_values, terminated, truncated, mask, cu_seqlens,
    )  # fmt: skip
    keep = _binary.may_require_grad(log_ratio)  # for its gradient alone
    returns, _ = _retrace_returns(*steps, float(c_clip), keep)
    return returns


retrace_returns.__doc__ = reference.retrace_returns.__doc__


def _fake(rewards: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    dtype = _returns.result_dtype((rewards, *options))
    returns = _returns.empty_like_rows(rewards, dtype)
    if not options[-1]:
        return returns, rewards.new_empty(0, dtype=dtype)
    return returns, _returns.empty_like_rows(rewards, dtype)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _, td_error = output
    kept = (td_error,) if inputs[-1] else ()
    _returns_grad.Path.save(ctx, inputs, 4, inputs[3], *kept)
    ctx.mark_non_differentiable(td_error)


def _backward(ctx: Any, grad_returns: Tensor | None, *_: Any) -> Any:
    path = _returns_grad.Path(ctx)
    grad = path.grad(grad_returns)
    if grad is None:
        return (None,) * ctx.num_inputs
    log_ratio, *kept = path.kept
    c_clip = ctx.further[0]
    grad_rewards, grad_log_ratio, grad_q_values = _bwd(
        grad, log_ratio, kept[0] if kept else None, *path.steps, c_clip, path.needs(2)
    )
    values, bootstrap_value, next_values = path.through_values(grad_rewards, own=False)
    return path.results(
        grad_rewards,
        values,
        grad_q_values,
        grad_log_ratio if kept else None,
        bootstrap_value,
        next_values,
    )


def _bwd_fake(
    grad: Tensor, log_ratio: Tensor, td_error: Tensor | None, *options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    def empty_if(wanted: bool) -> Tensor:
        return _returns.empty_like_rows(grad, grad.dtype) if wanted else grad.new_empty(0)

    return empty_if(True), empty_if(td_error is not None), empty_if(options[-1])


_binary.register_fake("retrace_returns", _fake)
_binary.register_fake("retrace_returns_bwd", _bwd_fake)
_binary.register_autograd("retrace_returns", _backward, setup_context=_setup_context)
