"""A user's per-token loss, called, checked and differentiated."""

from typing import Any

import torch
from torch import Tensor

from fastrl.ops import _checks

_DIGITS = 11  # to base 4, of an index among the tokens that there are at once


class TokenLoss:
    """loss_fn(logprobs [n], entropy [n], rows [n]) -> [n], entry i of entry i alone.

    Called for some tokens at a time; `total` then has the sum over all of them. That it mixes no
    tokens is checked by its derivatives: those of a weighted sum of the losses are the weighted
    derivatives of the sum, and weights that are powers of two change no digit. The first time its
    values are checked too, by a call that changes some tokens' numbers and must leave the others'
    losses as they are, to the bit. Where looking at the result would synchronise, the loss is NaN
    instead of an error. Whatever can wait is done once, at the end: on a GPU the tokens of a slice
    are so few that a pass over them costs no more than its launch.
    """

    def __init__(self, op: str, loss_fn: Any) -> None:
        if not callable(loss_fn):
            raise _checks.wrong_type(
                op, "loss_fn to be callable", type(loss_fn).__name__,
                "Pass a function of (logprobs, entropy, rows).",
            )  # fmt: skip
        self._op, self._loss_fn = op, loss_fn
        self._weights: Tensor | None = None  # of as many tokens as there were at once
        self._ones: Tensor
        self._losses: list[tuple[Tensor, Tensor | None]] = []  # and which of them are ignored
        # Of both leaves: derivatives, those of the weighted sum, the weights, and what is ignored.
        self._derivatives: list[tuple[Tensor, Tensor, Tensor, Tensor | None]] = []
        self._mixes: Tensor | None = None  # 0-d bool, of the values

    def __call__(
        self, logprobs: Tensor, entropy: Tensor, rows: Tensor, ignored: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """The derivatives, float32 [n] or None; those of ignored tokens are anything.

        Args:
            ignored: [n] bool; None: none of them.
        """
        with torch.enable_grad():
            return self._differentiate(logprobs, entropy, rows, ignored)

    def total(self, like: Tensor) -> Tensor:
        """0-d float64: the sum of what was called for. ValueError where loss_fn mixes tokens."""
        if not self._losses:
            return like.new_zeros((), dtype=torch.float64)
        losses, ignored = _joined(self._losses)
        total = _without(ignored, losses.double()).sum()
        if self._mixes is not None:
            total = self._refuse(self._mixes, total)
        if self._derivatives:
            plain, weighted, weights, ignored = _joined(self._derivatives)
            alike = torch.isclose(plain * weights, weighted, rtol=1e-5, atol=1e-30, equal_nan=True)
            total = self._refuse(_without(ignored, ~alike).any(), total)
        return total

    def _differentiate(
        self, logprobs: Tensor, entropy: Tensor, rows: Tensor, ignored: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        leaves = (logprobs.detach().requires_grad_(), entropy.detach().requires_grad_())
        losses = self._checked(*leaves, rows)
        self._losses.append((losses.detach(), ignored))
        is_first = self._weights is None
        if self._weights is None or len(self._weights) < len(rows):
            self._weights = _powers_of_two(len(rows), losses)
            self._ones = torch.ones_like(self._weights)
        weights, ones = self._weights[: len(rows)], self._ones[: len(rows)]
        if is_first:
            self._mixes = self._mixed(losses.detach(), logprobs, entropy, rows, ignored)
        if not losses.requires_grad:
            return None, None
        self._refuse_foreign(losses, leaves)
        plain = torch.autograd.grad(losses, leaves, ones, allow_unused=True, retain_graph=True)
        weighted = torch.autograd.grad(losses, leaves, weights, allow_unused=True)
        for a, b in zip(plain, weighted, strict=True):
            if a is not None and b is not None:
                self._derivatives.append((a, b, weights, ignored))
        g, h = (None if x is None else x.float() for x in plain)
        return g, h

    def _mixed(
        self,
        losses: Tensor,
        logprobs: Tensor,
        entropy: Tensor,
        rows: Tensor,
        ignored: Tensor | None,
    ) -> Tensor:
        """Whether some losses are others when other tokens have other numbers."""
        assert self._weights is not None
        other = self._weights == 1  # a half of them and more is left as it is, in its place
        again = self._checked(
            torch.where(other, logprobs - 1, logprobs).detach(),
            torch.where(other, entropy + 1, entropy).detach(),
            rows,
        )
        mixes = (losses != again.detach()) & (losses == losses) & ~other
        return _without(ignored, mixes).any()

    def _checked(self, logprobs: Tensor, entropy: Tensor, rows: Tensor) -> Tensor:
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


def _joined(parts: list[tuple[Any, ...]]) -> list[Any]:
    """Each column in one piece; None where it is None throughout."""
    columns = zip(*parts, strict=True)
    return [None if column[0] is None else torch.cat(column) for column in columns]


def _without(ignored: Tensor | None, x: Tensor) -> Tensor:
    return x if ignored is None else x.masked_fill(ignored, 0)


def _powers_of_two(n: int, like: Tensor) -> Tensor:
    """1, 2, 4 or 8, by the sum of an index's digits to base 4: indices that differ in one digit,
    as neighbours in time or in a batch do, differ in their weight."""
    index = torch.arange(n, device=like.device)
    # All i // 4^k together are, modulo 4, the sum of the digits of i.
    shifts = torch.arange(0, 2 * _DIGITS, 2, device=like.device)
    digits = (index[:, None] >> shifts).sum(1) & 3
    return torch.bitwise_left_shift(torch.ones_like(digits), digits).to(like.dtype)
