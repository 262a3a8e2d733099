"""verl's log-probabilities and GAE, by their names in `verl.utils.torch_functional` and
`verl.trainer.ppo.core_algos`."""

import torch
from torch import Tensor

from fastrl import ops, reference
from fastrl.ops import _checks


def logprobs_from_logits(logits: Tensor, labels: Tensor, inplace_backward: bool = True) -> Tensor:
    """Log-probability of each row's label, as verl's function of that name gives it.

        log p_y = x_y - log sum_j exp(x_j)

    Args:
        logits: [..., V] float32, bfloat16, float16, or float64 (by fastrl.reference). verl's
            callers have divided them by the temperature.
        labels: [...] int64 in [0, V); -100 gives 0 and no gradient, as flash-attn's kernel does.
        inplace_backward: the backward pass writes the gradient over `logits`, as flash-attn's
            kernel does where verl finds it: no memory beside it. Here on a CPU as well. Who needs
            the logits again in a backward pass (an entropy) passes False, as in verl; forgetting it
            is an error from autograd, and no wrong gradient. float64 is never in place.
    Returns:
        logprobs: [...], nats; float32 on a GPU (flash-attn's dtype), the logits' dtype on a CPU.
    Raises:
        ValueError: shapes disagree, or (eager, CPU) a label is neither in [0, V) nor -100; on a GPU
            such a label gives NaN.
        TypeError: another dtype.  NotImplementedError: a device without a kernel.
    Differentiable in: logits.
    Unlike verl's: computed in float32 and rounded once, exact for likely tokens.
    """
    if logits.dtype == torch.float64:
        return reference.token_logprobs(logits, labels)
    logprobs = ops.token_logprobs(logits, labels, inplace_backward=inplace_backward)
    return logprobs if logits.device.type == "cuda" else logprobs.to(logits.dtype)


def compute_gae_advantage_return(
    token_level_rewards: Tensor,
    values: Tensor,
    response_mask: Tensor,
    gamma: float | Tensor,
    lam: float | Tensor,
) -> tuple[Tensor, Tensor]:
    """Whitened generalised advantage estimates, and returns, as verl's function of that name.

        delta_t = r_t + gamma v_{t+1} - v_t
        A_t = delta_t + gamma lam A_{t+1},    returns_t = A_t + v_t
        advantages_t = (A_t - mean) / sqrt(var + 1e-8)

    t + 1 is the next token whose mask is 1; v and A are 0 after the last one. A token whose mask is
    0 (padding, or what a tool wrote) takes A from the next one whose mask is 1, as in verl. mean
    and var are those of A where the mask is 1, over all rows, var with n - 1 in the denominator.

    Args:
        token_level_rewards: [..., T] floating-point, reward of each token of the responses;
            integers are converted.
        values: the same shape, floating-point, v_t before the token at t.
        response_mask: the same shape, 1 where the policy chose the token, else 0; any dtype.
        gamma: discount per token, in [0, 1]: a number or a tensor of one entry.
        lam: in [0, 1], the same.
    Returns:
        advantages, returns: [..., T], detached, in the dtype that torch promotes rewards, values
        and a floating-point mask to.
    Raises:
        ValueError: shapes disagree, a discount is not in [0, 1], or (eager, CPU) fewer than two
            tokens have mask 1, or the mask holds other numbers; elsewhere fewer than two give NaN,
            and any other number counts as 1.
        TypeError: values are not floating-point.  NotImplementedError: a device without a kernel.
    Differentiable in: nothing.
    Unlike verl's: NaN and infinities where the mask is 0 reach no other token (there: every token
    before them, and so the whole batch); a bool mask works; 16-bit inputs are summed in double.
    """
    op = "compute_gae_advantage_return"
    _checks.float_tensor(op, "values", values)
    for name, x in (("token_level_rewards", token_level_rewards), ("response_mask", response_mask)):
        _checks.same_shape(op, name, x, "values", values, "Pass one per token of the responses.")
        _checks.same_device(op, name, x, "values", values)
    dtype = torch.promote_types(token_level_rewards.dtype, values.dtype)
    if response_mask.is_floating_point():
        dtype = torch.promote_types(dtype, response_mask.dtype)
    with torch.no_grad():
        kept, count = _kept(op, response_mask)
        advantages, _ = ops.gae(
            token_level_rewards.to(dtype), values, mask=kept,
            gamma=_number(op, "gamma", gamma), gae_lambda=_number(op, "lam", lam),
        )  # fmt: skip
        # gae gives 0 where the mask is 0, so these sums need none.
        mean = advantages.sum(dtype=torch.float64) / count
        # Carries each A back over the tokens before it whose mask is 0: A_t + (1 - mask_t) A_{t+1}.
        advantages = ops.discounted_returns(advantages, gamma=1.0, terminated=kept)
        returns = advantages + values
        centred = advantages - mean
        squares = torch.where(kept, centred, 0).square_().sum(dtype=torch.float64)
        whitened = centred * (squares / (count - 1) + 1e-8).rsqrt()
    return whitened.to(dtype), returns.to(dtype)


def _kept(op: str, response_mask: Tensor) -> tuple[Tensor, Tensor]:
    """The mask as bool, and how many tokens it keeps."""
    kept = response_mask.bool()
    count = kept.sum()
    if _checks.contents_are_known(response_mask):
        if count < 2:
            raise _checks.fail(
                op, "response_mask to keep at least two tokens", int(count),
                "One advantage has no variance: use a larger batch.",
            )  # fmt: skip
        if response_mask.dtype != torch.bool and not torch.equal(
            kept.to(response_mask.dtype), response_mask
        ):
            raise _checks.fail(
                op, "response_mask of 0 and 1", "other numbers", "Use (response_mask != 0)."
            )
    return kept, count


def _number(op: str, name: str, x: float | Tensor) -> float:
    if not isinstance(x, Tensor):
        return x
    if x.numel() != 1:
        raise _checks.fail(op, f"{name} of one entry", _checks.shape(x), "Pass a number.")
    return float(x)
