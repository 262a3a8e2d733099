"""V-trace, in one pass."""

import math
from typing import Any

from torch import Tensor

from fastrl import reference
from fastrl.ops import _binary, _checks, _returns, _returns_grad

_CLIP = "Pass the largest importance weight; math.inf for none."

_bwd = _binary.op("vtrace_bwd")
_vtrace = _binary.op("vtrace", differentiable=5)


def vtrace(
    rewards: Tensor,
    values: Tensor,
    log_ratio: Tensor,
    *,
    gamma: float | Tensor,
    rho_clip: float = 1.0,
    c_clip: float = 1.0,
    gae_lambda: float | Tensor = 1.0,
    bootstrap_value: Tensor | None = None,
    next_values: Tensor | None = None,
    terminated: Tensor | None = None,
    truncated: Tensor | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    _checks.number("vtrace", "rho_clip", rho_clip, 0.0, math.inf, _CLIP)
    _checks.number("vtrace", "c_clip", c_clip, 0.0, math.inf, _CLIP)
    steps = _returns.check(
        "vtrace", rewards, {"values": values, "log_ratio": log_ratio}, gamma, gae_lambda,
        bootstrap_value, next_values, terminated, truncated, mask, cu_seqlens,
    )  # fmt: skip
    # What the gradient of log_ratio needs is kept for it alone.
    keep = _binary.may_require_grad(log_ratio)
    advantages, value_targets, _, _ = _vtrace(*steps, float(rho_clip), float(c_clip), keep)
    return advantages, value_targets


vtrace.__doc__ = reference.vtrace.__doc__


def _fake(rewards: Tensor, *options: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = _returns.result_dtype((rewards, *options))

    def empty_if(wanted: bool) -> Tensor:
        like_rows = _returns.empty_like_rows
        return like_rows(rewards, dtype) if wanted else rewards.new_empty(0, dtype=dtype)

    keep = options[-1]
    return empty_if(True), empty_if(True), empty_if(keep), empty_if(keep)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *_, td_error, carried = output
    kept = (td_error, carried) if inputs[-1] else ()
    _returns_grad.Path.save(ctx, inputs, 3, inputs[2], *kept)
    ctx.mark_non_differentiable(td_error, carried)


def _backward(
    ctx: Any, grad_advantages: Tensor | None, grad_targets: Tensor | None, *_: Any
) -> Any:
    path = _returns_grad.Path(ctx)
    grads = path.grad(grad_advantages), path.grad(grad_targets)
    if all(g is None for g in grads):
        return (None,) * ctx.num_inputs
    log_ratio, *kept = path.kept
    grad_rewards, grad_log_ratio = _bwd(
        *grads, log_ratio, *(kept or (None, None)), *path.steps, *ctx.further[:2]
    )
    values, bootstrap_value, next_values = path.through_values(grad_rewards, grads[1], own=True)
    return path.results(
        grad_rewards, values, grad_log_ratio if kept else None, bootstrap_value, next_values
    )


def _bwd_fake(
    grad_advantages: Tensor | None,
    grad_targets: Tensor | None,
    log_ratio: Tensor,
    td_error: Tensor | None,
    *_: Any,
) -> tuple[Tensor, Tensor]:
    grad = grad_targets if grad_advantages is None else grad_advantages
    assert grad is not None
    grad_rewards = _returns.empty_like_rows(grad, grad.dtype)
    if td_error is None:
        return grad_rewards, grad.new_empty(0)
    return grad_rewards, _returns.empty_like_rows(grad, grad.dtype)


_binary.register_fake("vtrace", _fake)
_binary.register_fake("vtrace_bwd", _bwd_fake)
_binary.register_autograd("vtrace", _backward, setup_context=_setup_context)
