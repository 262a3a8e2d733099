"""What all returns share: which step follows which, and how much of the future counts."""

import torch
from torch import Tensor

from fastrl.reference._precision import compute_dtype
from fastrl.reference._rows import Rows


class Trajectories:
    """Rewards as rows [R, T], with the masks, episode ends and discounts that belong to them.

    `continues` [R, T] is c_t = gamma_t (1 - terminated_t), `unbroken` [R, T] is
    k_t = 1 - truncated_t. A step that `mask` excludes does not exist for any of the methods, and
    what stands behind an end is replaced and not multiplied: 0 * inf would be NaN.
    """

    def __init__(
        self,
        op: str,
        rewards: Tensor,
        *further: Tensor | float,
        gamma: float | Tensor,
        bootstrap_value: Tensor | None,
        next_values: Tensor | None,
        terminated: Tensor | None,
        truncated: Tensor | None,
        mask: Tensor | None,
        cu_seqlens: Tensor | None,
    ) -> None:
        if truncated is not None and next_values is None:
            raise ValueError(
                f"{op}: expected next_values with truncated, got None. "
                "Pass the value of the state that each step led to as next_values."
            )
        if bootstrap_value is not None and next_values is not None:
            raise ValueError(
                f"{op}: expected one of bootstrap_value and next_values, got both. "
                "Put the bootstrap values into the last step of next_values."
            )
        self._rows = Rows(rewards, mask, cu_seqlens)
        self.dtype = compute_dtype(rewards, *further, gamma, bootstrap_value, next_values)
        self.rewards = self.rows_of(rewards)
        self.continues = self.rows_of(gamma) * self._unless(terminated)
        self._terminated = terminated
        self.unbroken = self._unless(truncated)
        self._goes_on = (self._unless(terminated) * self.unbroken) == 1  # the next step follows
        self._given_next_values = None if next_values is None else self.rows_of(next_values)
        self._bootstrap = (
            self.rewards.new_zeros(self.rewards.shape[0])
            if bootstrap_value is None
            else bootstrap_value.to(self.dtype).reshape(-1)
        )
        self._next_step = _next_valid(self._rows.valid)

    def rows_of(self, x: float | Tensor) -> Tensor:
        """[R, T]: a per-step tensor, or a constant, 0 at excluded steps."""
        shape = self._rows.caller_shape
        if not isinstance(x, Tensor):
            return torch.full_like(self._rows.valid, x, dtype=self.dtype)
        return self._rows.pad(x.to(self.dtype).expand(shape))

    def restore(self, rows: Tensor) -> Tensor:
        """The caller's shape from [R, T]; 0 at excluded steps."""
        return self._rows.unpad(rows)

    def following(self, x: Tensor, after_last: Tensor | None = None) -> Tensor:
        """[R, T]: x at the next step, and after_last [R] (default 0) beyond the last one; 0 where
        the episode ends before it."""
        return self._next(x, after_last).where(self._goes_on, 0)

    def _next(self, x: Tensor, after_last: Tensor | None) -> Tensor:
        if after_last is None:
            after_last = x.new_zeros(x.shape[0])
        return torch.cat([x, after_last[:, None]], dim=1).gather(1, self._next_step)

    def values_after(self, values: Tensor | None) -> Tensor:
        """v_{t+1} [R, T]: next_values where the caller gave them, else `values` one step later.
        0 behind a termination, where nothing follows, so that NaN there is harmless."""
        if self._given_next_values is not None:
            after = self._given_next_values
        elif values is None:
            return torch.zeros_like(self.rewards)
        else:
            after = self._next(values, self._bootstrap)
        return (
            after
            if self._terminated is None
            else after.where(self._unless(self._terminated) == 1, 0)
        )

    def value_after_last(self) -> Tensor:
        """[R]: bootstrap_value, or next_values at each row's last step; 0 for rows without one."""
        if self._given_next_values is None:
            return self._bootstrap
        is_last = self._rows.valid & (self._next_step == self._rows.valid.shape[1])
        return self._given_next_values.masked_fill(~is_last, 0).sum(1)

    def scan(self, offset: Tensor, factor: Tensor, after_last: Tensor | None = None) -> Tensor:
        """x_t = offset_t + factor_t x_{t+1} [R, T], from the last step (after it: after_last)."""
        x = offset.new_zeros(offset.shape[0]) if after_last is None else after_last
        steps = []
        for t in reversed(range(offset.shape[1])):
            carried = self.through(factor[:, t], x.where(self._goes_on[:, t], 0))
            x = torch.where(self._rows.valid[:, t], offset[:, t] + carried, x)
            steps.append(x)
        return torch.stack(steps[::-1], dim=1) if steps else offset

    def through(self, factor: Tensor, x: Tensor) -> Tensor:
        """factor * x; where the factor is 0 nothing is handed on, be it NaN."""
        return factor * x.where(factor != 0, 0)

    def _unless(self, ended: Tensor | None) -> Tensor:
        if ended is None:
            return torch.ones_like(self.rewards)
        return (~self._rows.pad(ended)).to(self.dtype)


def _next_valid(valid: Tensor) -> Tensor:
    """[R, T] int64: the first valid step after t, T where there is none."""
    num_steps = valid.shape[1]
    steps = torch.arange(num_steps, device=valid.device).expand_as(valid)
    end = torch.full_like(steps[:, :1], num_steps)
    if num_steps == 0:
        return steps
    at_or_after = steps.masked_fill(~valid, num_steps).flip(1).cummin(1).values.flip(1)
    return torch.cat([at_or_after[:, 1:], end], dim=1)


def clipped_ratio(log_ratio: Tensor, clip: float) -> Tensor:
    """min(clip, exp(log_ratio)). exp sees only what stays below the clip: an overflow that the
    minimum hides would still be 0 * inf = NaN in the gradient."""
    above = log_ratio.detach().exp() >= clip  # False for NaN, which stays
    return torch.where(above, clip, torch.where(above, 0, log_ratio).exp())
