"""Log-probabilities of K tokens per row from one pass over the logits."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def several_token_logprobs(
    token_logprobs: Callable[..., Any],
    logits: Tensor,
    ids: Tensor,
    *,
    temperature: float,
    return_entropy: bool,
) -> Any:
    """[..., K] log-probs of ids [..., K], and the entropy [...] if asked.

        log p_k = log p_b + (x_k - x_b) / T,    b: the likeliest of the K

    Both terms are <= 0, so their sum has the relative error of its terms. From any other b it would
    be a small difference of large numbers wherever some p_k is near 1.
    """
    logits, chosen = _Gather.apply(logits, ids)
    chosen = chosen.to(torch.promote_types(logits.dtype, torch.float32))
    best = chosen.detach().argmax(-1, keepdim=True)
    best_ids, best_logit = ids.gather(-1, best), chosen.gather(-1, best)
    result = token_logprobs(
        logits, best_ids.squeeze(-1), temperature=temperature, return_entropy=return_entropy
    )
    logprobs, entropy = result if return_entropy else (result, None)
    # Constant where b is asked for again: 1 - p_b would drown in + g - g. And -inf - -inf is NaN.
    is_best = (ids == best_ids) | (best_logit == -torch.inf)
    distance = ((chosen - best_logit) / temperature).masked_fill(is_best, 0)
    logprobs = logprobs[..., None] + distance
    return (logprobs, entropy) if return_entropy else logprobs


class _Gather(torch.autograd.Function):
    """(logits, logits.gather(-1, ids)), whose backward pass adds K entries a row to the gradient
    of the first: gather's own writes a second [..., V] and adds the two."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(ids)
        return logits.view_as(logits), logits.gather(-1, ids)

    @staticmethod
    def backward(ctx: Any, grad_logits: Tensor, grad_chosen: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (ids,) = ctx.saved_tensors
        # One of the K at a time: a GPU would add ids that a row has twice in any order.
        # In place: the gradient is fresh, and nobody but the op's backward pass has made it.
        for k in range(ids.shape[-1]):
            grad_logits.scatter_add_(-1, ids[..., k : k + 1], grad_chosen[..., k : k + 1])
        return grad_logits, None
