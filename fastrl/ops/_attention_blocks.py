"""Attention on a CPU in blocks of a bounded number of scores: windows, softcap, and the gradient of
the log-sum-exp, which torch's own flash attention does not know.

Forward, over a block of queries' blocks of keys (Milakov and Gimelshein 2018, arXiv:1805.02867):

    m' = max(m, max_j s_j),   (l, acc) <- exp(m - m') (l, acc) + sum_j exp(s_j - m') (1, value_j)

Backward, with p_ij = exp(s_ij - lse_i) and delta_i = <grad_output_i, output_i> - grad_lse_i:

    grad_s_ij = p_ij (<grad_output_i, value_j> - delta_i),  times 1 - (s_ij / softcap)^2
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

# Fixed, and one row of the batch at a time, so that its bits do not follow from the others: a
# product of several may take another kernel. Query heads that share keys share a product.
QUERIES, KEYS = 128, 512


class Rule(NamedTuple):
    """What a score is, and which pairs of a part count."""

    scale: float
    window: int | None
    softcap: float | None
    position_ids: Tensor | None  # of a layout
    in_blocks: bool


class Positions(NamedTuple):
    """Of the queries and keys of a part, where there is a window."""

    queries: Tensor
    keys: Tensor


def forward(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, positions: Positions | None, rule: Rule
) -> tuple[Tensor, Tensor]:
    """output [n, Hq, L, D] and lse [n, Hq, L] of n segments or rows that see but themselves."""
    output, lse = torch.zeros_like(q), q.new_full(q.shape[:3], -torch.inf)
    for rows in _ranges(q.shape[0], 1):
        for i in _ranges(q.shape[2], QUERIES):
            query, keys = _fold(q[rows, :, i] * rule.scale, k), (k[rows], v[rows])
            seen = _visible_blocks(i, k.shape[2], causal, positions, rule)
            merged = _merge_blocks(query, *keys, seen, i.stop - i.start, rule)
            if merged is None:
                continue
            for held, new in zip((output, lse[..., None]), merged, strict=True):
                held[rows, :, i] = _unfold(new, q, i)
    return output, lse


def _merge_blocks(
    query: Tensor,
    k: Tensor,
    v: Tensor,
    seen: Iterator[tuple[slice, Tensor | None]],
    num_queries: int,
    rule: Rule,
) -> tuple[Tensor, Tensor] | None:
    """output and lse [..., 1] of a block of queries; None where it sees nothing."""
    m = None
    for j, mask in seen:
        scores = _scores(query, k[:, :, j], mask, num_queries, rule)
        top = scores.amax(-1, keepdim=True)
        if m is None:
            m = torch.full_like(top, -torch.inf)
            total, acc = torch.zeros_like(top), torch.zeros_like(query)
        m_new = torch.maximum(m, top)
        base = m_new.masked_fill(m_new == -torch.inf, 0)  # no key seen yet: no inf - inf
        p = scores.sub_(base).exp_()
        shrink = (m - base).exp_()
        total = total * shrink + p.sum(-1, keepdim=True)
        acc = acc * shrink + p @ v[:, :, j]
        m = m_new
    if m is None:
        return None
    return acc / total.masked_fill(total == 0, 1), m + total.log()


def backward(
    g: Tensor,
    delta: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    positions: Positions | None,
    rule: Rule,
) -> tuple[Tensor, Tensor, Tensor]:
    """grad_query, grad_key, grad_value, from the merged output's delta and lse, [n, Hq, L]."""
    grads = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    lse = lse.masked_fill(lse == -torch.inf, 0)  # exp(-inf - 0) is the 0 that such a row needs
    for rows in _ranges(q.shape[0], 1):
        grad_q, grad_k, grad_v = (x[rows] for x in grads)
        for i in _ranges(q.shape[2], QUERIES):
            query, grad = _fold(q[rows, :, i] * rule.scale, k), _fold(g[rows, :, i], k)
            row_delta, row_lse = (_fold(x[rows, :, i, None], k) for x in (delta, lse))
            grad_query = torch.zeros_like(query)
            for j, mask in _visible_blocks(i, k.shape[2], causal, positions, rule):
                key, value = k[rows, :, j], v[rows, :, j]
                scores = _scores(query, key, mask, i.stop - i.start, rule)
                p = (scores - row_lse).exp_()
                grad_v[:, :, j] += p.mT @ grad
                grad_scores = (grad @ value.mT).sub_(row_delta).mul_(p)
                if rule.softcap is not None:
                    # Where no pair is visible, scores are -inf and p is 0.
                    slope = 1 - (scores.nan_to_num_(neginf=0.0) / rule.softcap).square_()
                    grad_scores.mul_(slope)
                grad_query += grad_scores @ key
                grad_k[:, :, j] += grad_scores.mT @ query
            grad_q[:, :, i] = _unfold(grad_query * rule.scale, q, i)
    return grads


def _scores(
    query: Tensor, key: Tensor, mask: Tensor | None, num_queries: int, rule: Rule
) -> Tensor:
    """[n, Hkv, G b, keys], -inf where mask [b, keys] is False."""
    scores = query @ key.mT
    if rule.softcap is not None:
        scores = scores.div_(rule.softcap).tanh_().mul_(rule.softcap)
    if mask is not None:
        scores.unflatten(2, (-1, num_queries)).masked_fill_(~mask, -torch.inf)
    return scores


def _visible_blocks(
    i: slice, num_keys: int, causal: bool, positions: Positions | None, rule: Rule
) -> Iterator[tuple[slice, Tensor | None]]:
    """The blocks of keys of which a block of queries sees something, and what; None: all."""
    low, high = 0, 0
    if positions is not None:
        low, high = (int(x) for x in positions.queries[i].aminmax())
    for j in _ranges(min(num_keys, i.stop) if causal else num_keys, KEYS):
        mask = None
        if causal and j.stop - 1 > i.start:
            key, query = torch.arange(j.start, j.stop), torch.arange(i.start, i.stop)
            mask = key <= query[:, None]
        if positions is not None:
            assert rule.window is not None
            key = positions.keys[j]
            if low - rule.window >= int(key[-1]):
                continue
            if high - rule.window >= int(key[0]):
                near = positions.queries[i, None] - rule.window < key
                mask = near if mask is None else mask & near
        yield j, mask


def _ranges(size: int, block: int) -> Iterator[slice]:
    for start in range(0, size, block):
        yield slice(start, min(start + block, size))


def _fold(x: Tensor, k: Tensor) -> Tensor:
    """[n, Hq, b, ...] -> [n, Hkv, G b, ...]: the rows of one product with a head of keys."""
    return x.unflatten(1, (k.shape[1], -1)).flatten(2, 3)


def _unfold(x: Tensor, q: Tensor, i: slice) -> Tensor:
    return x.unflatten(2, (-1, i.stop - i.start)).flatten(1, 2)
