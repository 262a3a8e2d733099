"""A per-token loss from hidden states, whose gradients form during the forward pass."""

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastrl.ops import _binary
from fastrl.ops._autocast import autocast
from fastrl.ops._head import ALL, CountedRows, Head, empty_matrix
from fastrl.ops._token_loss import TokenLoss
from fastrl.ops.linear_token_logprobs import check_head
from fastrl.ops.token_logprobs import check_ids

_fwd = _binary.op("token_logprobs_fwd")


def linear_token_loss(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    loss_fn: Callable[[Tensor, Tensor, Tensor], Tensor],
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
) -> tuple[Tensor, Tensor, Tensor]:
    """Sum of a per-token loss over the rows that count, with three products in all.

        loss = sum_i loss_fn(logprobs, entropy, rows)_i

    For such a loss a row's log-prob and entropy tell all of that row's gradient. So for some
    hundred rows at a time (on a GPU a thousand, with up to 1 GB of gradients in 16 bits that wait
    for their products) the logits are formed, loss_fn is differentiated on the small vectors,
    the logits become their own gradient, and the gradients of hidden and weight follow, all in the
    forward pass: nothing is computed again, where `linear_token_logprobs` computes the logits
    twice. That one takes less memory (slices of the vocabulary and not of the rows), and serves
    losses that are not per token.

    loss_fn gets logprobs [n], entropy [n] and rows [n] int64, the indices of its tokens in
    token_ids.flatten(): index with them whatever else the loss needs. It returns [n], entry i a
    function of logprobs[i] and entropy[i] alone. It is called several times, on parts of the rows,
    and on the first part twice, the second time with other numbers, to see that it mixes nothing:
    nothing random, and no counting, belongs in it. Rows whose token id is ignore_index are never
    passed. (On a GPU they are, with 0 for both, and what comes back for them is dropped: who picks
    rows would have to wait for it.) Divide inside it for a mean.

    A Python function, not a registered op: torch.compile breaks its graph here.

    Args:
        hidden, weight, token_ids, bias, temperature, softcap, ignore_index: as in
            `linear_token_logprobs`.
        loss_fn: see above.
    Returns:
        loss: scalar float32.
        logprobs: [...] float32, detached, nats; 0 in ignored rows.
        entropy: [...] float32, detached, nats; 0 in ignored rows.
    Raises:
        ValueError: as `linear_token_logprobs`; loss_fn closes over a tensor that requires grad,
            does not return [n], or mixes tokens (on a GPU, where looking would synchronise, the
            loss is NaN then).
        TypeError: as `linear_token_logprobs`; loss_fn is not callable, or returns no tensor.
        NotImplementedError: as `linear_token_logprobs`; backward with create_graph.
        RuntimeError: a second backward pass, since the first one hands its gradients out.
    Differentiable in: hidden, weight, bias.
    """
    op = "linear_token_loss"
    check_head(op, hidden, weight, token_ids, bias, temperature, softcap, ignore_index)
    check_ids(op, token_ids, weight.shape[0], ignore_index)
    per_token = TokenLoss(op, loss_fn)
    leading = token_ids.shape
    hidden, weight, bias = autocast(hidden, weight, bias)
    hidden = hidden.reshape(-1, hidden.shape[-1])
    learns = torch.is_grad_enabled()
    needs = tuple(learns and x is not None and x.requires_grad for x in (hidden, weight, bias))
    token_ids = token_ids.reshape(-1).contiguous()  # a flat view of a column is strided
    loss, logprobs, entropy = _apply(
        hidden, weight, bias, token_ids, per_token, temperature, softcap, ignore_index, needs
    )
    return loss, logprobs.reshape(leading), entropy.reshape(leading)


