"""Attention of a few new tokens a row: the cache read once, a group's prompt once for its rows."""

from typing import Any

import torch
from torch import Tensor

from fastrl import reference
from fastrl.ops import _binary, _checks
from fastrl.ops._typed import typed_as

_OP = "decode_attention"

_decode = _binary.op(_OP)
_step = _binary.op("decode_attention_step")


@typed_as(reference.decode_attention)
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
    _check(query, key, value, prefix_key, prefix_value)
    _check_bounds(query, key, prefix_key, key_start, key_end, prefix_end, prefix_cu_rows)
    if scale is None:
        scale = query.shape[-1] ** -0.5
    else:
        _checks.number(_OP, "scale", scale, -1e30, 1e30, "None is 1 / sqrt(D).")
    window = _checks.window(_OP, window)
    if softcap is not None:
        _checks.positive(_OP, "softcap", softcap, "None leaves the scores alone.")
    caches = [_dense_along_width(x) for x in (query, key, value, prefix_key, prefix_value)]
    of_rows = [None if x is None else x.contiguous() for x in (key_start, key_end)]
    of_prefixes = [None if x is None else x.contiguous() for x in (prefix_end, prefix_cu_rows)]
    output, lse = _decode(*caches[:3], *of_rows, *caches[3:], *of_prefixes, scale, window, softcap)
    return (output, lse) if return_lse else output


decode_attention.__doc__ = f"""{reference.decode_attention.__doc__}
    Tensors may have any strides; where the last axis is not dense, a copy is made. A row's result,
    to the bit, depends neither on the other rows, nor on who shares its prefix, nor on the number
    of threads. Nothing waits for a GPU; there, bounds outside their range are moved into it.
    Raises:
        ValueError: shapes or numbers disagree, or a tensor requires grad in grad mode: this is for
            sampling, attention with a layout has gradients. On eager CPU tensors also bounds
            outside their range.
        TypeError: another dtype (float64 on a GPU: fastrl.reference.decode_attention).
        NotImplementedError: a device without a kernel.
    """


