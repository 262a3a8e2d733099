"""The critic's loss: checks, and the one definition in fastrl.reference."""

from torch import Tensor

from fastrl import reference
from fastrl.ops import _checks, _losses


def value_loss(
    values: Tensor,
    returns: Tensor,
    *,
    old_values: Tensor | None = None,
    clip: float | None = None,
    weights: Tensor | None = None,
    loss_mask: Tensor | None = None,
    reduction: str = "token_mean",
    normalizer: float | Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    op = "value_loss"
    if clip is not None:
        _checks.positive(op, "clip", clip, "It bounds how far values move from old_values.")
    if (clip is None) != (old_values is None):
        given = "clip alone" if old_values is None else "old_values alone"
        raise _checks.fail(op, "clip and old_values together", given, "Pass both or neither.")
    _losses.check(
        op, "values", values, {"returns": returns, "old_values": old_values, "weights": weights},
        loss_mask=loss_mask, reduction=reduction, normalizer=normalizer, cu_seqlens=cu_seqlens,
    )  # fmt: skip
    return reference.value_loss(
        values, returns, old_values=old_values, clip=clip, weights=weights, loss_mask=loss_mask,
        reduction=reduction, normalizer=normalizer, cu_seqlens=cu_seqlens,
    )  # fmt: skip


value_loss.__doc__ = reference.value_loss.__doc__
