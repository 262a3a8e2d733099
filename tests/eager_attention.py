"""Attention as a model's own code computes it, each operation rounded to the inputs' dtype."""

import torch

from fastrl import reference


def eager_attention(query, key, value, **options):
    """reference.attention of these options; the softmax alone is in float32."""
    heads, (T, S) = query.shape[1], (query.shape[2], key.shape[2])
    zeros = query.new_zeros(1, 1, max(T, S), S)
    eye = torch.eye(S, dtype=query.dtype, device=query.device)[None, None]
    visible = reference.attention(zeros[:, :, :T], zeros[:, :, :S], eye, **options) > 0
    key, value = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (key, value))
    scores = (query @ key.mT * query.shape[-1] ** -0.5).masked_fill(~visible, -torch.inf)
    return scores.softmax(-1, dtype=torch.float32).to(query.dtype) @ value


def assert_no_worse_than_eager(actual, tensors, **options):
    """The gradients of query, key and value, by their errors' norms.

    tensors: query, key, value, and the gradient from above.
    """
    *inputs, grad_output = tensors
    grads = {}
    for dtype, attention in (
        (grad_output.dtype, eager_attention),
        (torch.float64, reference.attention),
    ):
        leaves = [x.detach().to(dtype).requires_grad_() for x in inputs]
        output = attention(*leaves, **options)
        grads[dtype] = torch.autograd.grad(output, leaves, grad_output.to(dtype))
    for x, eager, truth in zip(actual, *grads.values(), strict=True):
        assert (x - truth).norm() <= (eager - truth).norm()
