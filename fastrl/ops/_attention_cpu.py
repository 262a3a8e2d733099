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

import torch
from torch import Tensor

from fastrl.ops import _attention_blocks, _binary
from fastrl.ops._attention_blocks import Positions, Rule
from fastrl.ops._attention_parts import Part, parts_of_layout, parts_of_row

_empty = _binary.op("empty_matrix")
_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default

# Flash attention takes queries in blocks of 32 or more. A last block of less than four rows goes to
# another product kernel, with other bits; whole eights make a row's bits its own.
_ROWS = 8


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
    parts = _parts(q, k, key_start, key_end, schedule, causal, rule)
    if _is_one(parts, q, k):
        output, lse = _attend(q, k, v, parts[0], rule)
        return token_major(output.to(query.dtype)), lse.contiguous()
    output = _to_fill(q, schedule)
    lse = q.new_full(q.shape[:3], -torch.inf)
    for part in parts:
        inputs = part.of_queries(q), part.of_keys(k), part.of_keys(v)
        new, new_lse = _attend(*inputs, part, rule)
        held, held_lse = part.of_queries(output), part.of_queries(lse)
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
    parts = _parts(q, k, key_start, key_end, schedule, causal, rule)
    if _is_one(parts, q, k):
        grads = _attend_backward(saved, (q, k, v), parts[0], rule)
    else:
        grads = (_to_fill(q, schedule), _to_fill(k, schedule), _to_fill(v, schedule))
        for part in parts:
            inputs = part.of_queries(q), part.of_keys(k), part.of_keys(v)
            new = _attend_backward(saved, inputs, part, rule)
            _add_to(grads, new, part, needs)
    return tuple(  # type: ignore[return-value]
        token_major(grad.to(x.dtype)) if needed else x.new_empty(0)
        for grad, x, needed in zip(grads, given, needs, strict=True)
    )


def _is_one(parts: list[Part], q: Tensor, k: Tensor) -> bool:
    """Whether torch's results are ours, as they are."""
    return len(parts) == 1 and (
        parts[0].of_queries(q).shape == q.shape and parts[0].of_keys(k).shape == k.shape
    )


def _to_fill(x: Tensor, schedule: list[Tensor]) -> Tensor:
    """Like x, for the parts to write to. Those of a layout leave nothing out; other queries and
    keys may be in none."""
    batch, heads, tokens, width = x.shape
    # Memory that was used before: for new pages a system takes longer than the parts to fill them.
    fresh = _empty(x.new_empty(0), batch * tokens, heads * width)
    fresh = fresh.view(batch, tokens, heads, width).transpose(1, 2)
    return fresh if schedule else fresh.zero_()


def _add_to(
    grads: tuple[Tensor, ...], new: tuple[Tensor, ...], part: Part, needs: tuple[bool, ...]
) -> None:
    if needs[0]:
        held = part.of_queries(grads[0])
        held.add_(new[0]) if part.merge else held.copy_(new[0])
    for grad, x, needed in zip(grads[1:], new[1:], needs[1:], strict=True):
        if needed:
            held = part.of_keys(grad)
            held.add_(x) if part.add else held.copy_(x)


def token_major(x: Tensor) -> Tensor:
    """[B, H, T, D] in memory order [B, T, H, D], as models have it and as torch's op gives it."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


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
    """In place; overwrites new. Of functions whose bits do not follow from where in memory an entry
    stands, as those of torch's sigmoid, logaddexp and lerp do."""
    top = torch.maximum(lse, new_lse)
    top.masked_fill_(top == -torch.inf, 0)  # neither has a key: no inf - inf
    mine, other = (lse - top).exp_(), (new_lse - top).exp_()
    total = mine.add_(other)
    weight = other.div_(total.masked_fill(total == 0, 1))
    output.add_(new.sub_(output).mul_(weight[..., None]))
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
    g, output, lse, grad_lse = (None if x is None else part.of_queries(x) for x in saved)
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
        at = rule.position_ids[part.query_start :]
        queries, keys = at[part.queries], at[part.keys]
        # Rows of zeros stand where the last query does.
        queries = torch.cat([queries, queries[-1:].expand(_missing_rows(num_queries, part))])
        return Positions(queries, keys)
    # A row's queries begin after the keys of its rectangle; a single one is the last of them.
    first = 0 if part.causal else num_keys - (num_queries == 1)
    return Positions(torch.arange(first, first + num_queries), torch.arange(num_keys))


def _parts(
    q: Tensor,
    k: Tensor,
    key_start: Tensor | None,
    key_end: Tensor | None,
    schedule: list[Tensor],
    causal: bool,
    rule: Rule,
) -> list[Part]:
    if q.numel() == 0 or k.numel() == 0:
        return []
    if schedule:  # blocks of our own find a triangle's visible half by themselves
        return list(parts_of_layout(schedule[0].tolist(), not rule.in_blocks))
    num_keys, num_queries = k.shape[2], q.shape[2]
    starts = [0] if key_start is None else key_start.clamp(0, num_keys).tolist()
    ends = [num_keys] if key_end is None else key_end.clamp(0, num_keys).tolist()
    if len(starts) == len(ends) == 1:
        every = slice(0, len(q))
        return list(parts_of_row(every, starts[0], ends[0], num_queries, causal))
    found: list[Part] = []
    for b in range(len(q)):
        start, end = starts[b % len(starts)], ends[b % len(ends)]
        found += parts_of_row(slice(b, b + 1), start, end, num_queries, causal)
    return found
