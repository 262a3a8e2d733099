"""Discounted returns."""

from torch import Tensor

from fastrl.reference._trajectories import Trajectories


def discounted_returns(
    rewards: Tensor,
    *,
    gamma: float | Tensor,
    bootstrap_value: Tensor | None = None,
    next_values: Tensor | None = None,
    terminated: Tensor | None = None,
    truncated: Tensor | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Discounted sum of the rewards that follow each step, by the recursion

        R_t = r_t + c_t (k_t R_{t+1} + (1 - k_t) next_values_t)

    where c_t = gamma_t (1 - terminated_t) and k_t = 1 - truncated_t.
    R after the last step is bootstrap_value, or next_values at the last step; next_values has no
    other use.

    Args:
        rewards: [..., T] or packed [N]; rewards[t] follows the action at t.
        gamma: discount per step, in [0, 1]; or shaped like rewards, and then gamma[t] discounts
            what follows rewards[t].
        bootstrap_value: [...] (packed: [S]), value after the last step. Default 0.
        next_values: shaped like rewards, v_{t+1} at every t, instead of bootstrap_value.
        terminated: bool, the episode ended with step t: nothing follows. Wins over truncated.
        truncated: bool, the row goes on with another episode, but v_{t+1} counts.
        mask: bool, False = not a step: its inputs are ignored (NaN too), its output is 0, and
            t + 1 means the next step that mask keeps.
        cu_seqlens: [S + 1] int32, rewards are packed [N] and segments are independent.
    Returns:
        returns: shaped like rewards, float32 (float64 if an input is).
    Raises:
        ValueError: truncated without next_values, or next_values together with bootstrap_value.
    Differentiable in: rewards, next_values, bootstrap_value; in fastrl.reference also gamma, which
        elsewhere must not require grad (ValueError).
    Reference: Sutton & Barto 2018, Reinforcement Learning, eq. 3.9.
    """
    steps = Trajectories(
        "discounted_returns",
        rewards,
        gamma=gamma,
        bootstrap_value=bootstrap_value,
        next_values=next_values,
        terminated=terminated,
        truncated=truncated,
        mask=mask,
        cu_seqlens=cu_seqlens,
    )
    truncation = steps.values_after(None).masked_fill(steps.unbroken == 1, 0)
    returns = steps.scan(
        steps.rewards + steps.through(steps.continues, truncation),
        steps.continues * steps.unbroken,
        steps.value_after_last(),
    )
    return steps.restore(returns)
