"""N-step returns."""

import torch
from torch import Tensor

from fastrl.reference._trajectories import Trajectories


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
    """The next n rewards, and the value of the state that they lead to.

        G^1_t = r_t + c_t v_{t+1}
        G^n_t = r_t + c_t (k_t G^{n-1}_{t+1} + (1 - k_t) v_{t+1})

    where c_t = gamma_t (1 - terminated_t) and k_t = 1 - truncated_t.
    G after the last step is v after it, whatever n.

    Args:
        rewards: [..., T] or packed [N]; rewards[t] follows the action at t.
        values: shaped like rewards, v_t, the value of the state before the action at t.
        gamma: discount per step, in [0, 1]; or shaped like rewards, and then gamma[t] discounts
            what follows rewards[t].
        n: steps, at least 1; where fewer are left, those.
        bootstrap_value: [...] (packed: [S]), value after the last step. Default 0.
        next_values: shaped like rewards, v_{t+1} at every t, instead of bootstrap_value.
        terminated: bool, the episode ended with step t: nothing follows. Wins over truncated.
        truncated: bool, the row goes on with another episode, but v_{t+1} counts.
        mask: bool, False = not a step: its inputs are ignored (NaN too), its output is 0, and
            t + 1 means the next step that mask keeps.
        cu_seqlens: [S + 1] int32, rewards are packed [N] and segments are independent.
    Returns:
        returns: G^n, shaped like rewards, float32 (float64 if an input is).
    Raises:
        ValueError: truncated without next_values, or next_values together with bootstrap_value.
    Differentiable in: rewards, values, next_values, bootstrap_value; in fastrl.reference also
        gamma, which elsewhere must not require grad (ValueError).
    Reference: Sutton & Barto 2018, Reinforcement Learning, eq. 7.1.
    """
    steps = Trajectories(
        "n_step_returns",
        rewards,
        values,
        gamma=gamma,
        bootstrap_value=bootstrap_value,
        next_values=next_values,
        terminated=terminated,
        truncated=truncated,
        mask=mask,
        cu_seqlens=cu_seqlens,
    )
    next_v = steps.values_after(steps.rows_of(values))
    after_last = steps.value_after_last()
    returns = steps.rewards + steps.through(steps.continues, next_v)
    for _ in range(min(n, returns.shape[1]) - 1):
        later = steps.following(returns, after_last)
        mixed = torch.where(steps.unbroken == 1, later, next_v)
        returns = steps.rewards + steps.through(steps.continues, mixed)
    return steps.restore(returns)
