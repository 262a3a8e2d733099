"""V-trace off-policy targets."""

from torch import Tensor

from fastrl.reference._trajectories import Trajectories, clipped_ratio


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
    """Off-policy value targets and policy advantages with clipped importance weights.

        rho_t = min(rho_clip, exp(log_ratio_t)),  w_t = lambda_t min(c_clip, exp(log_ratio_t))
        delta_t = rho_t (r_t + c_t v_{t+1} - v_t)
        vs_t = v_t + delta_t + c_t k_t w_t (vs_{t+1} - v_{t+1})
        q_{t+1} = v_{t+1} + lambda_t k_t (vs_{t+1} - v_{t+1})
        advantages_t = rho_t (r_t + c_t q_{t+1} - v_t)

    where c_t = gamma_t (1 - terminated_t) and k_t = 1 - truncated_t.
    vs - v is 0 after the last step, so v_{t+1} alone counts there and at a truncation. On-policy
    (log_ratio 0, clips >= 1) both outputs are those of `gae`.

    Args:
        rewards: [..., T] or packed [N]; rewards[t] follows the action at t.
        values: shaped like rewards, v_t, the value of the state before the action at t.
        log_ratio: shaped like rewards, log of target over behaviour probability of action t.
        gamma: discount per step, in [0, 1]; or shaped like rewards, and then gamma[t] discounts
            what follows rewards[t].
        rho_clip: bound of the weight on each temporal difference; math.inf for none.
        c_clip: bound of the weight that carries later differences back; math.inf for none.
        gae_lambda: in [0, 1]; or shaped like rewards.
        bootstrap_value: [...] (packed: [S]), value after the last step. Default 0.
        next_values: shaped like rewards, v_{t+1} at every t, instead of bootstrap_value.
        terminated: bool, the episode ended with step t: nothing follows. Wins over truncated.
        truncated: bool, the row goes on with another episode, but v_{t+1} counts.
        mask: bool, False = not a step: its inputs are ignored (NaN too), its output is 0, and
            t + 1 means the next step that mask keeps.
        cu_seqlens: [S + 1] int32, rewards are packed [N] and segments are independent.
    Returns:
        advantages: shaped like rewards, float32 (float64 if an input is).
        value_targets: vs, the same shape and dtype.
    Raises:
        ValueError: truncated without next_values, or next_values together with bootstrap_value.
    Differentiable in: rewards, values, log_ratio, next_values, bootstrap_value; in fastrl.reference
        also gamma and gae_lambda, which elsewhere must not require grad (ValueError).
    Reference: Espeholt et al. 2018, arXiv:1802.01561, eq. 1 and section 4.2.
    """
    steps = Trajectories(
        "vtrace",
        rewards,
        values,
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
    v, log_weight = steps.rows_of(values), steps.rows_of(log_ratio)
    trace = steps.continues * steps.unbroken * steps.rows_of(gae_lambda)
    rho = clipped_ratio(log_weight, rho_clip)
    delta = steps.rewards + steps.through(steps.continues, steps.values_after(v)) - v
    correction = steps.scan(rho * delta, trace * clipped_ratio(log_weight, c_clip))  # vs - v
    advantages = rho * (delta + steps.through(trace, steps.following(correction)))
    return steps.restore(advantages), steps.restore(v + correction)
