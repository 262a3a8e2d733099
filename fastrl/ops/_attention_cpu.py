"""Attention on a CPU: torch's own flash attention on each part of what is visible, merged.

A part is a rectangle or a causal triangle of pairs (fastrl/_schedule.py for layouts; a dense row is
a rectangle and a triangle). A query's parts merge by their log-sum-exps, always in the same order:

    lse = log(exp(lse_1) + exp(lse_2))
    output = output_1 + (output_2 - output_1) exp(lse_2 - lse)

Each part's backward pass is given the merged output and log-sum-exp, for which its probabilities
are those of the whole, and the parts' gradients add up. torch's op knows neither window nor softcap
nor a gradient of the log-sum-exp: those parts go through `_attention_blocks`. 16-bit inputs are
computed in float32 and rounded once, at the end.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fastrl.ops import _attention_blocks
from fastrl.ops._attention_blocks import Positions, Rule

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default

# Flash attention takes queries in blocks of 32 or more. A last block of less than eight rows goes
# to another product kernel, with other bits; whole eights make a row's bits its own.
_ROWS = 8


class Part(NamedTuple):
    """Pairs of some rows of the batch: queries and keys are ranges of tokens.

    segments > 1: so many segments of equal length after one another, each seeing only itself.
    merge: the queries have an output already, from the parts before.
    shared: how many queries there are depends on what else continues the keys.
    """

    rows: slice
    queries: slice
    keys: slice
    causal: bool
    segments: int
    merge: bool
    shared: bool


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
) -> tuple[Tensor, Tensor]:
    """output [B, Hq, T, D] in memory order [B, T, Hq, D], and lse [B, Hq, T]."""
    q, k, v, rule = _prepared(query, key, value, position_ids, scale, window, softcap)
    parts = _parts(q, k, key_start, key_end, schedule, causal)
    if _is_one(parts, q, k):
        output, lse = _attend(q, k, v, parts[0], rule)
        return token_major(output.to(query.dtype)), lse.contiguous()
    output = _to_fill(q, schedule)
    lse = q.new_full(q.shape[:3], -torch.inf)
    for part in parts:
        cut_q, cut_k, cut_v = _cut_inputs(q, k, v, part)
        new, new_lse = _attend(cut_q, cut_k, cut_v, part, rule)
        held = cut(output, part.rows, part.queries, part.segments)
        held_lse = cut(lse, part.rows, part.queries, part.segments)
        if not part.merge:
            held.copy_(new)
            held_lse.copy_(new_lse)
            continue
        _merge(held, held_lse, new, new_lse)
    return output.to(query.dtype), lse


def attention_bwd(
    grad_output: Tensor | None,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
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
    """The gradients in memory order [B, T, H, D]; [0] where none is needed."""
    q, k, v, rule = _prepared(query, key, value, position_ids, scale, window, softcap)
    g = torch.zeros_like(q) if grad_output is None else grad_output.to(q.dtype)
    g = g if g.stride(-1) == 1 else g.contiguous()  # that of a sum is expanded
    if grad_lse is not None:
        rule = rule._replace(in_blocks=True)
    saved = (g, output.to(q.dtype), lse, grad_lse)
    needs, given = (needs_query, needs_key, needs_value), (query, key, value)
    parts = _parts(q, k, key_start, key_end, schedule, causal)
    if _is_one(parts, q, k):
        grads = _attend_backward(saved, (q, k, v), parts[0], rule)
    else:
        grads = (_to_fill(q, schedule), _to_fill(k, schedule), _to_fill(v, schedule))
        for part in parts:
            new = _attend_backward(saved, _cut_inputs(q, k, v, part), part, rule)
            _add_to(grads, new, part, needs)
    return tuple(  # type: ignore[return-value]
        token_major(grad.to(x.dtype)) if needed else x.new_empty(0)
        for grad, x, needed in zip(grads, given, needs, strict=True)
    )


def _is_one(parts: list[Part], q: Tensor, k: Tensor) -> bool:
    """Whether torch's results are ours, as they are."""
    whole = slice(0, len(q)), slice(0, q.shape[2]), slice(0, k.shape[2])
    return len(parts) == 1 and parts[0][:3] == whole and parts[0].segments == 1


