"""The attention function that transformers calls in each layer."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from fastrl import ops
from fastrl.hf._masks import existing_keys
from fastrl.hf._models import check_call, check_packable
from fastrl.hf._packing import packing
from fastrl.layout import PackedLayout
from fastrl.ops._checks import fail

_NOT_GIVEN: Any = object()  # a model that hands on no window is not one that says it has none


def attention_function(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = _NOT_GIVEN,
    softcap: float | None = None,
    is_causal: bool | None = None,
    layout: PackedLayout | None = None,
    position_ids: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What transformers calls in each layer.

    Args:
        query: [B, Hq, T, D]; key, value: [B, Hkv, S, D].
        attention_mask: what our mask function returned.
    Returns:
        output [B, T, Hq, D], and no weights.
    """
    causal = getattr(module, "is_causal", None) if is_causal is None else is_causal
    check_call(module, causal, dropout, kwargs)
    numbers = {
        "scale": scaling,
        "window": _window(module, key, sliding_window),
        "softcap": softcap,
    }
    batch, _, num_queries, _ = query.shape
    key_start, key_end = existing_keys(attention_mask, batch, key.shape[2])
    packed = packing(
        module, query, key, attention_mask, layout, position_ids, cu_seq_lens_q, cu_seq_lens_k
    )
    if packed is None:
        if kwargs.get("seq_idx") is not None:
            raise fail("hf", "seq_idx beside position_ids that restart", "it alone", "Pass both.")
        keys = {"key_start": key_start, "key_end": key_end}
        return _attend(query, key, value, **numbers, **keys), None
    check_packable(module)
    if batch == 1:
        return _attend(query, key, value, layout=packed, **numbers), None
    query, key, value = (_one_row(x) for x in (query, key, value))
    output = _attend(query, key, value, layout=packed, **numbers)
    return output.unflatten(1, (batch, num_queries)).squeeze(0), None


def _attend(query: Tensor, key: Tensor, value: Tensor, **kwargs: Any) -> Tensor:
    """[B, T, Hq, D_v]; values narrower than keys (latent attention) are padded, as elsewhere."""
    width = value.shape[-1]
    missing = key.shape[-1] - width
    if missing < 0:
        got = f"{width} beside {key.shape[-1]}"
        raise fail("hf", "values no wider than keys", got, "Use another attn_implementation.")
    if missing:
        value = F.pad(value, (0, missing))
    output = ops.attention(query, key, value, **kwargs)
    assert isinstance(output, Tensor)
    return output[..., :width].transpose(1, 2).contiguous()


def _one_row(x: Tensor) -> Tensor:
    """[1, H, B * T, D] of [B, H, T, D]."""
    return x.transpose(1, 2).flatten(0, 1).transpose(0, 1)[None]


def _window(module: nn.Module, key: Tensor, given: int | None) -> int | None:
    if given is not _NOT_GIVEN:
        return given
    # The mask function may have been asked for a window that this layer does not tell us about.
    configured = getattr(getattr(module, "config", None), "sliding_window", None)
    if configured is not None and key.shape[2] > configured:
        got = f"none in {type(module).__name__}, with config.sliding_window {configured}"
        remedy = "Set config.sliding_window = None, or use another attn_implementation."
        raise fail("hf", "a sliding_window from each layer", got, remedy)
    return None
