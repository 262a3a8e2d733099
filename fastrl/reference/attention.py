"""Attention over packed trees of tokens, or over dense batches."""

from typing import Literal, overload

import torch
from torch import Tensor

from fastrl.layout import PackedLayout
from fastrl.reference._precision import compute_dtype


@overload
def attention(
    query: Tensor, key: Tensor, value: Tensor, *, layout: PackedLayout | None = ...,
    causal: bool = ..., scale: float | None = ..., window: int | None = ...,
    softcap: float | None = ..., key_start: Tensor | None = ..., key_end: Tensor | None = ...,
    return_lse: Literal[False] = False,
) -> Tensor: ...  # fmt: skip
@overload
def attention(
    query: Tensor, key: Tensor, value: Tensor, *, layout: PackedLayout | None = ...,
    causal: bool = ..., scale: float | None = ..., window: int | None = ...,
    softcap: float | None = ..., key_start: Tensor | None = ..., key_end: Tensor | None = ...,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
@overload
def attention(
    query: Tensor, key: Tensor, value: Tensor, *, layout: PackedLayout | None = ...,
    causal: bool = ..., scale: float | None = ..., window: int | None = ...,
    softcap: float | None = ..., key_start: Tensor | None = ..., key_end: Tensor | None = ...,
    return_lse: bool,
) -> Tensor | tuple[Tensor, Tensor]: ...  # fmt: skip
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    layout: PackedLayout | None = None,
    causal: bool = True,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    key_start: Tensor | None = None,
    key_end: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention in which each query sees some of the keys.

        s_ij = scale <query_i, key_j>,  or softcap tanh(s_ij / softcap)
        output_i = sum_j softmax_j(s_ij) value_j           over the keys j that query i sees

    With a layout, query i sees key j if j <= i < layout.visible_until[j]: causally its own
    segment, and all of the segments that this one continues. With a window also
    position_i - window < position_j, by layout.position_ids.

    Without one, a row's keys are key_start <= j < key_end and its last query stands at its last
    key: query i of T stands at p_i = key_end - T + i. Causal: it sees j <= p_i; with a window also
    p_i - window < j. Not causal: it sees all of the row's keys.

    A query that sees no key gives 0. Keys outside [key_start, key_end) are not used: NaN there
    reaches neither the output nor a gradient.

    Args:
        query: [B, Hq, T, D] float32, bfloat16, float16 or float64.
        key, value: [B, Hkv, S, D]; query head h reads head h // (Hq / Hkv).
        layout: of N tokens, B = 1, T = S = N; excludes key_start and key_end.
        causal: see above.
        scale: default 1 / sqrt(D).
        window: >= 1, number of positions that a query sees, its own included.
        softcap: > 0, bound of the scores' absolute value.
        key_start, key_end: [B] int32, the keys of a row that exist. Default 0 and S.
        return_lse: also return log sum_j exp(s_ij), with which two outputs over different keys
            merge into one: weights exp(lse - logaddexp(lse_1, lse_2)).
    Returns:
        output: [B, Hq, T, D] in the query's dtype; the arithmetic is in float32 or float64.
        lse: [B, Hq, T] float32 or float64, nats, if return_lse; -inf where a query sees no key.
    Raises:
        ValueError: layout or window without causal.
    Differentiable in: query, key, value; both outputs.
    Reference: Vaswani et al. 2017, arXiv:1706.03762, eq. 1.
    """
    if not causal and (layout is not None or window is not None):
        given = "layout" if layout is not None else "window"
        raise ValueError(
            f"attention: expected causal True with a {given}, got False. Leave {given} out."
        )
    dtype = compute_dtype(query, key, value)
    q, k, v = query.to(dtype), key.to(dtype), value.to(dtype)
    if layout is None:
        visible, exists = _visible_dense(q, k, causal, window, key_start, key_end)
        k, v = (x.masked_fill(~exists[:, None, :, None], 0) for x in (k, v))
    else:
        visible = _visible_tree(layout, window).to(q.device)
    queries_per_key = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(queries_per_key, dim=1) for x in (k, v))
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)  # [B, Hq, T, S]
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    # A query without keys has NaN weights; masked on either side of softmax, they reach nothing.
    scores = scores.masked_fill(~visible, -torch.inf)
    output = (scores.softmax(-1).masked_fill(~visible, 0) @ v).to(query.dtype)
    if not return_lse:
        return output
    seen = visible.any(-1)
    return output, scores.masked_fill(~seen[..., None], 0).logsumexp(-1).where(seen, -torch.inf)


def _visible_tree(layout: PackedLayout, window: int | None) -> Tensor:
    """[N, N] bool."""
    token = torch.arange(layout.num_tokens, device=layout.visible_until.device)
    visible = (token <= token[:, None]) & (token[:, None] < layout.visible_until)
    if window is not None:
        position = layout.position_ids
        visible &= position[:, None] - window < position
    return visible


def _visible_dense(
    query: Tensor,
    key: Tensor,
    causal: bool,
    window: int | None,
    key_start: Tensor | None,
    key_end: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """[B, 1, T, S] bool, and which keys exist: [B, S] bool."""
    batch, num_queries, num_keys = query.shape[0], query.shape[2], key.shape[2]
    j = torch.arange(num_keys, device=query.device)
    start = j.new_zeros(batch) if key_start is None else key_start.long()
    end = j.new_full((batch,), num_keys) if key_end is None else key_end.long()
    exists = (start[:, None] <= j) & (j < end[:, None])
    visible = exists[:, None].expand(-1, num_queries, -1)  # [B, T, S]
    if causal:
        i = torch.arange(num_queries, device=query.device)
        position = (end[:, None] - num_queries + i)[..., None]  # [B, T, 1]
        visible = visible & (j <= position)
        if window is not None:
            visible = visible & (position - window < j)
    return visible[:, None], exists
