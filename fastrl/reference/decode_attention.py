"""Attention of a few new tokens a row to the row's cache, and to a prompt that rows share."""

from typing import Literal, overload

import torch
from torch import Tensor

from fastrl.reference.attention import attention


@overload
def decode_attention(
    query: Tensor, key: Tensor, value: Tensor, *, key_start: Tensor | None = ...,
    key_end: Tensor | None = ..., prefix_key: Tensor | None = ...,
    prefix_value: Tensor | None = ..., prefix_end: Tensor | None = ...,
    prefix_cu_rows: Tensor | None = ..., scale: float | None = ..., window: int | None = ...,
    softcap: float | None = ..., return_lse: Literal[False] = False,
) -> Tensor: ...  # fmt: skip
@overload
def decode_attention(
    query: Tensor, key: Tensor, value: Tensor, *, key_start: Tensor | None = ...,
    key_end: Tensor | None = ..., prefix_key: Tensor | None = ...,
    prefix_value: Tensor | None = ..., prefix_end: Tensor | None = ...,
    prefix_cu_rows: Tensor | None = ..., scale: float | None = ..., window: int | None = ...,
    softcap: float | None = ..., return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
@overload
def decode_attention(
    query: Tensor, key: Tensor, value: Tensor, *, key_start: Tensor | None = ...,
    key_end: Tensor | None = ..., prefix_key: Tensor | None = ...,
    prefix_value: Tensor | None = ..., prefix_end: Tensor | None = ...,
    prefix_cu_rows: Tensor | None = ..., scale: float | None = ..., window: int | None = ...,
    softcap: float | None = ..., return_lse: bool,
) -> Tensor | tuple[Tensor, Tensor]: ...  # fmt: skip
def decode_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    key_start: Tensor | None = None,
    key_end: Tensor | None = None,
    prefix_key: Tensor | None = None,
    prefix_value: Tensor | None = None,
    prefix_end: Tensor | None = None,
    prefix_cu_rows: Tensor | None = None,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Causal attention of each row's newest tokens to the row's prefix and then its own keys.

        output_i = sum_j softmax_j(s_ij) value_j,    s_ij = scale <query_i, key_j>,
                   or softcap tanh(s_ij / softcap)   over the keys j that query i sees

    A row's keys are those of its prefix, 0 <= j < prefix_end, at the positions j; and after them
    its own, key_start <= j < key_end, at prefix_end + j - key_start. The last query stands at the
    last of them, the others one position before another; a query sees the keys at its own position
    and before, with a window those at position_i - window < position_j. It is `attention` over
    the two put together, but the rows of a group share one copy of their prompt.

    A query that sees no key gives 0. Keys that do not exist are not used: NaN there reaches
    nothing.

    Decoding B rows in groups of 16 that share a prompt, with caches for S new tokens; what changes
    from step to step is what the tensors hold, so nothing is compiled anew:

        key_end = torch.zeros(B, dtype=torch.int32)
        for token in range(S):
            key[:, :, token], value[:, :, token] = new_key, new_value  # [B, Hkv, D]
            key_end += 1  # or of the rows that still run
            output = decode_attention(
                query, key, value, key_end=key_end,                    # query [B, Hq, 1, D]
                prefix_key=prompt_key, prefix_value=prompt_value,      # [B / 16, Hkv, Sp, D]
                prefix_end=prompt_length,                              # [B / 16]
            )

    Args:
        query: [B, Hq, T, D] float32, bfloat16, float16 or float64; T is small, often 1.
        key, value: [B, Hkv, S, D], each row's own cache; query head h reads head h // (Hq / Hkv).
        key_start, key_end: [B] int32, the keys of a row that exist. Default 0 and S.
        prefix_key, prefix_value: [P, Hkv, Sp, D], one prefix for each group of rows.
        prefix_end: [P] int32, the length of each prefix. Default Sp.
        prefix_cu_rows: [P + 1] int32, rising from 0 to B: the rows prefix_cu_rows[p] to
            prefix_cu_rows[p + 1] continue prefix p. Default: B / P rows each.
        scale: default 1 / sqrt(D).
        window: >= 1, number of positions that a query sees, its own included.
        softcap: > 0, bound of the scores' absolute value.
        return_lse: also return log sum_j exp(s_ij).
    Returns:
        output: [B, Hq, T, D] in the query's dtype; the arithmetic is in float32 or float64.
        lse: [B, Hq, T] float32 or float64, nats, if return_lse; -inf where a query sees no key.
    Differentiable in: query and all keys and values, here; in fastrl.ops in nothing.
    Reference: Juravsky et al. 2024, Hydragen, arXiv:2402.05099, section 3.
    """
    batch, num_keys = query.shape[0], key.shape[2]
    index = torch.arange(num_keys, device=query.device)
    zeros = index.new_zeros(batch)
    start = zeros if key_start is None else key_start.long()
    end = zeros + num_keys if key_end is None else key_end.long()
    if prefix_key is not None and prefix_value is not None:
        num_prefixes, _, num_shared, _ = prefix_key.shape
        row = torch.arange(batch, device=query.device)
        if prefix_cu_rows is None:
            prefix = row * num_prefixes // max(batch, 1)
        else:
            prefix = torch.searchsorted(prefix_cu_rows.long(), row, right=True) - 1
        length = zeros + num_shared if prefix_end is None else prefix_end.long()[prefix]
        # Each row's prefix moves to the end of its part, and its own keys to the start of theirs.
        shared = torch.arange(num_shared, device=query.device) - (num_shared - length)[:, None]
        own = start[:, None] + index
        key, value = (
            torch.cat([_gather(x[prefix], shared), _gather(y, own)], dim=2)
            for x, y in ((prefix_key, key), (prefix_value, value))
        )
        start, end = num_shared - length, num_shared + (end - start).clamp(min=0)
    return attention(
        query, key, value, key_start=start, key_end=end, scale=scale, window=window,
        softcap=softcap, return_lse=return_lse,
    )  # fmt: skip


def _gather(x: Tensor, index: Tensor) -> Tensor:
    """x [B, H, S, D] at the keys index [B, n] of each row, or any key where there is none."""
    index = index.clamp(0, max(x.shape[2] - 1, 0))
    return torch.take_along_dim(x, index[:, None, :, None], dim=2)
