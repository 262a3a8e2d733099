"""Checks that the losses share."""

from torch import Tensor

from fastrl.ops import _checks

REDUCTIONS = ("token_mean", "sequence_mean", "sequence_mean_token_sum", "none")
_MAY_BE_NONE = ("weights", "old_values", "entropy")


def check(
    op: str,
    name: str,
    x: Tensor,
    like: dict[str, Tensor | None],
    *,
    loss_mask: Tensor | None,
    reduction: str,
    normalizer: float | Tensor | None,
    cu_seqlens: Tensor | None,
    by_sequence: bool = False,
) -> None:
    """x is the loss's first argument, `name`; each tensor in `like` has its shape and device."""
    _checks.float_tensor(op, name, x)
    if x.dim() == 0:
        raise _checks.fail(op, f"{name} [..., T]", "()", "Use [None] for a single token.")
    for other, tensor in like.items():
        if tensor is not None or other not in _MAY_BE_NONE:
            _checks.like(op, other, tensor, name, x)
    if loss_mask is not None:
        _checks.bool_like(op, "loss_mask", loss_mask, name, x)
    _checks.one_of(op, "reduction", reduction, REDUCTIONS)
    if isinstance(normalizer, Tensor):
        if normalizer.numel() != 1:  # it would broadcast, and there would be several losses
            got = _checks.shape(normalizer)
            raise _checks.fail(op, "normalizer as one number", got, "Add them up.")
    elif normalizer is not None:
        _checks.positive(op, "normalizer", normalizer, "Pass the number of tokens or sequences.")
    if cu_seqlens is not None:
        if x.dim() != 1:
            raise _checks.fail(
                op, f"packed {name} [N] with cu_seqlens", _checks.shape(x), "Flatten them."
            )
        _checks.cu_seqlens(op, cu_seqlens, x.numel(), x, like=name)
    elif x.dim() < 2 and (by_sequence or reduction.startswith("sequence")):
        raise _checks.fail(
            op,
            f"{name} [B, T], or packed [N] with cu_seqlens, where sequences count",
            _checks.shape(x),
            f"Pass cu_seqlens, or {name}[None] for one sequence.",
        )
