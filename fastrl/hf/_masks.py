"""transformers' attention mask as one number per key, never one per pair.

EXISTS_NOT   padding before a row's first token; a place of a cache that is not yet written
TOKEN        a key
PADDING      padding after a row's last token: no token sees it, since attention is causal, but
             a row's last query stands at its last such key
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from fastrl.hf._models import check_config, check_mask, check_packable_layers
from fastrl.hf._once import once
from fastrl.ops._checks import fail

EXISTS_NOT, TOKEN, PADDING = 0, 1, 2
# The functions of transformers.masking_utils that a mask may be made of. Packed rows are ours to
# find again, from the position_ids that each layer gets.
_PACKED = "packed_sequence_mask_function"
_CAUSAL = {
    "and_mask",  # what and_masks returns
    "and_masks",
    "causal_mask_function",
    _PACKED,
    "remap_positions_for_packed_sequence",
    "sliding_window_overlay",
}


def mask_function(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: Tensor | None = None,
    config: Any = None,
    use_vmap: bool = False,
    local_size: int | None = None,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> Tensor | None:
    """What transformers calls once per forward and kind of layer.

    Key j of the [S] stands at position kv_offset + j, query i at q_offset + i.

    Args:
        attention_mask: [B, positions] bool, True where there is a token.
    Returns:
        [B, S] int8, as the module's docstring says, or None if all keys are tokens.
    """
    if use_vmap:
        remedy = "Leave or_mask_function and and_mask_function out."
        raise fail("hf", "transformers' own causal masks", "a mask function beside them", remedy)
    if torch.compiler.is_compiling():
        is_bidirectional = "allow_is_bidirectional_skip" in kwargs
        _check_traced_pattern(mask_function, is_bidirectional, local_size, config)
        _assert_causal(mask_function, batch_size, q_length, q_offset, device)
    else:
        check_config(config)
        parts = list(_parts(mask_function))
        _check_pattern(parts)
        if _PACKED in parts:  # a model may have no layer with attention that would look
            check_packable_layers(config)
    num_keys = q_offset + q_length - kv_offset  # up to the last query
    if isinstance(num_keys, int) and num_keys > kv_length:
        raise fail("hf", f"keys up to the last query, {num_keys}", kv_length, "Pass the cache.")
    all_written = isinstance(num_keys, int) and num_keys == kv_length
    if attention_mask is None and all_written:
        return None
    written = torch.arange(kv_length, device=device) < num_keys  # [S]
    if attention_mask is None:
        return (TOKEN * written).to(torch.int8).expand(batch_size, -1)
    check_mask(attention_mask, "an attention_mask [B, S]")
    token = _aligned(attention_mask, kv_length, kv_offset).expand(batch_size, -1) & written
    begun = token.cumsum(1) > 0
    if _check_tokens(token, begun) and all_written:
        return None
    return (TOKEN * token + PADDING * (begun & ~token & written)).to(torch.int8)


def _check_pattern(parts: Iterable[str]) -> None:
    for name in parts:
        if name not in _CAUSAL:
            remedy = "Use another attn_implementation."
            raise fail("hf", "causal attention, with a window or without", name, remedy)


def _parts(function: Any) -> Iterator[str]:
    """The names of the functions in masking_utils that have built this one."""
    if function is None:
        return
    yield function.__qualname__.partition(".")[0]
    for cell in function.__closure__ or ():
        inside = cell.cell_contents
        for part in inside if isinstance(inside, tuple) else (inside,):
            if callable(part):
                yield from _parts(part)


def _check_traced_pattern(
    function: Any, is_bidirectional: bool, local_size: int | None, config: Any
) -> None:
    """The same where a function's closure cannot be looked into."""
    parts = [] if function is None or function.__name__ in _CAUSAL else [function.__name__]
    if is_bidirectional:
        parts.append("bidirectional_mask_function")
    if local_size is not None and getattr(config, "attention_chunk_size", None) is not None:
        parts.append("chunked_overlay")
    _check_pattern(parts)


def _assert_causal(
    function: Any, batch: int, queries: int, offset: int | Tensor, device: torch.device | str
) -> None:
    """No query sees the next key, as it would in blocks that see all of themselves."""
    if function is None:
        return
    row = torch.arange(batch, device=device)[:, None]
    query = torch.arange(queries - 1, device=device)[None] + offset
    seen = function(row, row.new_zeros(()), query, query + 1)
    torch._assert_async(~seen.any(), "hf: expected causal attention, got blocks that see ahead.")


def _aligned(mask: Tensor, kv_length: int, kv_offset: int) -> Tensor:
    """[B, S]: what a mask over all positions says of the keys."""
    # generate hands a mask that we have made back to the model, which asks us again.
    if mask.shape[1] != kv_length:
        mask = mask[:, kv_offset : kv_offset + kv_length]
        mask = torch.nn.functional.pad(mask, (0, kv_length - mask.shape[1]))
    return mask != 0


def _check_tokens(token: Tensor, begun: Tensor) -> bool:
    """Refuses rows with padding between tokens; returns whether there is no padding at all.

    Begins once more where a token follows padding after the first token.
    """
    holes = (token[:, 1:] & ~token[:, :-1] & begun[:, :-1]).any()
    expected = "an attention_mask whose rows have padding before or after their tokens"
    if torch.compiler.is_compiling():
        torch._assert_async(~holes, f"hf: expected {expected}, got some between them.")
        return False
    has_holes, is_full = torch.stack([holes, token.all()]).tolist()
    if has_holes:
        remedy = "Pad on the left, as generate needs it."
        raise fail("hf", expected, "some between them", remedy)
    return bool(is_full)


def existing_keys(
    mask: Tensor | None, batch: int, num_keys: int
) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """key_start, key_end: [B] int32, from what `mask_function` returned."""
    if mask is None:
        return None, None
    check_mask(mask, "a mask of fastrl's mask function")
    if mask.dtype != torch.int8 or mask.shape != (batch, num_keys):
        expected = f"a mask of fastrl's mask function, int8 [B, S] = ({batch}, {num_keys})"
        remedy = "Call fastrl.hf.register(), and pass attention_mask to the model, not to layers."
        raise fail("hf", expected, f"{mask.dtype} {tuple(mask.shape)}", remedy)
    return once(mask, "ends", lambda: _ends(mask))


def _ends(mask: Tensor) -> tuple[Tensor, Tensor]:
    exists = mask != EXISTS_NOT  # in a run
    after = torch.arange(1, mask.shape[1] + 1, device=mask.device, dtype=torch.int32)
    end = (exists * after).amax(1)
    return end - exists.sum(1, dtype=torch.int32), end


def token_queries(mask: Tensor, num_queries: int) -> Tensor:
    """[B, T] bool, whether a query is a token's: the queries stand at a row's last keys."""
    _, end = once(mask, "ends", lambda: _ends(mask))
    at = end[:, None] - num_queries + torch.arange(num_queries, device=mask.device)
    return mask.gather(1, at.clamp(min=0)) == TOKEN
