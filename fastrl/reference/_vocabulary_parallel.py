"""Logits whose vocabulary is cut into slices over the ranks of a process group."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def gather_vocabulary(logits: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[..., V] from each rank's slice [..., V_rank], in rank order; slices may differ in size.

    Only this rank's own slice is differentiable: every rank computes the same loss, and backward
    gives it the gradient of its own logits.
    """
    size = torch.tensor([logits.shape[-1]], device=logits.device)
    sizes = [torch.empty_like(size) for _ in range(dist.get_world_size(group))]
    dist.all_gather(sizes, size, group=group)
    widths = [int(width) for width in sizes]
    padded = logits.new_zeros(*logits.shape[:-1], max(widths))
    padded[..., : logits.shape[-1]] = logits.detach()
    slices = [torch.empty_like(padded) for _ in widths]
    dist.all_gather(slices, padded, group=group)
    parts = [part[..., :width] for part, width in zip(slices, widths, strict=True)]
    parts[dist.get_rank(group)] = logits
    return torch.cat(parts, dim=-1)


class SumGradient(torch.autograd.Function):
    """Identity whose gradient is summed over the group: for an input that every rank holds, and
    of whose gradient each rank computes the part that comes through its own slice."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        total = grad_outputs[0].contiguous().clone()
        dist.all_reduce(total, group=ctx.group)
        return total, None
