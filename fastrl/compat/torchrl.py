"""TorchRL's GAE and V-trace, by their names in `torchrl.objectives.value.functional`.

Argument names, order, defaults, shapes and result dtypes are those of TorchRL 0.14. `fastrl.gae`
and `fastrl.vtrace` do the work in one pass, over views: nothing is transposed in memory here. They
sum in double and are rounded once, to float32 (float64 where an input is). Where a discount
requires grad, `fastrl.reference` does it, which is the definition and not fast.
"""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fastrl import ops, reference
from fastrl.ops import _checks
from fastrl.reference._trajectories import clipped_ratio


def generalized_advantage_estimate(
    gamma: float | Tensor,
    lmbda: float | Tensor,
    state_value: Tensor,
    next_state_value: Tensor,
    reward: Tensor,
    done: Tensor,
    terminated: Tensor | None = None,
    *,
    time_dim: int = -2,
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimates and value targets, as TorchRL's function of that name.

        delta_t = r_t + gamma_t (1 - terminated_t) v'_t - v_t,    v' = next_state_value
        A_t = delta_t + gamma_t lambda_t (1 - done_t) A_{t+1},    target_t = A_t + v_t

    Args:
        gamma: discount, in [0, 1]: a number, a tensor of one entry, or a tensor that broadcasts to
            reward's shape, and then gamma_t discounts what follows reward_t. With time_dim=0 one of
            one dimension is [T].
        lmbda: in [0, 1], the same forms.
        state_value: [*B, T, *F] floating-point, v_t, the value of the state before the action at t.
        next_state_value: the same shape, the value of the state that the action at t led to.
        reward: the same shape, reward of the action at t; integers are converted.
        done: the same shape, bool: the trajectory ended with step t, what comes next is another.
        terminated: the same shape, bool: it ended for good, nothing follows. Default: done.
        time_dim: the dimension T; [T] alone wants -1.
    Returns:
        advantage: shaped like reward, in next_state_value's dtype.
        value_target: the same shape, in the dtype that torch gives advantage + state_value.
    Raises:
        ValueError: shapes disagree, time_dim is no dimension, a discount is not in [0, 1].
        TypeError: done or terminated is not bool, values are not floating-point.
        NotImplementedError: a device without a kernel.
    Differentiable in: state_value, next_state_value, reward; gamma and lmbda (fastrl.reference).
    Unlike TorchRL's: float64 inputs meet the discount in float64 (there in float32); 16-bit inputs
    are not summed in 16 bits; a terminated step ends its trajectory even where done forgets it; NaN
    in next_state_value at a terminated step is not looked at; the result for [T] with time_dim=0 is
    [T], not [T, 1].
    """
    both = _gae(
        "generalized_advantage_estimate", gamma, lmbda, state_value, next_state_value, reward,
        done, terminated, time_dim,
    )  # fmt: skip
    dtype = next_state_value.dtype
    return both[0].to(dtype), both[1].to(torch.promote_types(dtype, state_value.dtype))


def vec_generalized_advantage_estimate(
    gamma: float | Tensor,
    lmbda: float | Tensor,
    state_value: Tensor,
    next_state_value: Tensor,
    reward: Tensor,
    done: Tensor,
    terminated: Tensor | None = None,
    *,
    time_dim: int = -2,
) -> tuple[Tensor, Tensor]:
    """`generalized_advantage_estimate` under the name of TorchRL's vectorised form.

        delta_t = r_t + gamma_t (1 - terminated_t) v'_t - v_t,    v' = next_state_value
        A_t = delta_t + gamma_t lambda_t (1 - done_t) A_{t+1},    target_t = A_t + v_t

    Args, Raises, Differentiable in: as there.
    Returns:
        advantage, value_target: shaped like reward, in the dtype that torch promotes float32,
        reward, both values and a gamma that has dimensions to.
    Unlike TorchRL's, beside what stands there: the sum is not cut off where (gamma lambda)^k falls
    below 1e-7; gamma lambda < 1e-7 (0 too), an empty batch and no steps are no errors; a gamma of
    one entry that requires grad gets all of its gradient.
    """
    both = _gae(
        "vec_generalized_advantage_estimate", gamma, lmbda, state_value, next_state_value, reward,
        done, terminated, time_dim,
    )  # fmt: skip
    dtype = _promoted(gamma, state_value, next_state_value, reward)
    return both[0].to(dtype), both[1].to(dtype)


def vtrace_advantage_estimate(
    gamma: float | Tensor,
    log_pi: Tensor,
    log_mu: Tensor,
    state_value: Tensor,
    next_state_value: Tensor,
    reward: Tensor,
    done: Tensor,
    terminated: Tensor | None = None,
    rho_thresh: float | Tensor = 1.0,
    c_thresh: float | Tensor = 1.0,
    time_dim: int = -2,
) -> tuple[Tensor, Tensor]:
    """V-trace advantages and value targets, as TorchRL's function of that name.

        rho_t = min(rho_thresh, pi_t / mu_t),    w_t = min(c_thresh, pi_t / mu_t)
        delta_t = rho_t (r_t + gamma_t (1 - terminated_t) v'_t - v_t),    v' = next_state_value
        vs_t = v_t + delta_t + gamma_t (1 - done_t) w_t (vs_{t+1} - v_{t+1})
        A_t = rho_t (r_t + gamma_t (1 - terminated_t) q_t - v_t)

    where q_t is vs_{t+1}, but v'_t at the last step and wherever done_t. So no correction and no
    value crosses from one trajectory into the one before it; TorchRL's own A did that at truncated
    steps until pytorch/rl pull request 4210, which 0.14.1 contains.

    Args:
        gamma: discount, in [0, 1]: a number, a tensor of one entry, or a tensor that broadcasts to
            reward's shape, and then gamma_t discounts what follows reward_t. With time_dim=0 one of
            one dimension is [T], and so are the others that broadcast.
        log_pi: log-probability of action t under the policy that learns, broadcasts to reward's
            shape. (TorchRL's documentation swaps the two; its code and the paper do not.)
        log_mu: the same of the policy that acted.
        state_value: [*B, T, *F] floating-point, v_t, the value of the state before the action at t.
        next_state_value: the same shape, the value of the state that the action at t led to; it may
            come from another network than state_value, such as a target network.
        reward: the same shape, reward of the action at t; integers are converted.
        done: the same shape, bool: the trajectory ended with step t, what comes next is another.
        terminated: bool, broadcasts to reward's shape: nothing follows. Default: done.
        rho_thresh: bound of the weight on each temporal difference, a number or one entry.
        c_thresh: bound of the weight that carries later differences back, the same.
        time_dim: the dimension T, also as the eleventh positional argument; [T] alone wants -1.
    Returns:
        advantage, value_target (vs): shaped like reward, in the dtype that torch promotes float32,
        the five tensors and a gamma that has dimensions to.
    Raises:
        As `generalized_advantage_estimate`; ValueError also for a bound with several entries or
        with a gradient.
    Differentiable in: log_pi, log_mu, both values, reward; gamma (fastrl.reference).
    Unlike TorchRL's: as `generalized_advantage_estimate`; and log_pi - log_mu of 16-bit inputs is
    a float32 difference.
    """
    op = "vtrace_advantage_estimate"
    if terminated is not None:
        terminated = _broadcast(op, "terminated", terminated, reward, time_dim)
    steps = _steps(op, state_value, next_state_value, reward, done, terminated, time_dim)
    dtype = _promoted(gamma, state_value, next_state_value, reward, log_pi, log_mu)
    wide = torch.promote_types(torch.promote_types(log_pi.dtype, log_mu.dtype), torch.float32)
    difference = log_pi.to(wide) - log_mu.to(wide)
    log_ratio = _broadcast(op, "log_pi - log_mu", difference, reward, time_dim)
    log_ratio = log_ratio.movedim(time_dim, -1)
    discount = _discount(op, "gamma", gamma, reward, time_dim)
    rho_clip = _bound(op, "rho_thresh", rho_thresh)
    c_clip = _bound(op, "c_thresh", c_thresh)
    advantage, value_target = _namespace(discount).vtrace(
        **steps, log_ratio=log_ratio, gamma=discount, rho_clip=rho_clip, c_clip=c_clip
    )
    advantage = _value_switch(advantage, steps, log_ratio, discount, rho_clip)
    return advantage.movedim(-1, time_dim).to(dtype), value_target.movedim(-1, time_dim).to(dtype)


def _gae(
    op: str,
    gamma: float | Tensor,
    lmbda: float | Tensor,
    state_value: Tensor,
    next_state_value: Tensor,
    reward: Tensor,
    done: Tensor,
    terminated: Tensor | None,
    time_dim: int,
) -> tuple[Tensor, Tensor]:
    steps = _steps(op, state_value, next_state_value, reward, done, terminated, time_dim)
    discounts = [
        _discount(op, name, x, reward, time_dim) for name, x in (("gamma", gamma), ("lmbda", lmbda))
    ]
    advantages, returns = _namespace(*discounts).gae(
        **steps, gamma=discounts[0], gae_lambda=discounts[1]
    )
    return advantages.movedim(-1, time_dim), returns.movedim(-1, time_dim)


def _steps(
    op: str,
    state_value: Tensor,
    next_state_value: Tensor,
    reward: Tensor,
    done: Tensor,
    terminated: Tensor | None,
    time_dim: int,
) -> dict[str, Tensor | None]:
    """By the ops' names and as views [..., T]: to them all other dimensions are batch."""
    if isinstance(reward, Tensor) and not reward.is_floating_point():
        reward = reward.to(torch.promote_types(state_value.dtype, next_state_value.dtype))
    _checks.float_tensor(op, "reward", reward)
    _checks.like(op, "state_value", state_value, "reward", reward)
    _checks.like(op, "next_state_value", next_state_value, "reward", reward)
    _checks.bool_like(op, "done", done, "reward", reward)
    if terminated is not None:
        _checks.bool_like(op, "terminated", terminated, "reward", reward)
    if not -reward.dim() <= time_dim < reward.dim():
        raise _checks.fail(
            op, f"time_dim to be a dimension of reward {_checks.shape(reward)}", time_dim,
            "Pass the one along which time runs: -1 for [T], -2 for [*B, T, F].",
        )  # fmt: skip
    flags = (done, None) if terminated is None else (terminated, done)  # terminated wins over done
    given = (reward, state_value, next_state_value, *flags)
    names = ("rewards", "values", "next_values", "terminated", "truncated")
    return {
        name: None if x is None else x.movedim(time_dim, -1)
        for name, x in zip(names, given, strict=True)
    }


def _broadcast(op: str, name: str, x: Tensor, reward: Tensor, time_dim: int) -> Tensor:
    given = _checks.shape(x)
    if x.dim() == 1 and time_dim == 0:  # TorchRL counts from the front in each tensor by itself
        x = x.view(-1, *(1 for _ in reward.shape[1:]))
    ours, theirs = x.shape[::-1], reward.shape[::-1]
    if len(ours) > len(theirs) or any(a not in (1, b) for a, b in zip(ours, theirs, strict=False)):
        raise _checks.fail(
            op, f"{name} that broadcasts to reward {_checks.shape(reward)}", given,
            "Pass one entry, or one per entry of reward.",
        )  # fmt: skip
    return x.broadcast_to(reward.shape)


def _discount(op: str, name: str, x: Any, reward: Tensor, time_dim: int) -> float | Tensor:
    """A number where that is known without asking a device, else one per step [..., T]."""
    if not isinstance(x, Tensor):
        return x
    if not torch.is_grad_enabled():
        x = x.detach()
    if x.numel() == 1 and not x.requires_grad and _checks.contents_are_known(x):
        return float(x)
    return _broadcast(op, name, x, reward, time_dim).movedim(time_dim, -1)


def _bound(op: str, name: str, x: Any) -> float:
    if not isinstance(x, Tensor):
        return x
    if x.numel() != 1:
        raise _checks.fail(
            op, f"{name} of one entry", _checks.shape(x), "Pass one bound for all steps."
        )
    if x.requires_grad:
        raise _checks.fail(
            op, f"{name} without gradient", "requires_grad=True", f"Use {name}.detach()."
        )
    return float(x)


def _namespace(*discounts: float | Tensor) -> ModuleType:
    """The ops have no gradient in a discount."""
    learned = any(isinstance(x, Tensor) and x.requires_grad for x in discounts)
    return reference if learned else ops


def _promoted(gamma: float | Tensor, *data: Tensor) -> torch.dtype:
    if isinstance(gamma, Tensor) and gamma.dim() > 0:
        data = (*data, gamma)
    dtype = torch.float32  # that of TorchRL's gamma * (~done).int(), for a number and one entry
    for x in data:
        dtype = torch.promote_types(dtype, x.dtype)
    return dtype


def _value_switch(
    advantages: Tensor,
    steps: dict[str, Tensor | None],
    log_ratio: Tensor,
    gamma: float | Tensor,
    rho_clip: float,
) -> Tensor:
    """The op's q_t is v'_t + (vs_{t+1} - v_{t+1}) and TorchRL's is vs_{t+1}: what v and v' disagree
    on, where one network gives both only rounding, is missing from A_t inside a trajectory."""
    values, next_values, terminated, truncated = (
        steps[name] for name in ("values", "next_values", "terminated", "truncated")
    )
    assert values is not None and next_values is not None and terminated is not None
    if values.shape[-1] < 2:
        return advantages
    ended = terminated if truncated is None else terminated | truncated
    switch = values[..., 1:].to(advantages.dtype) - next_values[..., :-1]
    switch = switch.masked_fill(ended[..., :-1], 0)
    # Its gradient is there even where it is 0.
    known = _checks.contents_are_known(switch) and not advantages.requires_grad
    if known and not switch.any():
        return advantages
    discount = gamma[..., :-1] if isinstance(gamma, Tensor) else gamma
    weight = discount * clipped_ratio(log_ratio[..., :-1], rho_clip)
    return advantages + torch.nn.functional.pad(weight * switch, (0, 1))
