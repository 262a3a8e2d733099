"""A number for a tensor's bits, to tell at a resume whether frozen weights are those of before.

    digest = sum_i mix(w_i) · (2 i + 1) · c  mod 2^64        w_i the i-th 8 bytes, i from 1

in int64, whose sums wrap: exact, so it depends neither on threads nor on the device. A single
other word changes it always, since mix is one to one and the factors are odd, and other words or
another order all but surely. Against accidents, not against forgery.
"""

import torch
from torch import Tensor

_WORDS = 1 << 16  # at a time: what is mixed stays in the cache
_ODD, _MIX = -0x61C8864680B583EB, -0x40A7B892E31B1A47  # of splitmix64


@torch.no_grad()
def digest(tensor: Tensor) -> int:
    """In [0, 2^64), of the bits in the order of the indices; shape and dtype are not in it."""
    flat = tensor.detach().contiguous().flatten().view(torch.uint8)
    words = torch.empty(_WORDS, dtype=torch.int64, device=tensor.device)
    factors = (2 * torch.arange(1, _WORDS + 1, device=tensor.device) + 1) * _ODD
    step = factors[-1] - factors[0] + factors[1] - factors[0]  # between the factors of two parts
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for part in flat.split(8 * _WORDS):
        count = -(-len(part) // 8)
        own = words[:count]
        own[-1:] = 0  # what the last word has not
        own.view(torch.uint8)[: len(part)] = part  # a copy, so at an address that can be viewed
        own ^= (own >> 32) & 0xFFFFFFFF
        own *= _MIX
        own ^= (own >> 29) & 0x7FFFFFFFF
        own *= factors[:count]
        total += own.sum()
        factors += step
    return int(total) & 0xFFFFFFFFFFFFFFFF
