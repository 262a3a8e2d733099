"""How well a language model predicts a text."""

import math
from types import ModuleType
from typing import Any

import torch
from torch import Tensor


@torch.no_grad()
def perplexity(model: Any, blocks: list[Tensor], ops: ModuleType) -> float:
    """exp of the mean −log P(w_i | w_<i) over all tokens but the first of each block."""
    device = next(model.parameters()).device
    total, count = 0.0, 0
    for block in blocks:
        token_ids = block.to(device)
        logits, _ = model(token_ids[None, :-1])
        total -= float(ops.token_logprobs(logits[0], token_ids[1:]).double().sum())
        count += block.numel() - 1
    return math.exp(total / count)
