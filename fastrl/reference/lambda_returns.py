"""Lambda returns."""

from torch import Tensor

from fastrl.reference._trajectories import Trajectories


def lambda_returns(
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
) -> Tensor:
    """Lambda-weighted mixture of n-step returns: the returns of `gae`, exactly.

        G_t = A_t + v_t = r_t + c_t [(1 - lambda_t k_t) v_{t+1} + lambda_t k_t G_{t+1}]

    where c_t = gamma_t (1 - terminated_t) and k_t = 1 - truncated_t.
    G after the last step is v after it: bootstrap_value, or next_values at the last step. Where
    next_values[t] is not `values` one step later, and neither flag is set at t, A_t + v_t decides.

    Args:
        rewards: [..., T] or packed [N]; rewards[t] follows the action at t.
        values: shaped like rewards, v_t, the value of the state before the action at t.
        gamma: discount per step, in [0, 1]; or shaped like rewards, and then gamma[t] discounts
            what follows rewards[t].
        gae_lambda: in [0, 1]; or shaped like rewards.
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
    Differentiable in: rewards, values, next_values, bootstrap_value; in fastrl.reference also gamma
        and gae_lambda, which elsewhere must not require grad (ValueError).
    Reference: Sutton & Barto 2018, Reinforcement Learning, eq. 12.3.
    """
    steps = Trajectories(
        "lambda_returns",
        rewards,
        values,
        gae_lambda,
        gamma=gamma,
        bootstrap_value=bootstrap_value,
        next_values=next_values,
        terminated=terminated,
        truncated=truncated,
        mask=mask,
        cu_seqlens=cu_seqlens,
    )
    v = steps.rows_of(values)
    delta = steps.rewards + steps.through(steps.continues, steps.values_after(v)) - v
    decay = steps.continues * steps.rows_of(gae_lambda) * steps.unbroken
    advantages = steps.scan(delta, decay)
    return steps.restore(advantages + v)
