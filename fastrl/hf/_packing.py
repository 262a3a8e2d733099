"""Which tokens of a row belong together: its layout, as given or as derived."""

from typing import Any

import torch
from torch import Tensor, nn

from fastrl.hf._masks import token_queries
from fastrl.hf._once import once
from fastrl.layout import PackedLayout
from fastrl.ops._checks import fail, wrong_type

_PASS_LAYOUT = "Pass layout= and position_ids=layout.position_ids[None] to the model."


def packing(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    layout: PackedLayout | None,
    position_ids: Tensor | None,
    cu_seq_lens_q: Tensor | None,
    cu_seq_lens_k: Tensor | None,
) -> PackedLayout | None:
    """The layout of all tokens of the batch, row after row, or None if its rows are sequences.

    A model that drops a layout on its way still shows its layers position_ids that restart where
    completions share a prompt, and those restart above 0, which is refused.
    """
    batch, _, num_queries, _ = query.shape
    if layout is None and cu_seq_lens_q is None and num_queries == 1:
        return None  # one token cannot restart
    if position_ids is None:
        remedy = (
            "Its layers could not tell packed rows from others: pass position_ids, [4, B, T] with "
            "the text's first where the model has three of its own, or take another model."
        )
        raise fail("hf", "position_ids in each layer", f"none in {type(module).__name__}", remedy)
    rows = position_ids.shape[0]
    if position_ids.dim() != 2 or position_ids.shape[1] != num_queries or rows not in (1, batch):
        got = tuple(position_ids.shape)
        remedy = "Pass one per token, for each row or for all."
        raise fail("hf", f"position_ids [B, T] = ({batch}, {num_queries})", got, remedy)
    if layout is None and cu_seq_lens_q is None:
        return once(
            position_ids,
            ("restarts", batch, key.shape[2]),
            lambda: _from_positions(position_ids, mask, batch, key.shape[2]),
            mask,
        )
    given = "layout" if layout is not None else "cu_seq_lens_q"
    if layout is not None and cu_seq_lens_q is not None:
        raise fail("hf", "layout without cu_seq_lens_q", "both", "Leave cu_seq_lens_q out.")
    if mask is not None:
        raise fail("hf", f"{given} without attention_mask", "both", "Packed rows have no padding.")
    if layout is not None:
        _check_layout(layout, query, key, position_ids)
        return layout
    assert cu_seq_lens_q is not None
    _check_row(given, query, key, query.shape[2])
    return once(
        cu_seq_lens_q,
        ("bounds", num_queries),
        lambda: _from_bounds(module, cu_seq_lens_q, cu_seq_lens_k, position_ids),
        cu_seq_lens_k,
        position_ids,
    )


def _check_row(given: str, query: Tensor, key: Tensor, num_tokens: int) -> None:
    if query.shape[0] != 1 or not query.shape[2] == key.shape[2] == num_tokens:
        raise fail(
            "hf",
            f"{num_tokens} tokens in one row, like {given}, and no other keys",
            f"{query.shape[2]} in each of {query.shape[0]} rows, with {key.shape[2]} keys",
            "Pass input_ids [1, N] without a cache from before.",
        )


def _check_layout(layout: Any, query: Tensor, key: Tensor, position_ids: Tensor) -> None:
    if not isinstance(layout, PackedLayout):
        got = type(layout).__name__
        raise wrong_type("hf", "layout as a PackedLayout", got, "Pass batch.layout.")
    positions = layout.position_ids
    if positions.device != query.device:
        remedy = "Use layout.to(device)."
        raise fail("hf", f"layout on {query.device} like the model", positions.device, remedy)
    _check_row("layout", query, key, positions.shape[0])
    expected = "position_ids like layout.position_ids"
    if torch.compiler.is_compiling():
        message = f"hf: expected {expected}, got others. {_PASS_LAYOUT}"
        torch._assert_async((position_ids == positions).all(), message)
        return

    def agree() -> bool:
        is_view = (
            position_ids.data_ptr() == positions.data_ptr()
            and position_ids.dtype == positions.dtype
            and position_ids.is_contiguous()
        )
        return is_view or torch.equal(position_ids[0], positions.to(position_ids.dtype))

    if not once(position_ids, "layout", agree, layout):
        raise fail("hf", expected, "others", _PASS_LAYOUT)


