"""A layer's attention of one token a row in one op, against its parts in float64."""

import pytest
import torch
from decode_inputs import inputs
from torch import library

from fastrl import reference
from fastrl.ops import _binary
from fastrl.ops.decode_attention import decode_step

HEADS, KEYS = (6, 2), 40


def arguments(width=16, batch=8, running=(0, 2, 3, 5, 7), norms=True, seed=0):
    """Of decode_step; rows of the caches that do not run have no keys."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    given = inputs("cpu", batch=batch, heads=HEADS, keys=KEYS, width=width, prefixes=2, seed=seed)
    rows = torch.tensor(running)
    key_end = torch.zeros(batch, dtype=torch.int32)
    key_end[rows] = torch.randint(1, KEYS + 1, (len(rows),), generator=generator).int()
    caches = {}
    for name in ("key", "value"):  # [B, S, Hkv, D] in memory, as the decoder has them
        cache = normal(batch, KEYS, HEADS[1], width)
        for b, end in enumerate(key_end.tolist()):
            cache[b, max(end - 1, 0) :] = float("nan")
        caches[name] = cache.transpose(1, 2)
    return {
        "projected": normal(len(rows), (HEADS[0] + 2 * HEADS[1]) * width),
        "cos": normal(len(rows), 1, width),
        "sin": normal(len(rows), 1, width),
        "query_norm": normal(width) if norms else None,
        "key_norm": normal(width) if norms else None,
        "eps": 1e-3,
        "rows": rows,
        **caches,
        "key_end": key_end,
        **{name: given[name] for name in ("prefix_key", "prefix_value", "prefix_end")},
        "prefix_cu_rows": given["prefix_cu_rows"],
        "scale": 0.3,
        "window": None,
        "softcap": None,
    }


def expected(a):
    """Output [R, Hq D], and the caches, in float64."""
    a = {n: x.double() if torch.is_tensor(x) and x.is_floating_point() else x for n, x in a.items()}
    width = a["cos"].shape[-1]
    heads = a["projected"].unflatten(1, (-1, width))
    query, key, value = heads.split([HEADS[0], HEADS[1], HEADS[1]], 1)

    def turned(x, norm):
        if norm is not None:
            x = x / (x.square().mean(-1, keepdim=True) + a["eps"]).sqrt() * norm
        first, second = x.chunk(2, -1)
        return x * a["cos"] + torch.cat([-second, first], -1) * a["sin"]

    caches, rows = [a["key"].clone(), a["value"].clone()], a["rows"]
    last = (a["key_end"][rows] - 1).long()
    for cache, x in zip(caches, (turned(key, a["key_norm"]), value), strict=True):
        cache[rows, :, last] = x
    queries = torch.zeros(len(a["key"]), HEADS[0], 1, width, dtype=torch.float64)
    queries[rows, :, 0] = turned(query, a["query_norm"])
    names = ("key_end", "prefix_key", "prefix_value", "prefix_end", "prefix_cu_rows")
    numbers = {name: a[name] for name in (*names, "scale", "window", "softcap")}
    output = reference.decode_attention(queries, *caches, **numbers)
    return output[rows].flatten(1), *caches


@pytest.mark.parametrize("norms", [True, False])
@pytest.mark.parametrize("width", [2, 16, 24, 64, 80])
@pytest.mark.parametrize("limits", [{}, {"window": 9, "softcap": 2.0}])
def test_it_is_norm_rotation_cache_and_attention(width, norms, limits):
    a = arguments(width, norms=norms, seed=width) | limits
    output, *caches = expected(a)
    got = decode_step(**a)
    torch.testing.assert_close(got.double(), output, rtol=0, atol=3e-6)
    for name, cache in zip(("key", "value"), caches, strict=True):
        torch.testing.assert_close(a[name].double(), cache, rtol=1e-6, atol=1e-6, equal_nan=True)


def test_a_row_alone_is_the_row_in_a_batch():
    a = arguments(batch=8, running=range(8))
    a |= {"prefix_cu_rows": torch.tensor([0, 8, 8], dtype=torch.int32)}
    cut = {name: a[name][3:4].clone() for name in ("key", "value", "key_end")}
    cut |= {name: a[name][3:4] for name in ("projected", "cos", "sin")}
    cut |= {"rows": torch.tensor([0]), "prefix_cu_rows": torch.tensor([0, 1, 1]).int()}
    assert torch.equal(decode_step(**a)[3:4], decode_step(**(a | cut)))


@pytest.mark.parametrize(
    "change",
    [
        {"rows": torch.tensor([0, 2, 3, 5, 8])},
        {"rows": torch.tensor([0, 2, 3, 5, -1])},
        {"rows": torch.tensor([0, 2, 3, 5, 3])},
        {"rows": torch.tensor([0, 1, 3, 5, 7])},  # one without a place: key_end 0
        {"key_end": torch.full((8,), KEYS + 1, dtype=torch.int32)},
        {"key_end": torch.ones(8, dtype=torch.int64)},
        {"cos": torch.ones(5, 1, 8)},
        {"sin": torch.ones(4, 1, 16)},
        {"query_norm": torch.ones(15)},
        {"projected": torch.ones(5, 4 * 16)},
        {"projected": torch.ones(5, 10 * 16, dtype=torch.float64)},
        {"prefix_cu_rows": torch.tensor([0, 9, 8], dtype=torch.int32)},
    ],
)
def test_a_wrong_call_writes_nothing(change):
    a = arguments() | change
    before = [a[name].clone() for name in ("key", "value")]
    with pytest.raises(RuntimeError, match="decode_attention"):
        decode_step(**a)
    for x, y in zip((a["key"], a["value"]), before, strict=True):
        assert torch.equal(x.nan_to_num(7.0), y.nan_to_num(7.0))


def test_its_schema_says_what_it_writes():
    a = arguments(norms=False)
    a |= {name: a[name].nan_to_num() for name in ("key", "value")}
    a |= {name: a[name].flatten(1) for name in ("cos", "sin")}
    step = torch.ops.fastrl.decode_attention_step.default
    assert _binary.module is not None
    library.opcheck(step, tuple(a.values()), test_utils="test_schema")
