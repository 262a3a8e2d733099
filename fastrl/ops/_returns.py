"""What the estimators of returns share: argument checks, and the backward pass of the recursion."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastrl.ops import _binary, _checks

_returns_bwd = _binary.op("returns_bwd")


# What the op schemas share, in their order: rewards, values, bootstrap_value, next_values,
# terminated, truncated, mask, cu_seqlens, gamma_per_step, lambda_per_step, gamma, gae_lambda.
Steps = tuple[Any, ...]


def _discount(op: str, name: str, x: float | Tensor, rewards: Tensor, mask: Tensor | None) -> float:
    """The number, or 1.0 where there is one per step."""
    remedy = f"{name} is a share of what follows: pass a number from 0 to 1."
    if not isinstance(x, Tensor):
        _checks.number(op, name, x, 0.0, 1.0, remedy)
        return float(x)
    _checks.like(op, name, x, "rewards", rewards)
    if x.requires_grad:
        raise _checks.fail(
            op, f"{name} without gradient", "requires_grad=True", f"Use {name}.detach()."
        )
    if _checks.contents_are_known(x):
        right = (x >= 0) & (x <= 1)
        if not bool((right if mask is None else right | ~mask).all()):
            raise _checks.fail(op, f"{name} in [0, 1]", "entries outside it", remedy)
    return 1.0


def check(
    op: str,
    rewards: Tensor,
    values: Tensor | None,
    gamma: float | Tensor,
    gae_lambda: float | Tensor,
    bootstrap_value: Tensor | None,
    next_values: Tensor | None,
    terminated: Tensor | None,
    truncated: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
) -> Steps:
    """The arguments, dense and of one dtype.

    A call on a small batch is mostly this, so what is usual is seen at a glance and in one frame;
    the functions below look closer, and say what is wrong.
    """
    floats, shape, device = _checks.FLOATS, None, None
    if isinstance(rewards, Tensor):
        shape, device = rewards.shape, rewards.device
    if not (shape and rewards.is_cpu and rewards.dtype in floats):
        _check_rewards(op, rewards)
    for name, x in (("values", values), ("next_values", next_values)):
        if x is None or (
            isinstance(x, Tensor) and x.shape == shape and x.device == device and x.dtype in floats
        ):
            continue
        _check_values(op, name, x, rewards)
    for name, x in (("terminated", terminated), ("truncated", truncated), ("mask", mask)):
        if x is None or (
            isinstance(x, Tensor)
            and x.shape == shape
            and x.device == device
            and x.dtype is torch.bool
        ):
            continue
        _checks.bool_like(op, name, x, "rewards", rewards)
    if truncated is not None and next_values is None:
        raise _checks.fail(
            op,
            "next_values with truncated",
            "None",
            "Pass the value of the state that each step led to as next_values.",
        )
    if cu_seqlens is not None:
        if rewards.dim() != 1:
            raise _checks.fail(
                op, "packed rewards [N] with cu_seqlens", _checks.shape(rewards), "Flatten them."
            )
        _checks.cu_seqlens(op, cu_seqlens, rewards.numel(), rewards)
    if bootstrap_value is not None:
        _check_bootstrap(op, bootstrap_value, next_values, rewards, cu_seqlens)
    number = gamma
    if not (type(gamma) is float and 0.0 <= gamma <= 1.0):
        number = _discount(op, "gamma", gamma, rewards, mask)
    lambda_number = gae_lambda
    if not (type(gae_lambda) is float and 0.0 <= gae_lambda <= 1.0):
        lambda_number = _discount(op, "gae_lambda", gae_lambda, rewards, mask)
    per_step = [x if isinstance(x, Tensor) else None for x in (gamma, gae_lambda)]
    numbers: list[Tensor | None] = [rewards, values, bootstrap_value, next_values]
    flags = [terminated, truncated, mask, cu_seqlens]
    steps = numbers + flags + per_step
    dtype = torch.float32
    for x in steps:
        if x is not None and x.dtype is torch.float64:
            dtype = torch.float64
    for i, x in enumerate(steps):
        if x is None or (x.is_contiguous() and (x.dtype is dtype or x.dtype not in floats)):
            continue
        steps[i] = _dense(x, dtype)
    return (*steps, number, lambda_number)


def _dense(x: Tensor, dtype: torch.dtype) -> Tensor:
    return (x.to(dtype) if x.dtype in _checks.FLOATS else x).contiguous()


def _check_rewards(op: str, rewards: Tensor) -> None:
    _checks.float_tensor(op, "rewards", rewards)
    _checks.implemented(op, rewards)
    if rewards.dim() == 0:
        raise _checks.fail(op, "rewards [..., T]", "()", "Pass a time axis.")


def _check_values(op: str, name: str, x: Tensor, rewards: Tensor) -> None:
    _checks.float_tensor(op, name, x)
    if x.shape != rewards.shape:
        remedy = "Pass one value per reward."
        if x.shape[:-1] == rewards.shape[:-1] and x.shape[-1:] == (rewards.shape[-1] + 1,):
            remedy = "Pass the last column as bootstrap_value."
        _checks.same_shape(op, name, x, "rewards", rewards, remedy)
    _checks.same_device(op, name, x, "rewards", rewards)


def _check_bootstrap(
    op: str, x: Tensor, next_values: Tensor | None, rewards: Tensor, cu_seqlens: Tensor | None
) -> None:
    if next_values is not None:
        raise _checks.fail(
            op,
            "one of bootstrap_value and next_values",
            "both",
            "Put the bootstrap values into the last step of next_values.",
        )
    _checks.float_tensor(op, "bootstrap_value", x)
    _checks.same_device(op, "bootstrap_value", x, "rewards", rewards)
    per_row = rewards.shape[:-1] if cu_seqlens is None else (cu_seqlens.numel() - 1,)
    if x.shape != per_row:
        what = "row" if cu_seqlens is None else "segment"
        raise _checks.fail(
            op,
            f"bootstrap_value {tuple(per_row)}",
            _checks.shape(x),
            f"Pass one value per {what}, that of the state after its last step.",
        )


def save(
    ctx: Any,
    bootstrap_value: Tensor | None,
    next_values: Tensor | None,
    steps: tuple[Tensor | None, ...],
    discounts: tuple[float, float],
) -> None:
    """Keeps for the backward pass what the recursion looked like; it needs no values.

    steps: terminated, truncated, mask, cu_seqlens, gamma_per_step, lambda_per_step.
    """
    ctx.save_for_backward(*steps)
    ctx.discounts = discounts
    ctx.has_bootstrap_value = bootstrap_value is not None
    ctx.has_next_values = next_values is not None
    ctx.set_materialize_grads(False)


@dataclass
class StepGrads:
    rewards: Tensor
    shifted_values: Tensor | float  # of v_{t+1}, at the step where it stands in `values`
    bootstrap_value: Tensor | None
    next_values: Tensor | None


def transposed_scan(ctx: Any, grad: Tensor, *, bootstraps_every_step: bool) -> StepGrads:
    rewards, after, bootstrap_value = _returns_bwd(
        grad.contiguous(), bootstraps_every_step, ctx.has_next_values, *ctx.saved_tensors,
        *ctx.discounts,
    )  # fmt: skip
    return StepGrads(
        rewards,
        0.0 if ctx.has_next_values else after,
        bootstrap_value if ctx.has_bootstrap_value else None,
        after if ctx.has_next_values else None,
    )


def keep_steps(ctx: Any, grad: Tensor) -> Tensor:
    """grad with 0 where mask is False: what stands there was not computed from anything."""
    mask = ctx.saved_tensors[2]
    return grad if mask is None else torch.where(mask, grad, 0)


def _returns_bwd_fake(
    grad: Tensor, bootstraps_every_step: bool, has_next_values: bool, *steps: Any
) -> tuple[Tensor, Tensor, Tensor]:
    cu_seqlens = steps[3]
    per_row = grad.shape[:-1] if cu_seqlens is None else (cu_seqlens.shape[0] - 1,)
    return (
        torch.empty_like(grad, memory_format=torch.contiguous_format),
        torch.empty_like(grad, memory_format=torch.contiguous_format),
        grad.new_empty(per_row),
    )


_binary.register_fake("returns_bwd", _returns_bwd_fake)