def _apply(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    if "torch._dynamo" in sys.modules:  # who has not imported it need not wait for it
        from fastrl.ops import _out_of_graphs

        return _out_of_graphs.call(_LinearTokenLoss.apply, *arguments)
    return _LinearTokenLoss.apply(*arguments)


class _LinearTokenLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        token_ids: Tensor,
        loss_fn: TokenLoss,
        temperature: float,
        softcap: float | None,
        ignore_index: int,
        needs: tuple[bool, ...],  # which ctx does not know: it knows nothing of no_grad
    ) -> tuple[Tensor, Tensor, Tensor]:
        with torch.autocast(hidden.device.type, enabled=False):
            rows = CountedRows(hidden, token_ids, ignore_index)
            head = Head(rows.hidden, weight, bias, softcap)
            gradients = _Gradients(head, needs)
            nothing = hidden.new_empty(0, dtype=torch.float32)
            logprobs, entropy = [nothing], [nothing]  # part by part
            for parts in head.row_slices():
                whole = slice(parts[0].start, parts[-1].stop)
                room = head.room_for_gradient(whole.stop - whole.start) if any(needs) else None
                for part in parts:
                    logits = head.logits(part, ALL, for_backward=any(needs))
                    ids = rows.token_ids[part]
                    found = _fwd(logits, ids, temperature, ignore_index, True, False)
                    logprobs.append(found[0])
                    entropy.append(found[1])
                    ignored = rows.ignored(part)
                    g, h = loss_fn(found[0], found[1], rows.index(part), ignored)
                    if any(needs):
                        scale = None
                        if head.has_half_factors:
                            g, h, scale = _for_half_factors(g, h, ignored)
                        saved = (ids, *found, temperature, ignore_index, 0)
                        grad = head.gradient(logits, g, h, *saved, out=_within(room, part, whole))
                    del logits  # before there are others: a slice at a time
                if any(needs):
                    gradients.add(whole, grad if room is None else room, scale)
                    del grad
            ctx.gradients = gradients.of_inputs(rows)
            loss = loss_fn.total(hidden).float()
        ctx.dtypes = [None if x is None else x.dtype for x in (hidden, weight, bias)]
        of_rows = rows.scatter(torch.cat(logprobs)), rows.scatter(torch.cat(entropy))
        ctx.mark_non_differentiable(*of_rows)
        ctx.set_materialize_grads(False)
        return loss, *of_rows

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, *_: Any) -> Any:
        _binary.refuse_create_graph("linear_token_loss")  # what forward formed has no graph
        if ctx.gradients is None:
            raise RuntimeError(
                "linear_token_loss: expected one backward pass, got a second. The first one hands "
                "its gradients out; call the op again."
            )
        gradients, ctx.gradients = ctx.gradients, None
        if grad_loss is None:
            return (None,) * 9
        is_one = grad_loss.device.type == "cpu" and grad_loss.item() == 1.0
        given = [
            None if x is None else _times(x, None if is_one else grad_loss, dtype)
            for x, dtype in zip(gradients, ctx.dtypes, strict=True)
        ]
        return *given, *(None,) * 6


def _times(grad: Tensor, factor: Tensor | None, dtype: torch.dtype) -> Tensor:
    """grad times factor, multiplied in float32: before a loss scale is in it, float16 could not
    hold it. Over itself where it stays float32, since a copy would double the memory."""
    if factor is None:
        return grad.to(dtype)
    if grad.dtype == dtype or grad.device.type == "cpu":  # which would cast a copy as large
        return grad.mul_(factor).to(dtype)
    # A GPU casts what it writes: one pass over the weight's gradient and not two.
    return torch.mul(grad, factor, out=grad.new_empty(grad.shape, dtype=dtype))


def _within(room: Tensor | None, part: slice, whole: slice) -> Tensor | None:
    """Of room for the whole, that of a part."""
    return None if room is None else room[part.start - whole.start : part.stop - whole.start]


def _for_half_factors(
    g: Tensor | None, h: Tensor | None, ignored: Tensor | None
) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """Scaled so that the largest is 1: no loss scale is in them yet, and p g would vanish in
    float16. Last, what the products are to be multiplied by."""
    if ignored is not None:
        g, h = (None if x is None else x.masked_fill(ignored, 0.0) for x in (g, h))
    given = [x.abs().amax() for x in (g, h) if x is not None]
    if not given:
        return g, h, torch.ones(())
    scale = torch.stack(given).amax().clamp(min=torch.finfo(torch.float32).tiny)
    return (None if g is None else g / scale), (None if h is None else h / scale), scale


class _Gradients:
    """Of hidden, weight and bias, those that are needed; sums over slices of rows in float32."""

    def __init__(self, head: Head, needs: tuple[bool, ...]) -> None:
        self._head = head
        none: Tensor | None = None
        x, w, b = head.hidden, head.weight, head.bias
        self.hidden = x.new_empty(x.shape, dtype=torch.float32) if needs[0] else none
        self.weight = empty_matrix(w, w.shape[0], w.shape[1], torch.float32) if needs[1] else none
        self.bias = torch.empty_like(b, dtype=torch.float32) if needs[2] and b is not None else none
        self._is_first = True

    def add(self, part: slice, grad: Tensor, scale: Tensor | None) -> None:
        """grad: of these rows' logits, over `scale` if given."""
        self._add(self.hidden, part, grad, self._head.weight_of(ALL), scale, is_first=True)
        rows = self._head.hidden[part]
        self._add(self.weight, ALL, grad.t(), rows, scale, is_first=self._is_first)
        if self.bias is not None:
            of_part = grad.sum(0, dtype=torch.float32)
            if scale is not None:
                of_part *= scale
            self.bias = self.bias.copy_(of_part) if self._is_first else self.bias.add_(of_part)
        self._is_first = False

    def _add(
        self,
        total: Tensor | None,
        rows: slice,
        a: Tensor,
        b: Tensor,
        scale: Tensor | None,
        *,
        is_first: bool,
    ) -> None:
        if total is None:
            return
        out = total[rows]
        if scale is None:
            self._head.product(a, b, out, add=not is_first)
            return
        product = self._head.product(a, b, torch.empty_like(out)).mul_(scale)
        if is_first:
            out.copy_(product)
        else:
            out.add_(product)

    def of_inputs(self, rows: CountedRows) -> tuple[Tensor | None, ...]:
        """Of all rows, in float32 still."""
        if self._is_first:  # no row counted
            for grad in (self.weight, self.bias):
                if grad is not None:
                    grad.zero_()
        of_hidden = None if self.hidden is None else rows.scatter(self.hidden)
        return of_hidden, self.weight, self.bias
