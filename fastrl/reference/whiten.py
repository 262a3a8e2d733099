"""Zero mean and unit variance."""

import torch
import torch.distributed as dist
from torch import Tensor

from fastrl.reference._precision import promote


def whiten(
    x: Tensor, mask: Tensor | None = None, *, group: dist.ProcessGroup | None = None
) -> Tensor:
    """Shifts and scales x to zero mean and unit variance over the entries that count:

        (x - mean) / sqrt(var + 1e-8)

    var has n - 1 in the denominator. With fewer than two entries the result is x - mean.

    Args:
        x: any shape.
        mask: bool, shaped like x, True = counts. What stands elsewhere is ignored, NaN too.
        group: process group whose ranks hold parts of one batch: the moments are those of all
            parts together (two passes, summed in float64). Every rank has to call; a rank's part
            may have any size, 0 included.
    Returns:
        whitened: shaped like x, float32 (float64 for float64 x), detached, 0 where mask is False.
    Differentiable in: nothing.
    """
    x = promote(x.detach())
    valid = torch.ones_like(x, dtype=torch.bool) if mask is None else mask
    kept = x.masked_fill(~valid, 0)
    count = _total(valid, group)
    mean = _total(kept, group) / count.clamp(min=1)
    centred = (kept.double() - mean).masked_fill(~valid, 0)
    variance = _total(centred.square(), group) / (count - 1).clamp(min=1)
    scale = torch.where(count < 2, 1.0, (variance + 1e-8).rsqrt())
    return (centred * scale).to(x.dtype)


def _total(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    total = x.sum(dtype=torch.float64)
    if group is not None:
        dist.all_reduce(total, group=group)
    return total
