"""Attention over dense batches and packed trees of tokens, and its gradient, on a GPU.

    s_ij = scale <query_i, key_j>,  or softcap tanh(s_ij / softcap)
    output_i = sum_j p_ij value_j,   p_ij = exp(s_ij - lse_i),   lse_i = log sum_j exp(s_ij)

    delta_i = <grad_output_i, output_i + residue_i> - grad_lse_i
    ds_ij = p_ij (<grad_output_i, value_j> - delta_i)      (times 1 - tanh^2 with a softcap)
    grad_query_i = scale sum_j ds_ij key_j
    grad_key_j = scale sum_i ds_ij query_i,   grad_value_j = sum_i p_ij grad_output_i

over the keys j that query i sees, as fastrl.reference.attention says. The forward pass keeps a
running maximum and sum per query (Milakov & Gimelshein 2018, arXiv:1805.02867; Dao et al. 2022,
arXiv:2205.14135). The backward pass computes the scores again, once by queries for grad_query and
once by keys for the other two: seven products a pair of tiles instead of five, and no atomics, so
that every sum has one order. What is walked is known from a row's ends or the layout's tables
(fastrl._tiles), and only what crosses an edge is masked.

The residue is what rounding to 16 bits takes from the output. A mean of the keys or values leaves
the gradients by way of sum_j ds_ij = 0, for which delta from the rounded output is too coarse.

Products: 4 D operations for each visible pair and head forward, 14 D backward.
"""

from typing import Any

import torch
import triton
from torch import Tensor

from fastrl._tiles import TILE
from fastrl.kernels import _attention_configs as configs
from fastrl.kernels._attention_keys import _attention_dkdv_kernel, _attention_key_sums_kernel
from fastrl.kernels._attention_operands import like, rows, sources, strides
from fastrl.kernels._attention_queries import (
    _attention_dq_kernel,
    _attention_fwd_kernel,
    _attention_rows_kernel,
)
from fastrl.kernels._launch import AS_WRITTEN
from fastrl.kernels._math import LOG2E
from fastrl.kernels._rows import finite

_FAR = 2**30 - 1  # a window that ends nowhere


