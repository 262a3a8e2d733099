"""Attention's launchers as autograd calls them, and what they are held against."""

import torch

from fastrl import reference
from fastrl._tiles import attention_tiles
from fastrl.layout import PackedLayout

MODULE = "fastrl.kernels.attention"


def layout_of(lengths, prefix):
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    return PackedLayout(cu_seqlens, torch.tensor(prefix, dtype=torch.int32))


def schedule_of(layout):
    """What the layout has on a GPU, for tensors on the CPU: the interpreter's."""
    bounds = layout.cu_seqlens.long()
    until = torch.cat([layout.visible_until.long(), bounds[-1:]])[bounds[:-1]]
    return attention_tiles(bounds[:-1], bounds[1:], until)


def visible_of(query, *, layout=None, causal=True, scale=None, window=None, softcap=None,
               key_start=None, key_end=None):  # fmt: skip
    """The ops' arguments from key_start to softcap."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if layout is None:
        return key_start, key_end, None, None, [], causal, scale, window, softcap
    of_layout = layout.position_ids, layout.visible_until, schedule_of(layout)
    return None, None, *of_layout, True, scale, window, softcap


def inputs(shape, dtype=torch.float32, seed=0):
    """query, key, value, and the gradients that come from above; shape = (B, Hq, Hkv, T, S, D)."""
    batch, heads, key_heads, T, S, D = shape
    generator = torch.Generator().manual_seed(seed)

    def randn(*sizes):
        return torch.randn(sizes, generator=generator)

    query, key, value = randn(batch, heads, T, D), *randn(2, batch, key_heads, S, D)
    grad_output, grad_lse = randn(batch, heads, T, D), randn(batch, heads, T)
    return *(x.to(dtype) for x in (query, key, value, grad_output)), grad_lse


def run(interpreted, tensors, module=MODULE, before=(), **options):
    """output, lse and the three gradients."""
    query, key, value, grad_output, grad_lse = tensors
    visible = visible_of(query, **options)
    arguments = (query, key, value, *visible, query.element_size() == 2)
    output, lse, residue = interpreted(module, "attention_fwd", *before, *arguments)
    saved = (grad_output, grad_lse, query, key, value, output, lse, residue)
    grads = interpreted(module, "attention_bwd", *before, *saved, *visible, True, True, True)
    return output, lse, *grads


def plain(tensors, dtype=None, **options):
    """The same by the definition, in another dtype if one is given."""
    query, key, value, grad_output, grad_lse = tensors
    leaves = [x.to(dtype or x.dtype).clone().requires_grad_() for x in (query, key, value)]
    output, lse = reference.attention(*leaves, **options, return_lse=True)
    seen = lse.isfinite()
    loss = (output * grad_output.to(output.dtype)).sum()
    loss = loss + (lse[seen] * grad_lse.to(lse.dtype)[seen]).sum()
    loss.backward()
    return output.detach(), lse.detach(), *(x.grad for x in leaves)


def assert_same_bits(left, right):
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert torch.equal(a, b)
