"""From per-token losses to one number."""

import torch
from torch import Tensor

from fastrl.reference._precision import compute_dtype
from fastrl.reference._rows import Rows


class LossTokens:
    """The tokens that a loss counts, as rows [R, T] (see Rows), and how their losses add up.

    All arithmetic of a loss happens on these rows: what loss_mask excludes is 0 in them.
    """

    def __init__(
        self,
        like: Tensor,
        loss_mask: Tensor | None,
        cu_seqlens: Tensor | None,
        *others: Tensor | None,
    ) -> None:
        self._rows = Rows(like, loss_mask, cu_seqlens)
        self._dtype = compute_dtype(like, *others)

    def of(self, tensor: Tensor) -> Tensor:
        """[R, T], differentiable."""
        return self._rows.pad(tensor.to(self._dtype))

    def target(self, tensor: Tensor) -> Tensor:
        """[R, T], detached."""
        return self.of(tensor.detach())

    def sequence_mean(self, rows: Tensor) -> Tensor:
        """[R, 1]: the mean over each row's counted tokens; 0 for a row without one."""
        return rows.sum(1, keepdim=True) / self._rows.valid.sum(1, keepdim=True).clamp(min=1)

    def reduce(
        self,
        losses: Tensor,
        weights: Tensor | None,
        reduction: str,
        normalizer: float | Tensor | None,
    ) -> Tensor:
        """losses [R, T] times weights, reduced to a scalar, or the caller's shape for "none"."""
        if weights is not None:
            losses = losses * self.target(weights)
        if reduction == "none":
            return self._rows.unpad(losses)
        valid = self._rows.valid
        losses = losses.masked_fill(~valid, 0)
        if reduction == "token_mean":
            total, count = losses.sum(), valid.sum()
        elif reduction == "sequence_mean":
            total, count = self.sequence_mean(losses).sum(), valid.any(1).sum()
        elif reduction == "sequence_mean_token_sum":
            total, count = losses.sum(), valid.any(1).sum()
        else:
            raise ValueError(
                "loss: expected reduction token_mean, sequence_mean, sequence_mean_token_sum or "
                f"none, got {reduction!r}. Name one of the four."
            )
        if normalizer is None:
            return total / count.clamp(min=1)
        given = torch.as_tensor(normalizer, dtype=total.dtype, device=total.device)
        given = given.detach().reshape(())
        # A global count is 0 where no rank has a token: 0 / 0 would be NaN.
        return total / given.where((given != 0) | (count > 0), 1)
