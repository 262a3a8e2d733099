"""The backward passes of the estimators of returns: the recursion, transposed, forward in time."""

from typing import Any

from torch import Tensor

from fastrl.ops import _binary
from fastrl.ops._returns import (
    Steps,
    empty_like_rows,
    is_time_major,
    laid_out,
    per_row_shape,
)

_td_bwd = _binary.op("td_bwd")
_value_grads = _binary.op("value_grads")

NUM_OPTIONS = 10  # of a schema, from bootstrap_value on


class Path:
    """Which step follows which, and what each result of the backward pass has to look like.

    What an op's inputs are is kept on ctx; tensors among them through save_for_backward.
    """

    @staticmethod
    def save(ctx: Any, inputs: Steps, num_tensors: int, *kept: Tensor) -> None:
        """inputs: of the op; num_tensors: how many of them come before bootstrap_value."""
        steps = inputs[num_tensors + 2 : num_tensors + NUM_OPTIONS - 2]
        ctx.save_for_backward(*steps, *kept)
        ctx.discounts = inputs[num_tensors + NUM_OPTIONS - 2 : num_tensors + NUM_OPTIONS]
        ctx.further = inputs[num_tensors + NUM_OPTIONS :]
        ctx.num_tensors, ctx.num_inputs = num_tensors, len(inputs)
        ctx.has_next_values = inputs[num_tensors + 1] is not None
        ctx.time_major = is_time_major(inputs[0])
        ctx.dtypes = [x.dtype if isinstance(x, Tensor) else None for x in inputs]
        ctx.set_materialize_grads(False)

    def __init__(self, ctx: Any) -> None:
        saved = ctx.saved_tensors  # read once: checkpointing counts
        self.ctx = ctx
        self.steps = (*saved[:6], *ctx.discounts)
        self.kept = saved[6:]

    def grad(self, grad: Tensor | None) -> Tensor | None:
        return None if grad is None else laid_out(grad, self.ctx.time_major)

    def needs(self, index: int) -> bool:
        return self.ctx.needs_input_grad[index]

    def through_values(
        self,
        grad_rewards: Tensor,
        grad_returns: Tensor | None = None,
        grad_next: Tensor | None = None,
        *,
        own: bool,
        only_at_cuts: bool = False,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Of values, bootstrap_value and next_values, where they are asked for.

        own: values enter through their own step as well as through the step before.
        only_at_cuts: next_values enter where the row is truncated or ends, values nowhere.
        """
        ctx = self.ctx
        needs_values = not only_at_cuts and self.needs(1)
        if not (needs_values or self.needs(ctx.num_tensors) or self.needs(ctx.num_tensors + 1)):
            return None, None, None
        values, next_values, bootstrap_value = _value_grads(
            grad_rewards, grad_returns, grad_next, own, only_at_cuts, needs_values,
            ctx.has_next_values, *self.steps,
        )  # fmt: skip
        return (
            values if needs_values else None,
            None if ctx.has_next_values else bootstrap_value,
            next_values if ctx.has_next_values else None,
        )

    def results(self, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """One gradient for each input: those given, each in the dtype of its input, and None."""
        ctx = self.ctx
        cast = [
            g.to(ctx.dtypes[i]) if g is not None and self.needs(i) else None
            for i, g in enumerate(grads)
        ]
        return (*cast, *(None,) * (ctx.num_inputs - len(cast)))


def td_backward(
    ctx: Any, *grads: Tensor | None, own: bool = True, only_at_cuts: bool = False
) -> Any:
    """Of gae (advantages, returns), lambda_returns and discounted_returns."""
    path = Path(ctx)
    grads = tuple(path.grad(g) for g in grads)
    if all(g is None for g in grads):
        return (None,) * ctx.num_inputs
    first, second = (*grads, None)[:2]
    grad_rewards = _td_bwd(first, second, *path.steps)
    # returns = advantages + values
    grad_returns = grads[-1] if own else None
    values, bootstrap_value, next_values = path.through_values(
        grad_rewards, grad_returns, own=own, only_at_cuts=only_at_cuts
    )
    further = (values,) if own else ()
    return path.results(grad_rewards, *further, bootstrap_value, next_values)


def _td_bwd_fake(grad_first: Tensor | None, grad_second: Tensor | None, *_: Any) -> Tensor:
    grad = grad_second if grad_first is None else grad_first
    assert grad is not None
    return empty_like_rows(grad, grad.dtype)


def _value_grads_fake(
    grad_rewards: Tensor,
    grad_returns: Tensor | None,
    grad_next: Tensor | None,
    own: bool,
    only_at_cuts: bool,
    needs_values: bool,
    has_next_values: bool,
    *steps: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    nothing = grad_rewards.new_empty(0)
    per_row = per_row_shape(grad_rewards, steps[3])

    def empty() -> Tensor:
        return empty_like_rows(grad_rewards, grad_rewards.dtype)

    return (
        empty() if needs_values else nothing,
        empty() if has_next_values else nothing.clone(),
        nothing.clone() if has_next_values else grad_rewards.new_empty(per_row),
    )


_binary.register_fake("td_bwd", _td_bwd_fake)
_binary.register_fake("value_grads", _value_grads_fake)


_binary.differentiable_once(
    "td_bwd", "value_grads", "vtrace_bwd", "retrace_returns_bwd", "n_step_returns_bwd"
)
