"""A user's per-token loss, called, checked and differentiated."""

from typing import Any

import torch
from torch import Tensor

from fastrl.ops import _checks


class TokenLoss:
    """loss_fn(logprobs [n], entropy [n], rows [n]) -> [n], entry i of entry i alone.

    That it mixes no tokens is checked by its derivatives: those of a weighted sum of the losses are
    the weighted derivatives of the sum, and weights that are powers of two change no digit. The
    first time its values are checked too, by a call that changes some tokens' numbers and must
    leave the others' losses as they are, to the bit. Where looking at the result would synchronise,
    the loss is NaN instead of an error.
    """

    def __init__(self, op: str, loss_fn: Any) -> None:
        if not callable(loss_fn):
            raise _checks.wrong_type(
                op, "loss_fn to be callable", type(loss_fn).__name__,
                "Pass a function of (logprobs, entropy, rows).",
            )  # fmt: skip
        self._op, self._loss_fn, self._is_first = op, loss_fn, True
        self._weights: Tensor | None = None  # of as many tokens as there were at once

    def __call__(
        self, logprobs: Tensor, entropy: Tensor, rows: Tensor, counted: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The sum over the tokens that count, and its derivatives, float32 [n] or None."""
        with torch.enable_grad():
            return self._differentiate(logprobs, entropy, rows, counted)

    def _differentiate(
        self, logprobs: Tensor, entropy: Tensor, rows: Tensor, counted: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        leaves = (logprobs.detach().requires_grad_(), entropy.detach().requires_grad_())
        losses = self._losses(*leaves, rows)
        total = losses.detach().double().masked_fill(~counted, 0.0).sum()
        if self._weights is None or len(self._weights) < len(rows):
            self._weights = _powers_of_two(len(rows), losses)
        weights = self._weights[: len(rows)]
        if self._is_first:
            self._is_first = False
            other = weights == 1  # a half of them and more is left as it is, in its place
            again = self._losses(
                torch.where(other, logprobs - 1, logprobs).detach(),
                torch.where(other, entropy + 1, entropy).detach(),
                rows,
            )
            mixes = (losses.detach() != again.detach()) & (losses == losses)
            total = self._refuse((mixes & ~other & counted).any(), total)
        if not losses.requires_grad:
            return total, None, None
        self._refuse_foreign(losses, leaves)
        plain = torch.autograd.grad(
            losses, leaves, torch.ones_like(losses), allow_unused=True, retain_graph=True
        )
        weighted = torch.autograd.grad(losses, leaves, weights, allow_unused=True)
        for a, b in zip(plain, weighted, strict=True):
            if a is not None and b is not None:
                unlike = ~torch.isclose(a * weights, b, rtol=1e-5, atol=1e-30, equal_nan=True)
                total = self._refuse((unlike & counted).any(), total)
        g, h = (None if x is None else x.float().masked_fill(~counted, 0.0) for x in plain)
        return total, g, h

    def _losses(self, logprobs: Tensor, entropy: Tensor, rows: Tensor) -> Tensor:
        losses = self._loss_fn(logprobs, entropy, rows)
        if not isinstance(losses, Tensor):
            raise _checks.wrong_type(
                self._op, "loss_fn to return a tensor", type(losses).__name__, "Return [n] losses."
            )
        if losses.shape != rows.shape:
            raise _checks.fail(
                self._op, f"loss_fn to return [n] = {tuple(rows.shape)}", _checks.shape(losses),
                "Return a loss per token, and index what else it needs with rows.",
            )  # fmt: skip
        return losses

    def _refuse(self, mixes: Tensor, total: Tensor) -> Tensor:
        if not _checks.contents_are_known(mixes):
            return total.masked_fill(mixes, torch.nan)
        if bool(mixes):
            raise _checks.fail(
                self._op, "loss_fn to be a function of each token by itself", "one that mixes them",
                "Use linear_token_logprobs for a loss over sequences.",
            )  # fmt: skip
        return total

    def _refuse_foreign(self, losses: Tensor, leaves: tuple[Tensor, ...]) -> None:
        """A tensor that requires grad, and is none of ours, would get no gradient."""
        todo, seen = [losses.grad_fn], set()
        while todo:
            node = todo.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            variable = getattr(node, "variable", None)
            if variable is not None and not any(variable is leaf for leaf in leaves):
                raise _checks.fail(
                    self._op, "loss_fn to close over no tensor that requires grad",
                    f"one of shape {tuple(variable.shape)}", "Detach it.",
                )  # fmt: skip
            todo += [following for following, _ in node.next_functions]


def _powers_of_two(n: int, like: Tensor) -> Tensor:
    """1, 2, 4 or 8, by the sum of an index's digits to base 4: indices that differ in one digit,
    as neighbours in time or in a batch do, differ in their weight."""
    digits = index = torch.arange(n, device=like.device)
    for _ in range(10):
        index = index // 4
        digits = digits + index
    return (torch.ones_like(digits) << (digits % 4)).to(like.dtype)
