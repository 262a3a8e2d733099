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
    if group is not None and not isinstance(group, dist.ProcessGroup):
        remedy = "Pass one, such as torch.distributed.group.WORLD, on every rank."
        got = type(group).__name__
        raise _checks.wrong_type("whiten", "group as a ProcessGroup", got, remedy)
    return reference.whiten(x, mask, group=group)


whiten.__doc__ = f"""{reference.whiten.__doc__}
    Raises:
        ValueError: mask is not shaped like x.
        TypeError: x is not floating-point, mask not bool, or group no process group.
    """
