"""linear_token_logprobs where hidden alone is learned, as behind LoRA adapters: two products.

The gradient of a row's log-prob in its hidden state is a vector that the upstream gradient, a
number, only scales:

    d logp / d hidden = ((1 - p_t) s_t W_t - sum over j != t of p_j s_j W_j) / T

with s_j the slope of the softcap at logit j, or 1. So it forms in the forward pass, slice by slice,
and nothing is computed again in the backward pass. A slice's p_j are shares of what was seen so
far; what comes later makes the sum smaller by a factor, as in online softmax. The target stays out
of the sum, so that for likely tokens nothing cancels.
"""

from typing import Any, NoReturn

import torch
from torch import Tensor

from fastrl import _vocabulary
from fastrl.ops import _binary
from fastrl.ops._head import ALL, CountedRows, Head
from fastrl.ops._linear_slices import RunningState

_state = _binary.op("token_logprobs_state")
_bwd = _binary.op("linear_token_logprobs_bwd")

# float16 keeps few digits of a share of 1e-6, and all of a thousand times that.
_HALF_SCALE = 1024.0
# 1 / T in float32 factors: of T = 1e-40 it would be infinite, and NaN where the sum is 0.
_LARGE, _LEAST = 2.0**60, 2.0**-1000


def linear_token_logprobs_frozen(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    bias: Tensor | None,
    temperature: float,
    softcap: float | None,
    ignore_index: int,
    return_entropy: bool,
) -> tuple[Tensor, ...]:
    """logprobs, entropy ([0] unless asked for), row max, log total: [N] float32 each; and
    d logp / d hidden, [N, D] float32."""
    rows = CountedRows(hidden, token_ids, ignore_index)
    head = Head(rows.hidden, weight, bias, softcap)
    whole = RunningState(temperature)
    others = _Others(head, rows.token_ids, temperature, ignore_index)
    for columns in head.vocab_slices():
        logits = head.logits(ALL, columns, for_backward=True)
        state = _state(
            logits, rows.token_ids, temperature, ignore_index, columns.start, return_entropy
        )
        whole.add(state)
        others.add(logits, columns, state)
        del logits  # before there are others: a slice at a time
    merged = whole.merged()
    slope = rows.scatter(others.gradient(merged))
    state = rows.scatter(merged)
    logprobs, entropy, *saved = _vocabulary.finish(state, token_ids, temperature, ignore_index)
    return logprobs, entropy if return_entropy else entropy.new_empty(0), *saved, slope