def decode_known(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_end: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    prefix_end: Tensor,
    prefix_cu_rows: Tensor,
    scale: float | None,
    window: int | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """`decode_attention` of caches that it has once accepted, the keys' number apart, with
    return_lse: the checks, and copies of what is not dense, take 40 us, a tenth of a small call."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    caches, prefixes = (key, value, None, key_end), (prefix_key, prefix_value)
    of_prefixes = (prefix_end, prefix_cu_rows)
    query = _dense_along_width(query)
    output, lse = _decode(query, *caches, *prefixes, *of_prefixes, scale, window, softcap)
    return output, lse


def decode_step(
    projected: Tensor,
    cos: Tensor,
    sin: Tensor,
    query_norm: Tensor | None,
    key_norm: Tensor | None,
    eps: float,
    rows: Tensor,
    key: Tensor,
    value: Tensor,
    key_end: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    prefix_end: Tensor,
    prefix_cu_rows: Tensor,
    scale: float | None,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """What a layer does between its two products with a token a row, on a CPU in float32.

    Queries and keys become x / sqrt(mean x^2 + eps) norm (where there is a norm), and then
    x cos + (-x_2, x_1) sin of their halves. Key and value are written to the caches, as the last
    ones of their row, and the queries attend to them as in `decode_attention`.

    Args:
        projected: [R, (Hq + 2 Hkv) D]: queries, keys and values.
        cos, sin: [R, 1, D].
        query_norm, key_norm: [D], or None.
        rows: [R] int64, each one's row of the caches, all different.
        key, value: [B, Hkv, S, D], written to.
        key_end: [B] int32, the keys with the new one; 0 for rows of the caches that none of R has.
    Returns:
        [R, Hq D].
    """
    scale = cos.shape[-1] ** -0.5 if scale is None else scale
    angles = cos.flatten(1).contiguous(), sin.flatten(1).contiguous()
    prefixes = prefix_key, prefix_value, prefix_end, prefix_cu_rows
    norms, caches = (query_norm, key_norm, eps), (key, value, key_end)
    projected = projected.contiguous()
    return _step(projected, *angles, *norms, rows, *caches, *prefixes, scale, window, softcap)


def _dense_along_width(x: Tensor | None) -> Any:
    return x if x is None or x.stride(-1) == 1 else x.contiguous()


def _check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor | None,
    prefix_value: Tensor | None,
) -> None:
    """A step of sampling with few rows is mostly this: what is usual is seen at a glance."""
    dtypes = _checks.FLOATS if isinstance(query, Tensor) and query.is_cpu else _checks.FLOATS_TO_32
    _checks.tensor(_OP, "query", query, dtypes, f"Use fastrl.reference.{_OP}, or cast it.")
    _checks.implemented(_OP, query)
    if query.dim() != 4 or query.shape[-1] == 0:
        raise _checks.fail(_OP, "query [B, Hq, T, D]", _checks.shape(query), "Pass four axes.")
    _checks.head_size(_OP, query)
    if (prefix_key is None) != (prefix_value is None):
        got = "prefix_key alone" if prefix_value is None else "prefix_value alone"
        raise _checks.fail(_OP, "prefix_key and prefix_value together", got, "Pass both.")
    _check_cache("key", key, query, None)
    _check_cache("value", value, query, key)
    if value.shape != key.shape:
        _checks.same_shape(_OP, "value", value, "key", key, "Pass one value per key.")
    key_heads, heads = key.shape[1], query.shape[1]
    if not key_heads or heads % key_heads:
        raise _checks.fail(
            _OP,
            f"Hq = {heads} heads of queries as a multiple of Hkv",
            f"Hkv = {key_heads}",
            "Each head of keys serves as many heads of queries.",
        )
    given = {"query": query, "key": key, "value": value}
    if prefix_key is not None and prefix_value is not None:
        _check_cache("prefix_key", prefix_key, query, key)
        _check_cache("prefix_value", prefix_value, query, key)
        if prefix_value.shape != prefix_key.shape:
            remedy = "Pass one value per key."
            _checks.same_shape(_OP, "prefix_value", prefix_value, "prefix_key", prefix_key, remedy)
        given |= {"prefix_key": prefix_key, "prefix_value": prefix_value}
    if torch.is_grad_enabled():
        for name, x in given.items():
            if x.requires_grad:
                raise _checks.fail(
                    _OP,
                    f"{name} without gradient",
                    "requires_grad=True",
                    "Use attention, with a layout where rows share a prompt, or torch.no_grad().",
                )


def _check_cache(name: str, x: Any, query: Tensor, key: Tensor | None) -> None:
    """[B, Hkv, S, D], or [P, Hkv, Sp, D] of prefixes; Hkv is that of key, if given."""
    own = not name.startswith("prefix")
    batch, width = query.shape[0], query.shape[3]
    if isinstance(x, Tensor) and x.dtype is query.dtype and x.device == query.device:
        shape = x.shape
        if len(shape) == 4 and shape[3] == width and (not own or shape[0] == batch):
            if key is None or shape[1] == key.shape[1]:
                return
    _checks.tensor(_OP, name, x, (query.dtype,), f"Use {name}.to(query.dtype).")
    _checks.same_device(_OP, name, x, "query", query)
    heads = "Hkv" if key is None else f"Hkv = {key.shape[1]}"
    rows, keys = (f"B = {batch}", "S") if own else ("P", "Sp")
    expected = f"{name} [{rows}, {heads}, {keys}, D = {width}]"
    raise _checks.fail(_OP, expected, _checks.shape(x), f"Transpose or cut {name}.")


def _check_bounds(
    query: Tensor,
    key: Tensor,
    prefix_key: Tensor | None,
    key_start: Tensor | None,
    key_end: Tensor | None,
    prefix_end: Tensor | None,
    prefix_cu_rows: Tensor | None,
) -> None:
    batch, num_keys = query.shape[0], key.shape[2]
    for name, x in (("key_start", key_start), ("key_end", key_end)):
        if x is not None:
            _check_ends(name, x, query, batch, num_keys, "row")
    if key_start is not None and _checks.contents_are_known(key_start):
        ends = num_keys if key_end is None else key_end
        if bool((key_start > ends).any()):
            raise _checks.fail(
                _OP, "key_start <= key_end", "a row that ends before it starts",
                "A row without keys has both equal.",
            )  # fmt: skip
    if prefix_key is None:
        for name, x in (("prefix_end", prefix_end), ("prefix_cu_rows", prefix_cu_rows)):
            if x is not None:
                raise _checks.fail(
                    _OP, f"prefix_key with {name}", "None", "Pass the prefixes as well."
                )
        return
    prefixes, _, num_shared, _ = prefix_key.shape
    if prefix_end is not None:
        _check_ends("prefix_end", prefix_end, query, prefixes, num_shared, "prefix")
    if prefix_cu_rows is None:
        if batch % prefixes if prefixes else batch:
            raise _checks.fail(
                _OP,
                "B a multiple of the number of prefixes",
                f"B = {batch}, P = {prefixes}",
                "Pass prefix_cu_rows to say which rows continue which prefix.",
            )
        return
    _check_cu_rows(prefix_cu_rows, query, prefixes)


def _check_ends(name: str, x: Any, query: Tensor, count: int, most: int, per: str) -> None:
    _checks.tensor(_OP, name, x, (torch.int32,), f"Use {name}.int().")
    _checks.same_device(_OP, name, x, "query", query)
    if x.shape != (count,):
        raise _checks.fail(_OP, f"{name} ({count},)", _checks.shape(x), f"Pass one per {per}.")
    if (got := _checks.entry_outside(x, 0, most)) is not None:
        remedy = f"{name} counts the keys of its {'cache' if per == 'row' else 'prefix'}."
        raise _checks.fail(_OP, f"{name} in [0, {most}]", got, remedy)


def _check_cu_rows(x: Any, query: Tensor, prefixes: int) -> None:
    name, remedy = "prefix_cu_rows", "Pass the P + 1 boundaries of the groups of rows."
    _checks.tensor(_OP, name, x, (torch.int32,), f"Use {name}.int().")
    _checks.same_device(_OP, name, x, "query", query)
    if x.shape != (prefixes + 1,):
        raise _checks.fail(_OP, f"{name} ({prefixes + 1},)", _checks.shape(x), remedy)
    if not _checks.contents_are_known(x):
        return
    bounds, batch = x.tolist(), query.shape[0]
    if bounds[0] != 0 or bounds[-1] != batch:
        got = f"from {bounds[0]} to {bounds[-1]}"
        raise _checks.fail(_OP, f"{name} from 0 to B = {batch}", got, remedy)
    for i, (a, b) in enumerate(zip(bounds, bounds[1:], strict=False)):
        if a > b:
            raise _checks.fail(_OP, f"{name} that rise", f"{[a, b]} at {i}", remedy)


def _fake(query: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    """output like query, lse [B, Hq, T] float32, or float64 for float64."""
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    return query.new_empty(query.shape), query.new_empty(query.shape[:-1], dtype=dtype)


_binary.register_fake(_OP, _fake)
_binary.register_triton("decode_attention", _OP)
