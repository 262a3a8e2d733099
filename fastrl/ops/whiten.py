"""Whitening: checks, and the one definition in fastrl.reference."""

import torch.distributed as dist
from torch import Tensor

from fastrl import reference
from fastrl.ops import _checks


def whiten(
    x: Tensor, mask: Tensor | None = None, *, group: dist.ProcessGroup | None = None
) -> Tensor:
    _checks.float_tensor("whiten", "x", x)
    if mask is not None:
        _checks.bool_like("whiten", "mask", mask, "x", x)
    return reference.whiten(x, mask, group=group)


whiten.__doc__ = reference.whiten.__doc__
