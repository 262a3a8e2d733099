"""Retrace off-policy action-value targets."""

from torch import Tensor

from fastrl.reference._trajectories import Trajectories, clipped_ratio


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
    """Off-policy targets for action values, safe for any behaviour policy.

        G_t = r_t + c_t [v_{t+1} + k_t w_{t+1} (G_{t+1} - q_{t+1})]
        w_t = lambda_t min(c_clip, exp(log_ratio_t))

    where c_t = gamma_t (1 - terminated_t) and k_t = 1 - truncated_t.
    The correction w (G - q) is 0 after the last step.

    Args:
        rewards: [..., T] or packed [N]; rewards[t] follows the action at t.
        values: shaped like rewards, v_t, the expectation of q(s_t, .) under the target policy.
        q_values: shaped like rewards, q_t, the value of the action taken at t.
        log_ratio: shaped like rewards, log of target over behaviour probability of action t.
        gamma: discount per step, in [0, 1]; or shaped like rewards, and then gamma[t] discounts
            what follows rewards[t].
        gae_lambda: in [0, 1]; or shaped like rewards.
        c_clip: bound of the importance weight; math.inf for none.
        bootstrap_value: [...] (packed: [S]), value after the last step. Default 0.
        next_values: shaped like rewards, v_{t+1} at every t, instead of bootstrap_value.
        terminated: bool, the episode ended with step t: nothing follows. Wins over truncated.
        truncated: bool, the row goes on with another episode, but v_{t+1} counts.
        mask: bool, False = not a step: its inputs are ignored (NaN too), its output is 0, and
            t + 1 means the next step that mask keeps.
        cu_seqlens: [S + 1] int32, rewards are packed [N] and segments are independent.
    Returns:
        returns: G, shaped like rewards, float32 (float64 if an input is).
    Raises:
        ValueError: truncated without next_values, or next_values together with bootstrap_value.
    Differentiable in: rewards, values, q_values, log_ratio, next_values, bootstrap_value; in
        fastrl.reference also gamma and gae_lambda, which elsewhere must not require grad
        (ValueError).
    Reference: Munos et al. 2016, arXiv:1606.02647, eq. 3 and 4.
    """
    steps = Trajectories(
        "retrace_returns",
        rewards,
        values,
        q_values,
        log_ratio,
        gae_lambda,
        gamma=gamma,
        bootstrap_value=bootstrap_value,
        next_values=next_values,
        terminated=terminated,
        truncated=truncated,
        mask=mask,
        cu_seqlens=cu_seqlens,
    )
    v, q = steps.rows_of(values), steps.rows_of(q_values)
    weight = steps.rows_of(gae_lambda) * clipped_ratio(steps.rows_of(log_ratio), c_clip)
    one_step = steps.rewards + steps.through(steps.continues, steps.values_after(v))
    decay = steps.continues * steps.unbroken
    correction = steps.scan(weight * (one_step - q), weight * decay)  # w (G - q)
    return steps.restore(one_step + steps.through(decay, steps.following(correction)))
