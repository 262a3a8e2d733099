"""Checks, dispatch and autograd of attention."""

from typing import Any

import torch
from torch import Tensor

from fastrl import reference
from fastrl.layout import PackedLayout
from fastrl.ops import _binary, _checks
from fastrl.ops._autocast import autocast
from fastrl.ops._typed import typed_as

_fwd = _binary.op("attention_fwd", differentiable=3)
_bwd = _binary.op("attention_bwd")
_decode = _binary.op("decode_attention")
# Queries up to which a call without gradient against a longer cache is one of decoding: the kernel
# that cuts the keys among the threads instead of the queries.
_DECODING = 8


@typed_as(reference.attention)
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
    """Softmax attention in which each query sees some of the keys, without a mask in memory.

        s_ij = scale <query_i, key_j>,  or softcap tanh(s_ij / softcap)
        output_i = sum_j softmax_j(s_ij) value_j           over the keys j that query i sees

    With a layout, query i sees key j if j <= i < layout.visible_until[j]: causally its own
    segment, and all of the segments that this one continues, so that a prompt stands once for all
    its completions. With a window also position_i - window < position_j, by layout.position_ids.

    Without one, a row's keys are key_start <= j < key_end and its last query stands at its last
    key: query i of T stands at p_i = key_end - T + i. Causal: it sees j <= p_i; with a window also
    p_i - window < j. Not causal: it sees all of the row's keys.

    A query that sees no key gives 0. Keys outside [key_start, key_end) are not used: NaN there
    reaches neither the output nor a gradient. A row's result depends on its own keys, bit for bit:
    neither on the other rows of the batch nor on the other trees of a layout, and a completion's
    not on those beside it. That is for finite inputs on a GPU, where an infinity or NaN makes NaN
    of what lies with it in a tile of 128 tokens of a layout; on a CPU it reaches those alone that
    see it.

    Without a gradient, up to eight queries against more keys go the way of `decode_attention`.

    On a GPU: Triton, tiles from the layout; for the backward pass of 16-bit inputs it keeps what
    rounding took from the output, which is as large. On a CPU: C++, a block of queries through
    tiles of the keys that some of them see. Autocast casts the inputs as it does for torch's
    attention.

    Args:
        query: [B, Hq, T, D] float32, bfloat16 or float16, on a CPU also float64; any strides. On
            a GPU D <= 256.
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
        ValueError: shapes disagree; layout or window without causal; a number out of its range.
        TypeError: dtypes other than these, or that differ.
        NotImplementedError: a device without a kernel.
    Differentiable in: query, key, value; both outputs.
    Reference: Dao et al. 2022, arXiv:2205.14135; for shared prompts Juravsky et al. 2024,
        arXiv:2402.05099.
    """
    query, key, value = autocast(query, key, value)
    _check(query, key, value)
    _check_visible(query, key, layout, causal, key_start, key_end)
    window = _checks.window("attention", window)
    _check_numbers(layout, causal, scale, window, softcap)
    _checks.implemented("attention", query)
    width = query.shape[-1]
    numbers = (width**-0.5 if scale is None else float(scale), window, softcap)
    key_start, key_end = (None if x is None else x.contiguous() for x in (key_start, key_end))
    if layout is None and _is_decoding(query, key, value, causal):
        keys = (key_start, key_end, None, None, None, None)
        tensors = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
        output, lse = _decode(*tensors, *keys, *numbers)
        return (output, lse) if return_lse else output
    if layout is None:
        visible: tuple[Any, ...] = (key_start, key_end, None, None, [], causal)
    else:
        positions = layout.position_ids if window is not None else None
        visible = (None, None, positions, layout.visible_until, layout.schedule, True)
    output, lse, _ = _fwd(query, key, value, *visible, *numbers, _needs_residue(query, key, value))
    return (output, lse) if return_lse else output


def _is_decoding(query: Tensor, key: Tensor, value: Tensor, causal: bool) -> bool:
    """One query that stands at the last key sees all of them, causal or not."""
    # Asked first: a comparison of sizes would make torch.compile's programs for these sizes alone.
    if _has_gradient(query, key, value):
        return False
    num_queries = query.shape[2]
    return num_queries <= min(_DECODING, key.shape[2] - 1) and (causal or num_queries == 1)