def attention_fwd(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_start: Tensor | None,
    key_end: Tensor | None,
    position_ids: Tensor | None,
    visible_until: Tensor | None,
    schedule: list[Tensor],
    causal: bool,
    scale: float,
    window: int | None,
    softcap: float | None,
    needs_residue: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """output in memory order [B, T, Hq, D], lse [B, Hq, T] float32, and the residue, as the output;
    [0] if not needed."""
    output = like(query)
    residue = like(query) if needs_residue else query.new_empty(0)
    query, key, value = (rows(x) for x in (query, key, value))
    lse = query.new_empty(query.shape[:3], dtype=torch.float32)
    if query.numel() == 0:
        return output, lse, residue
    shared = _shared(query, key, schedule, causal, scale, window, softcap)
    config = _config("fwd", query, _is_tight(schedule, window, softcap))
    grid, by_queries = _by_queries(query, key, schedule, config["BLOCK_M"])
    _attention_fwd_kernel[grid](
        query_ptr=query, output_ptr=output, lse_ptr=lse,
        residue_ptr=residue if needs_residue else None,
        **sources(key_end is None, config["BLOCK_N"], config["BLOCK_D"], key=key, value=value),
        **strides("UNIT", query=query, key=key, value=value),
        **strides("OUT_UNIT", output=output), **_which(key_start, key_end, position_ids, shared),
        **by_queries, **shared, **config, **AS_WRITTEN,
    )  # fmt: skip
    return output, lse, residue


def attention_bwd(
    grad_output: Tensor | None,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    residue: Tensor,
    key_start: Tensor | None,
    key_end: Tensor | None,
    position_ids: Tensor | None,
    visible_until: Tensor | None,
    schedule: list[Tensor],
    causal: bool,
    scale: float,
    window: int | None,
    softcap: float | None,
    needs_query: bool,
    needs_key: bool,
    needs_value: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """grad_query, grad_key, grad_value in memory order [B, T, H, D]; [0] if not needed."""
    grad_query = like(query) if needs_query else query.new_empty(0)
    grad_key = like(key) if needs_key else key.new_empty(0)
    grad_value = like(value) if needs_value else value.new_empty(0)
    query, key, value, output = (rows(x) for x in (query, key, value, output))
    rest = rows(residue) if residue.numel() > 0 else None
    grad_output = torch.zeros_like(output) if grad_output is None else rows(grad_output)
    inputs = dict(grad=grad_output, query=query, key=key, value=value)
    shared = _shared(query, key, schedule, causal, scale, window, softcap)
    shared.update(_which(key_start, key_end, position_ids, shared), scale=scale)
    shared.update(_of_rows(grad_output, output, rest, lse.contiguous(), grad_lse))
    tight = _is_tight(schedule, window, softcap)
    if needs_query and query.numel() > 0:
        _grad_query(grad_query, inputs, schedule, _config("dq", query, tight), **shared)
    if key_start is not None or key_end is not None:
        for grad in (grad_key, grad_value):
            grad.zero_()  # keys that do not exist are in no tile
    if (needs_key or needs_value) and key.numel() > 0:
        shared.update(NEEDS_KEY=needs_key, NEEDS_VALUE=needs_value, visible_until_ptr=visible_until)
        config = _config("dkdv", query, tight)
        _grad_keys((grad_key, grad_value), inputs, schedule, config, **shared)
    return grad_query, grad_key, grad_value


def _of_rows(
    grad_output: Tensor,
    output: Tensor,
    residue: Tensor | None,
    lse: Tensor,
    grad_lse: Tensor | None,
) -> dict[str, Tensor]:
    """log_total and delta, [B, Hq, T] float32: see the kernel."""
    log_total, delta = torch.empty_like(lse), torch.empty_like(lse)
    batch, heads, T, head_size = output.shape
    if output.numel() > 0:
        lying = dict(
            grad=grad_output, output=output, residue=output if residue is None else residue
        )
        tiles = triton.cdiv(T, configs.ROWS["BLOCK_M"])
        _attention_rows_kernel[(batch * heads * tiles,)](
            grad_output_ptr=grad_output, output_ptr=output, residue_ptr=residue, lse_ptr=lse,
            grad_lse_ptr=None if grad_lse is None else grad_lse.contiguous(),
            log_total_ptr=log_total, delta_ptr=delta, T=T, tiles=tiles, query_heads=heads,
            HEAD=head_size, BLOCK_D=configs.padded(head_size),
            **strides("UNIT", **lying), **configs.ROWS, **AS_WRITTEN,
        )  # fmt: skip
    return dict(log_total_ptr=log_total, delta_ptr=delta)


def _grad_query(
    grad_query: Tensor,
    inputs: dict[str, Tensor],
    schedule: list[Tensor],
    config: dict[str, int],
    **shared: Any,
) -> None:
    key, value = inputs["key"], inputs["value"]
    exist = shared["key_end_ptr"] is None
    grid, by_queries = _by_queries(inputs["query"], key, schedule, config["BLOCK_M"])
    _attention_dq_kernel[grid](
        grad_output_ptr=inputs["grad"], query_ptr=inputs["query"], grad_query_ptr=grad_query,
        **sources(exist, config["BLOCK_N"], config["BLOCK_D"], key=key, value=value),
        **strides("UNIT", **inputs), **strides("OUT_UNIT", output=grad_query),
        **by_queries, **shared, **config, **AS_WRITTEN,
    )  # fmt: skip


def _grad_keys(
    grads: tuple[Tensor, Tensor],
    inputs: dict[str, Tensor],
    schedule: list[Tensor],
    config: dict[str, int],
    **shared: Any,
) -> None:
    query, key = inputs["query"], inputs["key"]
    batch, heads, S, head_size = key.shape
    items, slots = triton.cdiv(S, config["BLOCK_N"]), 0
    segments = key_tiles = key_sums = None
    if schedule:
        _, segments, key_tiles, key_sums = schedule
        items = key_tiles.shape[0] * (TILE // config["BLOCK_N"])
        slots = key_sums.shape[0] if key_sums.shape[0] > 2 else 0  # two rows: there are no sums
    lanes, queries_per_key = batch * heads, query.shape[1] // heads
    source_bytes = 2 * query[0, 0].numel() * query.element_size() * queries_per_key
    # What is not needed has no gradient to write, but a stride and a type.
    targets = [grad if grad.dim() == 4 else key for grad in grads]
    parts = [
        key.new_empty(
            (slots if grad.dim() == 4 else 0, heads, TILE, head_size), dtype=torch.float32
        )
        for grad in grads
    ]
    _attention_dkdv_kernel[(items * lanes,)](
        key_ptr=key, value_ptr=inputs["value"], grad_key_ptr=targets[0],
        grad_value_ptr=targets[1], key_parts_ptr=parts[0], value_parts_ptr=parts[1],
        key_tiles_ptr=key_tiles, segments_ptr=segments, items=items, lanes=lanes,
        lanes_of_section=configs.lanes_of_section(lanes, 1, source_bytes),
        **sources(
            True, config["BLOCK_M"], config["BLOCK_D"], grad_output=inputs["grad"], query=query
        ),
        **strides("OUT_UNIT", grad_key=targets[0], grad_value=targets[1]),
        **strides("UNIT", **inputs), **shared, **config, **AS_WRITTEN,
    )  # fmt: skip
    for grad, part in zip(grads, parts, strict=True):
        if slots and grad.dim() == 4:
            _attention_key_sums_kernel[(slots * heads,)](
                parts_ptr=part, target_ptr=grad, key_sums_ptr=key_sums, key_heads=heads,
                HEAD=head_size, TILE=TILE, BLOCK_D=config["BLOCK_D"],
                **strides("OUT_UNIT", target=grad), **configs.SUMS, **AS_WRITTEN,
            )  # fmt: skip


def _is_tight(schedule: list[Tensor], window: int | None, softcap: float | None) -> bool:
    return softcap is not None or (bool(schedule) and window is not None)


def _config(kernel: str, query: Tensor, tight: bool) -> dict[str, int]:
    return configs.config_for(kernel, query.shape[3], query.dtype, tight, configs.chip())


def _shared(
    query: Tensor,
    key: Tensor,
    schedule: list[Tensor],
    causal: bool,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> dict[str, Any]:
    """What all kernels take. exp(s) = exp2(outer x), x = <query, key>, or tanh(inner <query, key>).

    outer is positive, so that the maximum of x is where that of s is; the scale's sign, or 0, is
    multiplied into one factor of the product.
    """
    size = abs(scale)
    sign = 0 if size * LOG2E < 1e-37 else 1 if scale > 0 else -1
    size = size if sign else 1.0
    inner, outer = 1.0, size * LOG2E
    if softcap is not None:
        inner, outer = size / softcap, max(softcap * LOG2E, 1e-37)
    T, S = query.shape[2], key.shape[2]
    windowed = window is not None and window < S
    return dict(
        T=T, S=S, query_heads=query.shape[1], queries_per_key=query.shape[1] // key.shape[1],
        window=min(window, _FAR) if window is not None and windowed else 0,
        inner=finite(inner), outer=finite(outer), SIGN=sign, CAUSAL=causal, WINDOW=windowed,
        SOFTCAP=softcap is not None, LAYOUT=bool(schedule), HEAD=query.shape[3], TILE=TILE,
    )  # fmt: skip


def _which(
    key_start: Tensor | None,
    key_end: Tensor | None,
    position_ids: Tensor | None,
    shared: dict[str, Any],
) -> dict[str, Tensor | None]:
    return dict(
        key_start_ptr=key_start, key_end_ptr=key_end,
        position_ids_ptr=position_ids if shared["LAYOUT"] and shared["WINDOW"] else None,
    )  # fmt: skip


def _by_queries(
    query: Tensor, key: Tensor, schedule: list[Tensor], block_m: int
) -> tuple[tuple[int], dict[str, Any]]:
    """The grid of a kernel that goes by queries, and what tells its programs which are theirs."""
    lanes, queries_per_key = query.shape[0] * query.shape[1], query.shape[1] // key.shape[1]
    items = triton.cdiv(query.shape[2], block_m)
    query_tiles = segments = None
    if schedule:
        query_tiles, segments, *_ = schedule
        items = query_tiles.shape[0] * (TILE // block_m)
    source_bytes = 2 * key[0, 0].numel() * key.element_size()
    return (items * lanes,), dict(
        items=items, lanes=lanes, query_tiles_ptr=query_tiles, segments_ptr=segments,
        lanes_of_section=configs.lanes_of_section(lanes, queries_per_key, source_bytes),
    )  # fmt: skip