class _Others:
    """The sum of -p_j s_j W_j over all j but the target, [n, D], as slices come."""

    def __init__(self, head: Head, ids: Tensor, temperature: float, ignore_index: int) -> None:
        self._head, self._ids = head, ids
        self._temperature, self._ignore_index = temperature, ignore_index
        is_small = temperature < 1e30  # and stays a float32, times the scale
        self._scale = _HALF_SCALE if head.has_half_factors and is_small else 1.0
        self._upstream = torch.full(
            ids.shape, temperature * self._scale, dtype=torch.float32, device=ids.device
        )
        # To the kernel no row has its target in a slice.
        absent = len(head.weight) + (ignore_index == len(head.weight))
        self._absent = torch.where(ids == ignore_index, ids, absent)
        self._sum = head.hidden.new_zeros(head.hidden.shape, dtype=torch.float32)
        # What was seen so far is total exp(max / T), and p_j are shares of exp(used).
        self._total = ids.new_zeros(len(ids), dtype=torch.float64)
        self._max = torch.full_like(self._total, -torch.inf)
        self._used = torch.zeros_like(self._total)
        self._target_slope = torch.ones_like(self._total)

    def add(self, logits: Tensor, columns: slice, state: Tensor) -> None:
        """Destroys the logits. state: of this slice."""
        head, temperature = self._head, self._temperature
        had_some = self._total != 0
        row_max, log_total = self._see(state)
        used = row_max.double() / temperature + log_total.double()
        shrink = torch.where(had_some, torch.exp(self._used - used), 0.0)
        self._used = used
        self._sum.mul_(shrink.float()[:, None])
        is_here = (self._ids >= columns.start) & (self._ids < columns.stop)
        at = (self._ids - columns.start).clamp(0, logits.shape[1] - 1)[:, None]
        target = logits.gather(1, at).masked_fill(is_here[:, None], -torch.inf)
        logits.scatter_(1, at, target)
        if head.softcap is not None:
            slope = head.buffer("slope", *logits.shape).gather(1, at)[:, 0].double()
            self._target_slope = torch.where(is_here, slope, self._target_slope)
        shares = head.gradient(
            logits, self._upstream, None, self._absent, self._upstream, None, row_max, log_total,
            temperature, self._ignore_index, columns.start,
        )  # fmt: skip
        head.product(shares, head.weight_of(columns), self._sum, add=True)

    def gradient(self, whole: Tensor) -> Tensor:
        """d logp / d hidden, [n, D], from the state [n, 6] of the whole vocabulary."""
        logprobs, log_total = _vocabulary.target_and_total(whole, self._temperature)
        total = whole[:, 0] / self._temperature + log_total
        of_others = torch.exp(self._used - total) / self._scale
        of_target = -torch.expm1(logprobs) * self._target_slope
        factors, rest = torch.stack([of_others, of_target]), 1 / max(self._temperature, _LEAST)
        first = min(rest, _LARGE)
        factors = (factors * first).float().masked_fill(self._ids == self._ignore_index, 0)
        rows = self._head.weight[self._ids.clamp(0, len(self._head.weight) - 1)].float()
        slope = self._sum.mul_(factors[0][:, None]).addcmul_(factors[1][:, None], rows)
        while (rest := rest / first) > 1:
            first = min(rest, _LARGE)
            slope *= first
        return slope

    def _see(self, state: Tensor) -> tuple[Tensor, Tensor]:
        """Row max and log total of what was seen so far, with this slice; 0 where all is -inf."""
        m, total = state[:, 0], state[:, 1] + state[:, 2]
        top = torch.maximum(self._max, m)
        self._total = self._total * self._share(self._max, top) + total * self._share(m, top)
        self._max = top
        has_some = self._total != 0
        return (
            torch.where(has_some, top, 0.0).float(),
            torch.where(has_some, self._total.log(), 0.0).float(),
        )

    def _share(self, m: Tensor, top: Tensor) -> Tensor:
        return torch.where(m == top, 1.0, torch.exp((m - top) / self._temperature))


class _Scaled(torch.autograd.Function):
    """Each row of slope times its g. To torch slope is a number, so a second derivative would be
    silently incomplete."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, slope: Tensor, counted: Tensor) -> Tensor:
        return torch.where(counted[:, None], g[:, None] * slope, 0.0)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> NoReturn:
        _binary.refuse_second_derivative("linear_token_logprobs")


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, token_ids, bias, *ctx.numbers, return_entropy = inputs
    logprobs, entropy, row_max, log_total, slope = output
    saved = (logprobs, entropy if return_entropy else None, row_max, log_total)
    ctx.save_for_backward(hidden, weight, token_ids, bias, *saved, slope)
    ctx.mark_non_differentiable(row_max, log_total, slope)
    ctx.set_materialize_grads(False)


def backward(ctx: Any, g: Tensor | None, h: Tensor | None, *_: Any) -> Any:
    hidden, weight, token_ids, bias, *saved, slope = ctx.saved_tensors
    if h is not None and saved[1] is not None:
        g = None if g is None else g.contiguous()
        numbers = *ctx.numbers, 0, True, False, False
        grad, _, _ = _bwd(g, h.contiguous(), hidden, weight, token_ids, bias, *saved, *numbers)
    elif g is not None:
        grad = _Scaled.apply(g, slope, token_ids != ctx.numbers[2])
    else:
        return (None,) * 8
    return grad.to(hidden.dtype), *(None,) * 7
