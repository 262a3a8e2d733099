"""Tensors of the host on their way to a device, without a wait for what it is doing."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

# Bytes. At such addresses a compiled kernel may read as at that of a tensor of its own.
_ALIGNED = 16


def on_device(tensors: Sequence[Tensor], device: torch.device | str) -> list[Tensor]:
    """The tensors on a device; those that are there are not copied.

    To a GPU they go in one copy from page-locked memory, which takes its place behind the GPU's
    other work. Copied one by one as they lie, each would wait until all of that is done: a GPU then
    idles while its host goes on.
    """
    device = torch.device(device)
    if not tensors or device.type != "cuda" or any(x.device.type != "cpu" for x in tensors):
        return [x.to(device) for x in tensors]
    dense = [x.contiguous() for x in tensors]
    # torch gives the locked memory to nobody else before the copy has been made.
    return _cut(_joined(dense).pin_memory().to(device, non_blocking=True), dense)


def _joined(dense: list[Tensor]) -> Tensor:
    """[bytes] uint8: one tensor after another, each from an aligned address on."""
    pieces = [x.flatten().view(torch.uint8) for x in dense]
    return torch.cat([pad(piece, (0, -len(piece) % _ALIGNED)) for piece in pieces])


def _cut(joined: Tensor, like: list[Tensor]) -> list[Tensor]:
    """What `_joined` put together, in the same memory."""
    storage, begin = joined.untyped_storage(), 0
    found = []
    for x in like:
        # Not a view: torch.compile looks for what a view is of.
        own = torch.empty(0, dtype=x.dtype, device=joined.device)
        found.append(own.set_(storage, begin // x.element_size(), x.shape, x.stride()))
        begin += -(-x.nbytes // _ALIGNED) * _ALIGNED
    return found