def _from_positions(
    position_ids: Tensor, mask: Tensor | None, batch: int, num_keys: int
) -> PackedLayout | None:
    """Independent sequences, each from a position 0 on; None where no row restarts."""
    num_queries = position_ids.shape[1]
    restarts = position_ids.diff() != 1  # [B, T - 1] or, for all rows alike, [1, T - 1]
    if mask is not None:
        token = token_queries(mask, num_queries)
        restarts = restarts & token[:, 1:] & token[:, :-1]  # padding stands anywhere
    if torch.compiler.is_compiling():
        message = "hf: expected position_ids that rise by one under torch.compile. "
        torch._assert_async(~restarts.any(), message + _PASS_LAYOUT)
        return None
    if not restarts.any():
        return None
    if mask is not None or num_keys != num_queries:
        beside = "padding" if mask is not None else "a cache from before"
        expected, remedy = f"position_ids that rise by one beside {beside}", "Pack all of a row."
        raise fail("hf", expected, "some that restart", remedy)
    restarts, positions = restarts.cpu(), position_ids.cpu()
    first = positions[:, 1:][restarts]
    if first.any():
        got = f"a restart at {int(first[first != 0][0])}"
        remedy = f"{_PASS_LAYOUT} A model that gets it and still fails has dropped it."
        raise fail("hf", "position_ids that restart at 0", got, remedy)
    begins = torch.nn.functional.pad(restarts, (1, 0), value=True).expand(batch, -1)
    bounds = begins.flatten().nonzero().squeeze(1)
    bounds = torch.cat([bounds, bounds.new_tensor([batch * num_queries])])
    return _independent(bounds, position_ids.device)


def _from_bounds(
    module: nn.Module, bounds: Tensor, key_bounds: Tensor | None, position_ids: Tensor
) -> PackedLayout:
    if torch.compiler.is_compiling():
        remedy = f"A layout is built on the host. {_PASS_LAYOUT}"
        raise fail("hf", "no cu_seq_lens_q under torch.compile", "some", remedy)
    bounds, positions = bounds.cpu().long(), position_ids[0].cpu()
    if key_bounds is not None and not torch.equal(key_bounds.cpu().long(), bounds):
        remedy = "Leave cu_seq_lens_k out."
        raise fail("hf", "cu_seq_lens_k like cu_seq_lens_q", "others", remedy)
    if bounds.dim() != 1 or bounds.numel() < 2 or int(bounds[-1]) != len(positions):
        got = f"{tuple(bounds.shape)} up to {int(bounds.max()) if bounds.numel() else 'nothing'}"
        remedy = "Pass the S + 1 boundaries of the row's sequences."
        raise fail("hf", f"cu_seq_lens_q [S + 1] up to N = {len(positions)}", got, remedy)
    layout = _independent(bounds, position_ids.device)
    from_first = positions - layout.position_ids.cpu()
    begins = bounds[:-1][bounds.diff() > 0]
    offset = from_first[begins].repeat_interleave(bounds.diff()[bounds.diff() > 0])
    if not torch.equal(from_first, offset):
        remedy = "Pass position_ids that restart at 0 with each sequence."
        raise fail("hf", "position_ids that rise by one in each sequence", "others", remedy)
    if from_first.any() and not _is_relative(module):
        remedy = "This model learns positions: pass position_ids that restart."
        raise fail("hf", "position_ids that restart with cu_seq_lens_q", "others", remedy)
    return layout


def _is_relative(module: nn.Module) -> bool:
    """Whether attention is the same wherever a sequence begins: plain rotary embeddings."""
    rope = getattr(getattr(module, "config", None), "rope_parameters", None)
    # Of these two, the frequencies depend on the largest position in the batch.
    return bool(rope) and not any(kind in str(rope) for kind in ("dynamic", "longrope"))


def _independent(bounds: Tensor, device: torch.device) -> PackedLayout:
    prefix = torch.full((len(bounds) - 1,), -1, dtype=torch.int32)
    return PackedLayout(bounds.int(), prefix).to(device)
