"""What the estimators of returns share: argument checks, and the layouts of their kernels."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastrl.ops import _checks

# What the op schemas share, in their order: rewards, the op's further tensors, bootstrap_value,
# next_values, terminated, truncated, mask, cu_seqlens, gamma_per_step, lambda_per_step, gamma,
# gae_lambda.
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
    further: dict[str, Tensor],
    gamma: float | Tensor,
    gae_lambda: float | Tensor,
    bootstrap_value: Tensor | None,
    next_values: Tensor | None,
    terminated: Tensor | None,
    truncated: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
) -> Steps:
    """The arguments in the order of the schemas, laid out as the kernels take them.

    A call on a small batch is mostly this, so what is usual is seen at a glance and in one frame;
    the functions below look closer, and say what is wrong. further: by name, shaped like rewards.
    """
    floats, shape, device, here = _checks.FLOATS, None, None, False
    if isinstance(rewards, Tensor):
        shape, device = rewards.shape, rewards.device
        here = rewards.is_cpu or device.type in _checks.IMPLEMENTATIONS[op]
    if not (shape and here and rewards.dtype in floats):
        _check_rewards(op, rewards)
    given = further if next_values is None else {**further, "next_values": next_values}
    for name, y in given.items():
        if not (
            isinstance(y, Tensor) and y.shape == shape and y.device == device and y.dtype in floats
        ):
            _check_values(op, name, y, rewards)
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
    tensors = [rewards, *further.values()]
    steps: list[Tensor | None] = [
        *tensors, bootstrap_value, next_values, terminated, truncated, mask, cu_seqlens, *per_step
    ]  # fmt: skip
    if rewards.is_cuda:  # kernels there are built for one dtype
        _convert_to_one_dtype(steps)
    for x in steps:
        if x is not None and not x.is_contiguous():
            return (*_lay_out(steps, len(tensors)), number, lambda_number)
    return (*steps, number, lambda_number)


def _convert_to_one_dtype(steps: list[Tensor | None]) -> None:
    first = steps[0]
    assert first is not None
    dtype = first.dtype
    for x in steps:
        if x is not None and x.dtype is not dtype and x.dtype in _checks.FLOATS:
            break
    else:
        return
    floats = [x for x in steps if x is not None and x.dtype in _checks.FLOATS]
    widest = result_dtype(floats)
    for i, x in enumerate(steps):
        if x is not None and x.dtype in _checks.FLOATS:
            steps[i] = x.to(widest)


def result_dtype(tensors: Sequence[Any]) -> torch.dtype:
    """float32, or float64 where one of them is."""
    doubles = (isinstance(x, Tensor) and x.dtype is torch.float64 for x in tensors)
    return torch.float64 if any(doubles) else torch.float32


def _lay_out(steps: list[Tensor | None], num_tensors: int) -> list[Tensor | None]:
    """All in rows, or all like a transposed [T, B] where rewards are; a copy of what is neither."""
    rewards = steps[0]
    assert rewards is not None
    time_major = is_time_major(rewards)
    bootstrap = num_tensors  # and cu_seqlens: one number per row
    return [
        x
        if x is None
        else x.contiguous()
        if i in (bootstrap, bootstrap + 5)
        else laid_out(x, time_major)
        for i, x in enumerate(steps)
    ]


def laid_out(x: Tensor, time_major: bool) -> Tensor:
    """x [..., T] itself where the kernels take its strides, else a copy."""
    if time_major:
        if _axes_are_one(x.shape[:-1], x.stride()[:-1], 1):
            return x
        return x.movedim(-1, 0).contiguous().movedim(0, -1)
    # The rows of a larger tensor: one stride from row to row, and steps side by side.
    if (x.stride(-1) == 1 or x.shape[-1] <= 1) and _axes_are_one(
        x.shape[:-1], x.stride()[:-1], None
    ):
        return x
    return x.contiguous()


def is_time_major(x: Tensor) -> bool:
    """Whether rows stand side by side in memory, as those of a transposed [T, B] do. A row alone
    does not: a copy of it in this order would be a dense row, which the kernels take for one."""
    if x.dim() < 2 or x.stride(-1) == 1 or x.shape[-1] <= 1 or x.numel() in (0, x.shape[-1]):
        return False
    return _axes_are_one(x.shape[:-1], x.stride()[:-1], 1)


def _axes_are_one(shape: Sequence[int], strides: Sequence[int], stride: int | None) -> bool:
    """Whether axes can be seen as one, of that stride if one is given."""
    for size, step in zip(reversed(shape), reversed(strides), strict=True):
        if size == 1:
            continue
        if stride is not None and step != stride:
            return False
        stride = step * size
    return True


def empty_like_rows(rewards: Tensor, dtype: torch.dtype) -> Tensor:
    """What the kernels allocate for a result."""
    if is_time_major(rewards):
        steps_first = (rewards.shape[-1], *rewards.shape[:-1])
        return rewards.new_empty(steps_first, dtype=dtype).movedim(0, -1)
    return rewards.new_empty(rewards.shape, dtype=dtype)


def empty_returns(rewards: Tensor, *options: Any) -> Tensor:
    """Of an estimator with one result."""
    return empty_like_rows(rewards, result_dtype((rewards, *options)))


def per_row_shape(like: Tensor, cu_seqlens: Tensor | None) -> tuple[int, ...]:
    return like.shape[:-1] if cu_seqlens is None else (cu_seqlens.shape[0] - 1,)


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
    per_row = per_row_shape(rewards, cu_seqlens)
    if x.shape != per_row:
        what = "row" if cu_seqlens is None else "segment"
        raise _checks.fail(
            op,
            f"bootstrap_value {tuple(per_row)}",
            _checks.shape(x),
            f"Pass one value per {what}, that of the state after its last step.",
        )
