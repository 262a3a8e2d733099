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
        mask: bool, shaped like x, True = counts. What stands elsewhere is ignored, NaN too. A NaN
            or infinity that counts makes all entries NaN, on every rank.
        group: process group whose ranks hold parts of one batch: the moments are those of all
            parts together (two passes, summed in float64 and over the ranks in their order, so
            that every rank has the same bits). Every rank has to call; a rank's part may have any
            shape, size and dtype, 0 entries and no mask included.
    Returns:
        whitened: shaped like x, float32 (float64 for float64 x), detached, 0 where mask is False.
    Differentiable in: nothing.
    Reference: Chan, Golub & LeVeque 1983, Algorithms for computing the sample variance (the
        corrected two-pass algorithm).
    """
    x = promote(x.detach())
    valid = torch.ones_like(x, dtype=torch.bool) if mask is None else mask
    kept = x.double().masked_fill(~valid, 0)
    count, total = _over_ranks([valid, kept], group)
    centred = (kept - total / count.clamp(min=1)).masked_fill(~valid, 0)
    # What the mean was rounded by shows in the second pass, and is taken off both moments.
    left, squares = _over_ranks([centred, centred.square()], group)
    left = left / count.clamp(min=1)
    variance = (squares - count * left.square()).clamp(min=0) / (count - 1).clamp(min=1)
    scale = torch.where(count < 2, 1.0, (variance + 1e-8).rsqrt())
    return ((centred - left) * scale).masked_fill(~valid, 0).to(x.dtype)


def _over_ranks(parts: list[Tensor], group: dist.ProcessGroup | None) -> Tensor:
    """[len(parts)] float64: the sum of each over all its entries, on all ranks."""
    totals = torch.stack([part.sum(dtype=torch.float64) for part in parts])
    if group is None:
        return totals
    each = [torch.empty_like(totals) for _ in range(dist.get_world_size(group))]
    dist.all_gather(each, totals, group=group)
    return torch.stack(each).sum(0)
