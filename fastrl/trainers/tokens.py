"""What a model says of tokens that were sampled, without learning."""

import functools
from contextlib import AbstractContextManager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fastrl.layout import PackedBatch
from fastrl.models import PolicyModel
from fastrl.trainers.micro_batches import micro_batches, tree_sizes
from fastrl.trainers.processes import Processes

_TOKENS_AT_ONCE = 1 << 16


def autocast(device: torch.device, precision: str) -> AbstractContextManager[Any]:
    """The layers' precision; heads and log-probabilities are computed outside of it."""
    is_half = precision == "bfloat16"
    return torch.autocast(device.type, torch.bfloat16, enabled=is_half)


@torch.no_grad()
def token_scores(
    policy: PolicyModel,
    batch: PackedBatch,
    *,
    temperature: float,
    ops: ModuleType,
    precision: str = "float32",
    max_tokens: int | None = None,
    processes: Processes | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probability and entropy of a batch's targets, [M] float32 each, nats.

    Args:
        processes: those that compute a part each; None: this one computes all.
    """
    if processes is not None:
        part = functools.partial(
            token_scores,
            policy,
            temperature=temperature,
            ops=ops,
            precision=precision,
            max_tokens=max_tokens,
        )
        logprobs, entropy = processes.computed(batch, part, 2)
        return logprobs.float(), entropy.float()
    device = batch.token_ids.device
    logprobs = torch.empty(len(batch.target_ids), dtype=torch.float32, device=device)
    entropy = torch.empty_like(logprobs)
    for micro, at in micro_batches(batch, max_tokens or most_at_once(batch)):
        with autocast(device, precision):
            hidden = policy.packed_hidden(micro)
        head = policy.head
        logprobs[at], entropy[at] = ops.linear_token_logprobs(
            hidden.to(head.weight.dtype),
            head.weight,
            micro.target_ids,
            return_entropy=True,
            **head.arguments(temperature),
        )
    return logprobs, entropy


def most_at_once(batch: PackedBatch) -> int:
    """Nothing is kept for gradients, but even so not a whole dataset at a time."""
    return max([_TOKENS_AT_ONCE, *tree_sizes(batch).tolist()])


def token_mean(values: Tensor, mask: Tensor) -> Tensor:
    """The mean of values [M] where mask [M] is True; 0 where it nowhere is."""
    return values.masked_fill(~mask, 0).sum() / mask.sum().clamp(min=1)


def to_numbers(metrics: dict[str, Tensor]) -> dict[str, float]:
    """0-d tensors as floats, in one transfer."""
    if not metrics:
        return {}
    values = torch.stack([value.detach().double() for value in metrics.values()])
    return dict(zip(metrics, values.tolist(), strict=True))
