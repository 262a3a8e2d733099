"""N-step returns, in time that does not grow with n on a CPU."""

from typing import Any

from torch import Tensor

from fastrl import reference
from fastrl.ops import _binary, _checks, _returns, _returns_grad

_bwd = _binary.op("n_step_returns_bwd")
_n_step_returns = _binary.op("n_step_returns", differentiable=4)


def n_step_returns(
    rewards: Tensor,
    values: Tensor,
    *,
    gamma: float | Tensor,
    n: int,
    bootstrap_value: Tensor | None = None,
    next_values: Tensor | None = None,
    terminated: Tensor | None = None,
    truncated: Tensor | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    _checks.whole("n_step_returns", "n", n, 1)
    steps = _returns.check(
        "n_step_returns", rewards, {"values": values}, gamma, 1.0,
        bootstrap_value, next_values, terminated, truncated, mask, cu_seqlens,
    )  # fmt: skip
    return _n_step_returns(*steps, min(n, 2**62))


n_step_returns.__doc__ = reference.n_step_returns.__doc__


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _returns_grad.Path.save(ctx, inputs, 2)


def _backward(ctx: Any, grad_returns: Tensor | None) -> Any:
    path = _returns_grad.Path(ctx)
    grad = path.grad(grad_returns)
    if grad is None:
        return (None,) * ctx.num_inputs
    grad_rewards, grad_next = _bwd(grad, *path.steps, *ctx.further)
    values, bootstrap_value, next_values = path.through_values(
        grad_rewards, grad_next=grad_next, own=False
    )
    return path.results(grad_rewards, values, bootstrap_value, next_values)


def _bwd_fake(grad: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    grad_rewards, grad_next = (_returns.empty_like_rows(grad, grad.dtype) for _ in range(2))
    return grad_rewards, grad_next


_binary.register_fake("n_step_returns", _returns.empty_returns)
_binary.register_fake("n_step_returns_bwd", _bwd_fake)
_binary.register_autograd("n_step_returns", _backward, setup_context=_setup_context)