def _to_fill(x: Tensor, schedule: list[Tensor]) -> Tensor:
    """Like x, for the parts to write to. Those of a layout leave nothing out; other queries and
    keys may be in none."""
    batch, heads, tokens, width = x.shape
    fresh = x.new_empty if schedule else x.new_zeros
    return fresh((batch, tokens, heads, width)).transpose(1, 2)


def _add_to(
    grads: tuple[Tensor, ...], new: tuple[Tensor, ...], part: Part, needs: tuple[bool, ...]
) -> None:
    """A segment sees itself before others see it, and a dense row's parts share no keys: so but for
    shared keys, a part's are the first."""
    tokens, added = (part.queries, part.keys, part.keys), (part.merge, part.shared, part.shared)
    for grad, x, at, is_sum, needed in zip(grads, new, tokens, added, needs, strict=True):
        if needed:
            held = cut(grad, part.rows, at, part.segments)
            held.add_(x) if is_sum else held.copy_(x)


def token_major(x: Tensor) -> Tensor:
    """[B, H, T, D] in memory order [B, T, H, D], as models have it and as torch's op gives it."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def cut(x: Tensor, rows: slice, tokens: slice, segments: int) -> Tensor:
    """A view: [rows, H, tokens, ...], or [segments, H, tokens of each, ...] of the only row."""
    x = x[rows, :, tokens]
    return x if segments == 1 else x[0].unflatten(1, (segments, -1)).transpose(0, 1)


def _prepared(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    position_ids: Tensor | None,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor, Rule]:
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    # torch's op takes for granted that a row of D is dense.
    q, k, v = ((x if x.stride(-1) == 1 else x.contiguous()).to(dtype) for x in (query, key, value))
    in_blocks = window is not None or softcap is not None
    # torch's op scales what is hidden, -inf, as well: only a positive number leaves it hidden.
    rule = Rule(scale, window, softcap, position_ids, in_blocks or scale <= 0)
    return q, k, v, rule


def _merge(output: Tensor, lse: Tensor, new: Tensor, new_lse: Tensor) -> None:
    """In place. Of functions whose bits do not follow from where in memory an entry stands, as
    those of torch's sigmoid, logaddexp and lerp do."""
    top = torch.maximum(lse, new_lse)
    top.masked_fill_(top == -torch.inf, 0)  # neither has a key: no inf - inf
    mine, other = (lse - top).exp_(), (new_lse - top).exp_()
    total = mine.add_(other)
    weight = other.div_(total.masked_fill(total == 0, 1))
    output.add_((new - output).mul_(weight[..., None]))
    lse.copy_(total.log_().add_(top))


def _attend(q: Tensor, k: Tensor, v: Tensor, part: Part, rule: Rule) -> tuple[Tensor, Tensor]:
    length, positions = q.shape[2], _positions(q, k, part, rule)
    q = _whole_rows(q, part)
    if rule.in_blocks:
        output, lse = _attention_blocks.forward(q, k, v, part.causal, positions, rule)
    else:
        output, lse = _flash(q, k, v, 0.0, part.causal, scale=rule.scale)
    return output[:, :, :length], lse[:, :, :length]


def _attend_backward(
    saved: tuple[Tensor, Tensor, Tensor, Tensor | None],
    inputs: tuple[Tensor, Tensor, Tensor],
    part: Part,
    rule: Rule,
) -> tuple[Tensor, Tensor, Tensor]:
    at = (part.rows, part.queries, part.segments)
    g, output, lse, grad_lse = (None if x is None else cut(x, *at) for x in saved)
    assert g is not None and output is not None and lse is not None
    q, k, v = inputs
    length, positions = q.shape[2], _positions(q, k, part, rule)
    # Rows of zeros add zeros to the gradients of keys and values.
    g, q, output, lse = (_whole_rows(x, part) for x in (g, q, output, lse))
    if not rule.in_blocks:
        saved_by_forward = (output, lse, 0.0, part.causal)
        grad_q, *others = _flash_backward(g, q, k, v, *saved_by_forward, scale=rule.scale)
    else:
        delta = (g * output).sum(-1)
        if grad_lse is not None:
            delta -= _whole_rows(grad_lse, part)
        seen = (part.causal, positions, rule)
        grad_q, *others = _attention_blocks.backward(g, delta, lse, q, k, v, *seen)
    return grad_q[:, :, :length], *others


