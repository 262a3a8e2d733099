"""linear_token_logprobs in slices of the vocabulary, the same on every device.

Forward: one product and one pass per slice. Backward: the slice's logits once more, their gradient
over them, then the two products that finish the slice's part of the weight's gradient and add to
that of hidden. Four products in all, and no more than a slice of logits at any time.
"""

import torch
from torch import Tensor

from fastrl import _vocabulary
from fastrl.ops import _binary
from fastrl.ops._head import ALL, CountedRows, Head, empty_matrix

_state = _binary.op("token_logprobs_state")


def linear_token_logprobs_state(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    bias: Tensor | None,
    temperature: float,
    softcap: float | None,
    ignore_index: int,
    vocab_start: int,
    return_entropy: bool,
) -> Tensor:
    """[N, 6] float64, as fastrl._vocabulary describes it, of this slice of the vocabulary."""
    rows = CountedRows(hidden, token_ids, ignore_index)
    head = Head(rows.hidden, weight, bias, softcap)
    whole = RunningState(temperature)
    for columns in head.vocab_slices():
        logits, start = head.logits(ALL, columns), vocab_start + columns.start
        whole.add(_state(logits, rows.token_ids, temperature, ignore_index, start, return_entropy))
        del logits  # before there are others: a slice at a time
    return rows.scatter(whole.merged())


def linear_token_logprobs_fwd(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    bias: Tensor | None,
    temperature: float,
    softcap: float | None,
    ignore_index: int,
    return_entropy: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """logprobs, entropy ([0] unless asked for), row max, log total: [N] float32 each."""
    state = linear_token_logprobs_state(
        hidden, weight, token_ids, bias, temperature, softcap, ignore_index, 0, return_entropy
    )
    logprobs, entropy, *saved = _vocabulary.finish(state, token_ids, temperature, ignore_index)
    return logprobs, entropy if return_entropy else entropy.new_empty(0), *saved  # type: ignore


def linear_token_logprobs_bwd(
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    bias: Tensor | None,
    logprobs: Tensor,
    entropy: Tensor | None,
    row_max: Tensor,
    log_total: Tensor,
    temperature: float,
    softcap: float | None,
    ignore_index: int,
    vocab_start: int,
    needs_hidden: bool,
    needs_weight: bool,
    needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden (float32), weight and bias; [0] for what needs none."""
    rows = CountedRows(hidden, token_ids, ignore_index)
    head = Head(rows.hidden, weight, bias, softcap)
    per_row = (grad_logprobs, grad_entropy, logprobs, entropy, row_max, log_total)
    g, h, *saved = (None if x is None else rows.pick(x) for x in per_row)
    # Three tensors even where they are empty: an op's outputs may not be one.
    grad_hidden, grad_weight, grad_bias = (hidden.new_empty(0) for _ in range(3))
    if needs_hidden:
        grad_hidden = hidden.new_zeros(head.hidden.shape, dtype=torch.float32)
    if needs_weight:
        grad_weight = empty_matrix(weight, weight.shape[0], weight.shape[1], weight.dtype)
    if needs_bias and bias is not None:
        grad_bias = torch.empty_like(bias)
    for columns in head.vocab_slices():
        logits = head.logits(ALL, columns, for_backward=True)
        grad = head.gradient(
            logits, g, h, rows.token_ids, *saved, temperature, ignore_index,
            vocab_start + columns.start,
        )  # fmt: skip
        if needs_hidden:
            head.product(grad, head.weight_of(columns), grad_hidden, add=True)
        if needs_weight:
            head.product(grad.t(), head.hidden, grad_weight[columns])
        if needs_bias:
            grad_bias[columns] = grad.sum(0, dtype=torch.float32)
        del logits, grad
    return rows.scatter(grad_hidden) if needs_hidden else grad_hidden, grad_weight, grad_bias


def token_stats(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    bias: Tensor | None,
    temperature: float,
    softcap: float | None,
    ignore_index: int,
) -> tuple[Tensor, ...]:
    """logprobs, entropy, log sum p^2, mean of the scaled logits, is top 1: [N] each."""
    rows = CountedRows(hidden, token_ids, ignore_index)
    head = Head(rows.hidden, weight, bias, softcap)
    ids, n = rows.token_ids, len(rows.token_ids)
    sums = hidden.new_zeros(n, dtype=torch.float64)
    best = hidden.new_full((n,), -torch.inf, dtype=torch.float32)
    top = torch.zeros_like(ids)
    # sum p^2 is the total at half the temperature over the square of the total.
    states = [RunningState(temperature), RunningState(temperature / 2)]
    for columns in head.vocab_slices():
        logits = head.logits(ALL, columns)
        for state in states:
            t = state.temperature
            state.add(_state(logits, ids, t, ignore_index, columns.start, t == temperature))
        sums += logits.sum(-1)
        highest, at = logits.max(-1)
        del logits
        is_higher = highest > best  # the first of equals stays
        best = torch.where(is_higher, highest, best)
        top = torch.where(is_higher, at + columns.start, top)
    finished = [
        _vocabulary.finish(state.merged(), ids, state.temperature, ignore_index) for state in states
    ]
    (logprobs, entropy, _, log_total), (_, _, _, log_total_squares) = finished
    counted = ids != ignore_index
    mean = torch.where(counted, sums / (len(weight) * temperature), 0.0).float()
    log_sum_sq_probs = log_total_squares - 2 * log_total
    found = (logprobs, entropy, log_sum_sq_probs, mean, (top == ids) & counted)
    return tuple(rows.scatter(x) for x in found)


class RunningState:
    """The states of slices, merged in their order, some at a time: a call for each would cost more
    than its sums, and all of them together more memory than a slice."""

    def __init__(self, temperature: float) -> None:
        self.temperature = temperature
        self._waiting: list[Tensor] = []

    def add(self, state: Tensor) -> None:
        self._waiting.append(state)
        if len(self._waiting) == 8:
            self._waiting = [self.merged()]

    def merged(self) -> Tensor:
        if len(self._waiting) == 1:
            return self._waiting[0]
        return _vocabulary.merge_states(torch.stack(self._waiting), self.temperature)