def _needs_residue(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether the backward pass needs more digits of the output than it has: see the kernels. C++
    computes them again there."""
    coarse = query.device.type == "cuda" and query.element_size() == 2
    return coarse and _has_gradient(query, key, value)


def _has_gradient(*tensors: Tensor) -> bool:
    return any(map(_binary.may_require_grad, tensors))


def _check(query: Any, key: Any, value: Any) -> None:
    op = "attention"
    on_gpu = isinstance(query, Tensor) and query.device.type == "cuda"
    dtypes = [x for x in _checks.FLOATS if not (on_gpu and x == torch.float64)]
    for name, x in (("query", query), ("key", key), ("value", value)):
        _checks.tensor(op, name, x, dtypes, f"Cast {name}, or use fastrl.reference.attention.")
        if x.dim() != 4:
            raise _checks.fail(
                op, f"{name} [B, H, T, D]", _checks.shape(x), "Put the heads before the tokens."
            )
    for name, x in (("key", key), ("value", value)):
        if x.dtype != query.dtype:
            remedy = f"Use {name}.to(query.dtype)."
            raise _checks.wrong_type(op, f"{name} of dtype {query.dtype}", x.dtype, remedy)
        _checks.same_device(op, name, x, "query", query)
    _checks.same_shape(op, "value", value, "key", key, "Pass a value for each key.")
    batch, heads, _, width = query.shape
    if (key.shape[0], key.shape[3]) != (batch, width):
        raise _checks.fail(
            op,
            f"key [B, Hkv, S, D] with B = {batch} and D = {width} like query",
            _checks.shape(key),
            "Pass keys for the query's rows, of its width.",
        )
    if key.shape[1] == 0 or heads % key.shape[1] or width == 0:
        raise _checks.fail(
            op,
            "query heads a multiple of the key's heads, and D >= 1",
            f"query {_checks.shape(query)} and key {_checks.shape(key)}",
            "Each head of keys serves as many heads of queries.",
        )
    _checks.head_size(op, query)


def _check_visible(
    query: Tensor,
    key: Tensor,
    layout: Any,
    causal: bool,
    key_start: Tensor | None,
    key_end: Tensor | None,
) -> None:
    op = "attention"
    if layout is not None:
        if not isinstance(layout, PackedLayout):
            got = type(layout).__name__
            raise _checks.wrong_type(op, "layout as a PackedLayout", got, "pack_groups makes one.")
        if key_start is not None or key_end is not None:
            given = "key_start" if key_start is not None else "key_end"
            raise _checks.fail(op, f"layout without {given}", "both", "A layout has no padding.")
        until = layout.visible_until
        _checks.same_device(op, "layout", until, "query", query)
        if query.shape[0] != 1 or not query.shape[2] == key.shape[2] == until.shape[0]:
            raise _checks.fail(
                op,
                f"query and key [1, H, N, D] with N = {until.shape[0]} like layout",
                f"{_checks.shape(query)} and {_checks.shape(key)}",
                "Pass the packed tokens as one row, or leave layout out.",
            )
    for name, x in (("key_start", key_start), ("key_end", key_end)):
        if x is None:
            continue
        _checks.tensor(op, name, x, (torch.int32,), f"Use {name}.int().")
        _checks.same_device(op, name, x, "query", query)
        if x.shape != query.shape[:1]:
            raise _checks.fail(
                op, f"{name} [B] = ({query.shape[0]},)", _checks.shape(x), "Pass one per row."
            )
        if (stray := _checks.entry_outside(x, 0, key.shape[2])) is not None:
            raise _checks.fail(op, f"{name} in [0, S = {key.shape[2]}]", stray, "Clamp it.")


def _check_numbers(
    layout: Any, causal: object, scale: float | None, window: int | None, softcap: float | None
) -> None:
    op = "attention"
    if not isinstance(causal, bool):
        raise _checks.wrong_type(op, "causal as a bool", type(causal).__name__, "Use bool(causal).")
    for name, given in (("layout", layout), ("window", window)):
        if given is not None and not causal:
            raise _checks.fail(op, f"causal True with a {name}", "False", f"Leave {name} out.")
    if scale is not None:
        largest = 3e38
        remedy = "Leave it out for 1 / sqrt(D)."
        _checks.number(op, "scale", scale, -largest, largest, remedy)
    if softcap is not None:
        _checks.positive(op, "softcap", softcap, "Leave it out for none.")


def _token_major(x: Tensor) -> Tensor:
    """[B, H, T, D] in memory order [B, T, H, D], as models have it."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def _fwd_fake(query: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    lse = query.new_empty(query.shape[:3], dtype=dtype)
    output = _token_major(query.new_empty(query.shape))
    residue = torch.empty_like(output) if rest[-1] and output.is_cuda else query.new_empty(0)
    return output, lse, residue


def _bwd_fake(
    grad_output: Tensor | None,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *rest: Any,
) -> tuple[Tensor, ...]:
    return tuple(
        _token_major(x.new_empty(x.shape)) if needed else x.new_empty(0)
        for x, needed in zip((query, key, value), rest[-3:], strict=True)
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    query, key, value, key_start, key_end, positions, until, schedule, *ctx.numbers, _ = inputs
    visible = (key_start, key_end, positions, until, *schedule)
    ctx.save_for_backward(query, key, value, *output, *visible)
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_output: Tensor | None, grad_lse: Tensor | None, _: None) -> Any:
    everything = ctx.saved_tensors  # read once: selective checkpointing counts
    saved, schedule = everything[:10], list(everything[10:])
    needed, grads = ctx.needs_input_grad[:3], [None] * 3
    if grad_output is not None or grad_lse is not None:
        found = _bwd(grad_output, grad_lse, *saved, schedule, *ctx.numbers, *needed)
        grads = [x if needs else None for x, needs in zip(found, needed, strict=True)]
    return *grads, *(None,) * 4, [None] * len(schedule), *(None,) * 5


_binary.register_fake("attention_fwd", _fwd_fake)
_binary.register_fake("attention_bwd", _bwd_fake)
_binary.register_autograd("attention_fwd", _backward, setup_context=_setup_context)
_binary.differentiable_once("attention_bwd")
_binary.register_triton("attention", "attention_fwd", "attention_bwd")