def _whole_rows(x: Tensor, part: Part) -> Tensor:
    """x [n, H, L, ...] with rows of zeros after it, where other queries could have made it longer:
    those of a rectangle of a layout, which depend on how many continue its keys."""
    missing = _missing_rows(x.shape[2], part)
    if not missing:
        return x
    return torch.cat([x, x.new_zeros((*x.shape[:2], missing, *x.shape[3:]))], dim=2)


def _missing_rows(num_queries: int, part: Part) -> int:
    return -num_queries % _ROWS if part.shared else 0


def _positions(q: Tensor, k: Tensor, part: Part, rule: Rule) -> Positions | None:
    """Of a part's first segment: in the others they differ as much."""
    if rule.window is None:
        return None
    num_queries, num_keys = q.shape[2], k.shape[2]
    if rule.position_ids is not None:
        queries, keys = rule.position_ids[part.queries], rule.position_ids[part.keys]
        queries = queries[:num_queries]
        # Rows of zeros stand where the last query does.
        queries = torch.cat([queries, queries[-1:].expand(_missing_rows(num_queries, part))])
        return Positions(queries, keys[:num_keys])
    # A row's queries begin after the keys of its rectangle; a single one is the last of them.
    first = 0 if part.causal else num_keys - (num_queries == 1)
    return Positions(torch.arange(first, first + num_queries), torch.arange(num_keys))


def _cut_inputs(q: Tensor, k: Tensor, v: Tensor, part: Part) -> tuple[Tensor, Tensor, Tensor]:
    keys = (part.rows, part.keys, part.segments)
    return cut(q, part.rows, part.queries, part.segments), cut(k, *keys), cut(v, *keys)


def _parts(
    q: Tensor,
    k: Tensor,
    key_start: Tensor | None,
    key_end: Tensor | None,
    schedule: list[Tensor],
    causal: bool,
) -> list[Part]:
    if q.numel() == 0 or k.numel() == 0:
        return []
    if schedule:
        return _parts_of_layout(schedule[0].tolist())
    num_keys = k.shape[2]
    starts = [0] if key_start is None else key_start.clamp(0, num_keys).tolist()
    ends = [num_keys] if key_end is None else key_end.clamp(0, num_keys).tolist()
    found: list[Part] = []
    if len(starts) == len(ends) == 1:
        return _parts_of_row(slice(0, len(q)), starts[0], ends[0], q.shape[2], causal)
    for b in range(len(q)):
        start, end = starts[b % len(starts)], ends[b % len(ends)]
        found += _parts_of_row(slice(b, b + 1), start, end, q.shape[2], causal)
    return found


def _parts_of_row(rows: slice, start: int, end: int, queries: int, causal: bool) -> list[Part]:
    """The last query stands at the last key, and those that would stand before the first see none;
    the keys before the first query are a rectangle, those at the queries a triangle."""
    if end <= start:
        return []
    standing = min(queries, end - start) if causal else queries
    if not causal or standing == 1:
        at = slice(queries - standing, queries)
        return [Part(rows, at, slice(start, end), False, 1, False, False)]
    at, middle = slice(queries - standing, queries), end - standing
    before = Part(rows, at, slice(start, middle), False, 1, False, False)
    triangle = Part(rows, at, slice(middle, end), True, 1, start < middle, False)
    return [before, triangle] if start < middle else [triangle]


def _parts_of_layout(listed: list[list[int]]) -> list[Part]:
    """Of `attention_parts`: neighbours of equal length that see but themselves are one part."""
    found: list[Part] = []
    covered = 0  # the queries before here have an output
    for query_start, query_end, key_start, key_end, causal in listed:
        if query_start == query_end:
            continue
        merge = query_start < covered
        covered = max(covered, query_end)
        before = found[-1] if found else None
        length = query_end - query_start
        if (
            before is not None
            and causal and before.causal and merge == before.merge
            and before.queries.stop == query_start
            and before.queries.stop - before.queries.start == length * before.segments
        ):  # fmt: skip
            both = slice(before.queries.start, query_end)
            found[-1] = before._replace(queries=both, keys=both, segments=before.segments + 1)
            continue
        queries, keys = slice(query_start, query_end), slice(key_start, key_end)
        found.append(Part(slice(0, 1), queries, keys, bool(causal), 1, merge, not causal))
    return found
