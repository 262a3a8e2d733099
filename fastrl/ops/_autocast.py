"""What autocast does to the inputs of our products."""

from typing import Any

import torch
from torch import Tensor


def autocast(*inputs: Any) -> tuple[Any, ...]:
    """The inputs as autocast casts those of torch's own products and attention, if it is on.

    float64 stays what it is, and so does what the op's checks are to refuse.
    """
    kind = next((x.device.type for x in inputs if isinstance(x, Tensor)), "meta")
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        return inputs
    dtype = torch.get_autocast_dtype(kind)
    return tuple(x.to(dtype) if _is_cast(x) else x for x in inputs)


def _is_cast(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64
