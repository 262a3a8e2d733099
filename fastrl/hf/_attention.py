"""The attention function that transformers calls in each layer."""

from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastrl import ops
from fastrl.hf._masks import existing_keys
from fastrl.hf._models import check_call, check_packable
from fastrl.hf._packing import packing
from fastrl.layout import PackedLayout
from fastrl.ops._checks import fail

_NOT_GIVEN: Any = object()  # a model that hands on no window is not one that says it has none


class Decoding(Protocol):
    """Keys and values of sequences that go on, as `fastrl.models` keeps them. Passed to the model
    as decoding=: beside a layout what is read is stored, without one each row is a new token."""

    @property
    def most_keys(self) -> int:
        """Keys of the longest sequence when it ends."""
        ...

    def store(self, module: nn.Module, key: Tensor, value: Tensor) -> None:
        """Keep a layout's keys and values [1, Hkv, N, D] of a layer."""
        ...

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, **numbers: Any
    ) -> tuple[Tensor, Tensor]:
        """Keep each row's [R, Hkv, 1, D], and attend to all of it: output [R, Hq, 1, D] and the
        log of the sum of its weights [R, Hq, 1]."""
        ...


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
    decoding: Decoding | None = None,
    s_aux: Tensor | None = None,
    token_positions: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What transformers calls in each layer.

    Args:
        query: [B, Hq, T, D]; key, value: [B, Hkv, S, D].
        attention_mask: what our mask function returned.
        decoding: where keys and values are kept; T = 1 without a layout.
        s_aux: [Hq], the score of a sink in each head, which takes its part and gives nothing.
        token_positions: position_ids again, from who knows that some layers are not told them.
    Returns:
        output [B, T, Hq, D], and no weights.
    """
    causal = getattr(module, "is_causal", None) if is_causal is None else is_causal
    check_call(module, causal, dropout, kwargs)
    _check_sinks(module, s_aux, query.shape[1])
    if position_ids is None:
        position_ids = token_positions
    num_keys = key.shape[2] if decoding is None else decoding.most_keys
    numbers = {
        "scale": scaling,
        "window": _window(module, num_keys, sliding_window),
        "softcap": softcap,
    }
    if decoding is not None:
        wide = _as_wide(key, value)
        if layout is None:
            output, lse = decoding.attend(module, query, key, wide, **numbers)
            output = _beside_sinks(output[..., : value.shape[-1]], lse, s_aux)
            return output.transpose(1, 2), None
        decoding.store(module, key, wide)
    batch, _, num_queries, _ = query.shape
    key_start, key_end = existing_keys(attention_mask, batch, key.shape[2])
    packed = packing(
        module, query, key, attention_mask, layout, position_ids, cu_seq_lens_q, cu_seq_lens_k
    )
    if packed is None:
        if kwargs.get("seq_idx") is not None:
            raise fail("hf", "seq_idx beside position_ids that restart", "it alone", "Pass both.")
        keys = {"key_start": key_start, "key_end": key_end}
        return _attend(query, key, value, s_aux, **numbers, **keys), None
    check_packable(module)
    if batch == 1:
        return _attend(query, key, value, s_aux, layout=packed, **numbers), None
    query, key, value = (_one_row(x) for x in (query, key, value))
    output = _attend(query, key, value, s_aux, layout=packed, **numbers)
    return output.unflatten(1, (batch, num_queries)).squeeze(0), None


def _attend(
    query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, **kwargs: Any
) -> Tensor:
    """[B, T, Hq, D_v]."""
    output, lse = ops.attention(query, key, _as_wide(key, value), return_lse=True, **kwargs)
    output = _beside_sinks(output[..., : value.shape[-1]], lse, sinks)
    return output.transpose(1, 2).contiguous()


def _beside_sinks(output: Tensor, lse: Tensor, sinks: Tensor | None) -> Tensor:
    """output [B, H, T, D] of a softmax that has one more key, without a value: its sum exp(lse)
    becomes exp(lse) + exp(sink)."""
    if sinks is None:
        return output
    part = torch.sigmoid(lse - sinks[:, None])
    return (output * part[..., None]).to(output.dtype)


def _check_sinks(module: nn.Module, sinks: Tensor | None, num_heads: int) -> None:
    if sinks is not None and sinks.shape != (num_heads,):
        where, got = type(module).__name__, tuple(sinks.shape)
        remedy = "Use another attn_implementation."
        raise fail("hf", f"s_aux [Hq] = ({num_heads},) in {where}", got, remedy)


def _as_wide(key: Tensor, value: Tensor) -> Tensor:
    """Values narrower than keys (latent attention) are padded, as elsewhere."""
    missing = key.shape[-1] - value.shape[-1]
    if missing < 0:
        got = f"{value.shape[-1]} beside {key.shape[-1]}"
        raise fail("hf", "values no wider than keys", got, "Use another attn_implementation.")
    return F.pad(value, (0, missing)) if missing else value


def _one_row(x: Tensor) -> Tensor:
    """[1, H, B * T, D] of [B, H, T, D]."""
    return x.transpose(1, 2).flatten(0, 1).transpose(0, 1)[None]


def _window(module: nn.Module, num_keys: int, given: int | None) -> int | None:
    if given is not _NOT_GIVEN:
        return given
    # The mask function may have been asked for a window that this layer does not tell us about.
    configured = getattr(getattr(module, "config", None), "sliding_window", None)
    if configured and num_keys > configured:  # 0, as Qwen2Moe has it, is none
        got = f"none in {type(module).__name__}, with config.sliding_window {configured}"
        remedy = "Set config.sliding_window = None, or use another attn_implementation."
        raise fail("hf", "a sliding_window from each layer", got, remedy)
    return None
