"""The launchers in Triton's interpreter against the definition.

Of 16 bits mostly float16, of which fewer digits are lost; bfloat16 where what is loaded or stored
could make a difference.
"""

import math

import pytest
import torch
from attention_cases import MODULE, assert_same_bits, inputs, layout_of, plain, run, visible_of
from budget import assert_within_budget
from eager_attention import assert_no_worse_than_eager
from forests import random_forest

HALF, SINGLE, BF16 = torch.float16, torch.float32, torch.bfloat16


def i32(*numbers):
    return torch.tensor(numbers, dtype=torch.int32)


def check(interpreted, shape, dtype, module=MODULE, before=(), **options):
    tensors = inputs(shape, dtype)
    actual = run(interpreted, tensors, module, before, **options)
    eager = plain(tensors, **options)
    truth = plain(tensors, torch.float64, **options)
    for i, parts in enumerate(zip(actual, eager, truth, strict=True)):
        assert_within_budget(*parts, SINGLE if i == 1 else dtype)


# (B, Hq, Hkv, T, S, D), dtype, options: what each is for stands before it.
DENSE = {
    "blocks and what is left of one": ((1, 2, 2, 150, 150, 64), HALF, {}),
    "float32": ((1, 2, 1, 90, 90, 64), SINGLE, {}),
    "all keys": ((1, 2, 1, 70, 150, 64), HALF, {"causal": False}),
    "a cache before the queries": ((1, 2, 1, 70, 200, 32), HALF, {}),
    "fewer keys than queries": ((1, 1, 1, 150, 40, 32), HALF, {}),
    "one query": ((2, 2, 1, 1, 140, 32), SINGLE, {}),
    "one query of all keys": ((2, 2, 1, 1, 140, 32), HALF, {"causal": False}),
    "one key": ((1, 1, 1, 1, 1, 16), SINGLE, {}),
    "queries share keys, 6 to 2": ((1, 6, 2, 100, 100, 32), HALF, {}),
    "a window in a block": ((1, 2, 1, 150, 150, 32), HALF, {"window": 7}),
    "a window over blocks": ((1, 2, 1, 300, 300, 32), HALF, {"window": 150}),
    "a window of one": ((1, 1, 1, 70, 70, 32), SINGLE, {"window": 1}),
    "a window beyond all": ((1, 1, 1, 70, 70, 32), SINGLE, {"window": 10**12}),
    "a window that all but one key are in": ((1, 1, 1, 70, 70, 32), SINGLE, {"window": 69}),
    "a window in a cache": ((1, 1, 1, 70, 300, 32), HALF, {"window": 100}),
    "softcap": ((1, 2, 1, 150, 150, 32), HALF, {"softcap": 2.0}),
    "softcap, likely keys": ((1, 1, 1, 70, 70, 32), SINGLE, {"softcap": 5.0, "scale": 1.0}),
    "a softcap far above": ((1, 1, 1, 70, 70, 32), SINGLE, {"softcap": 1e4}),
    "a negative scale": ((1, 2, 1, 100, 100, 32), HALF, {"scale": -0.2, "softcap": 3.0}),
    "scale 0": ((1, 1, 1, 50, 50, 32), SINGLE, {"scale": 0.0}),
    "a tiny scale": ((1, 1, 1, 50, 50, 32), SINGLE, {"scale": 1e-42}),
    "a great scale": ((1, 1, 1, 100, 100, 32), HALF, {"scale": 3.0}),
    "head size 80": ((1, 2, 1, 100, 100, 80), HALF, {}),
    "head size 96": ((1, 1, 1, 100, 100, 96), HALF, {"window": 30}),
    "head size 112": ((1, 1, 1, 100, 100, 112), HALF, {}),
    "head size 128": ((1, 1, 1, 150, 150, 128), HALF, {}),
    "head size 128, float32": ((1, 1, 1, 70, 70, 128), SINGLE, {}),
    "head size 192": ((1, 1, 1, 70, 70, 192), HALF, {}),
    "head size 256": ((1, 1, 1, 70, 70, 256), HALF, {}),
    "head size 256, float32": ((1, 1, 1, 20, 20, 256), SINGLE, {}),
    "an odd head size": ((1, 1, 1, 70, 70, 33), HALF, {"softcap": 2.0}),
    "head size 1": ((1, 1, 1, 40, 40, 1), SINGLE, {}),
}  # fmt: skip


IN_BF16 = ["blocks and what is left of one", "a cache before the queries", "a window over blocks"]
IN_BF16 += ["softcap", "a negative scale", "a great scale", "head size 80", "head size 256"]


@pytest.mark.parametrize(
    "name, dtype", [(name, DENSE[name][1]) for name in DENSE] + [(name, BF16) for name in IN_BF16]
)
def test_dense(interpreted, name, dtype):
    shape, _, options = DENSE[name]
    check(interpreted, shape, dtype, **options)


@pytest.mark.parametrize("options", [{}, {"causal": False}, {"window": 40}], ids=str)
def test_keys_that_exist(interpreted, options):
    """From the start, on the left, on the right, none, one; T = 90 queries."""
    ends = {"key_start": i32(0, 60, 0, 70, 199), "key_end": i32(200, 200, 100, 70, 200)}
    check(interpreted, (5, 2, 1, 90, 200, 32), HALF, **ends, **options)


@pytest.mark.parametrize("options", [{}, {"causal": False}, {"window": 40}], ids=str)
def test_bounds_beyond_the_keys(interpreted, options):
    """Queries stand where the bounds say, and keys are read as far as there are any."""
    ends = {"key_start": i32(-9, 0, 250, 3), "key_end": i32(200, 230, 300, -4)}
    check(interpreted, (4, 2, 1, 90, 200, 32), HALF, **ends, **options)


@pytest.mark.parametrize("off", [-2, -1, 0, 1, 2])
def test_edges_beside_those_of_blocks(interpreted, off):
    """In float32 a block holds 32 queries, or keys."""
    check(interpreted, (1, 1, 1, 70, 102 + off, 32), SINGLE)
    check(interpreted, (1, 1, 1, 130, 130, 32), SINGLE, window=64 + off)
    layout = layout_of([64 + off, 32 + off, 40, 60 - off], [-1, -1, 1, 1])
    shape = (1, 1, 1, layout.num_tokens, layout.num_tokens, 32)
    check(interpreted, shape, SINGLE, layout=layout)
    check(interpreted, shape, SINGLE, layout=layout, window=64 + off)


# lengths and prefix of a layout, the shape's heads and D, dtype, options
GROUPS = ([130, 40, 0, 150, 20, 60, 20], [-1, 0, 0, 0, -1, 4, 4])
CHAIN = ([40, 30, 1, 128, 0, 60], [-1, 0, 1, 2, 3, 4])
TREE = ([64, 3, 128, 5, 5, 0, 90, 30], [-1, 0, 0, 2, 2, -1, 5, 6])
PACKED = {
    "shared prompts": (GROUPS, (2, 1, 32), HALF, {}),
    "shared prompts, float32": (([50, 20, 40], [-1, 0, 0]), (2, 1, 32), SINGLE, {}),
    "one long chain": (CHAIN, (2, 2, 32), HALF, {}),
    "trees": (TREE, (4, 2, 64), HALF, {}),
    "a window": (GROUPS, (2, 1, 32), HALF, {"window": 70}),
    "a window, float32": (([50, 40, 30], [-1, 0, 1]), (1, 1, 32), SINGLE, {"window": 30}),
    "a window of one": (TREE, (1, 1, 32), HALF, {"window": 1}),
    "softcap and window": (CHAIN, (2, 1, 32), HALF, {"window": 100, "softcap": 2.0}),
    "scale": (TREE, (1, 1, 32), HALF, {"scale": -0.4}),
    "head size 80": (GROUPS, (1, 1, 80), HALF, {}),
}


IN_BF16 = ["shared prompts", "trees", "softcap and window"]


@pytest.mark.parametrize(
    "name, dtype", [(name, PACKED[name][2]) for name in PACKED] + [(name, BF16) for name in IN_BF16]
)
def test_packed(interpreted, name, dtype):
    forest, (heads, key_heads, D), _, options = PACKED[name]
    layout = layout_of(*forest)
    N = layout.num_tokens
    check(interpreted, (1, heads, key_heads, N, N, D), dtype, layout=layout, **options)


@pytest.mark.parametrize("seed", range(6))
def test_random_forests(interpreted, seed):
    lengths, prefix = random_forest(seed + 100)
    layout = layout_of([length * (7 + 9 * (seed % 3)) for length in lengths], prefix)
    N = layout.num_tokens
    options = {"window": 25} if seed % 2 else {}
    check(interpreted, (1, 1, 1, N, N, 32), HALF, layout=layout, **options)


def test_the_window_of_positions_not_of_tokens(interpreted):
    """The second completion stands far from the prompt, and its positions do not."""
    layout = layout_of([20, 200, 30], [-1, 0, 0])
    tensors = inputs((1, 1, 1, 250, 250, 32))
    output = run(interpreted, tensors, layout=layout, window=25)[0]
    alone = layout_of([20, 30], [-1, 0])
    kept = torch.cat([torch.arange(20), torch.arange(220, 250)])
    expected = run(interpreted, [x[:, :, kept] for x in tensors], layout=alone, window=25)[0]
    assert_same_bits([output[:, :, kept]], [expected])


@pytest.mark.parametrize("window", [None, 100])
def test_long_loops_over_queries_are_split_and_summed_in_order(interpreted, monkeypatch, window):
    """With 128 in the place of 8192 queries; a part on its own is float32."""
    from fastrl import _tiles

    monkeypatch.setattr(_tiles, "SPLIT", 128)
    layout = layout_of([70, 60, 0, 50, 140, 30], [-1, 0, 0, 0, -1, 4])
    N = layout.num_tokens
    check(interpreted, (1, 4, 2, N, N, 32), HALF, layout=layout, window=window)
    pair = layout_of([70, 120], [-1, 0])  # one tile is cut, in two
    check(interpreted, (1, 1, 1, 190, 190, 32), HALF, layout=pair, window=window)
    if window is None:
        tensors = inputs((1, 2, 2, N, N, 32))
        cut = run(interpreted, tensors, layout=layout)
        monkeypatch.setattr(_tiles, "SPLIT", 8192)
        whole = run(interpreted, tensors, layout=layout)
        assert_same_bits(cut[:3], whole[:3])
        for a, b in zip(cut[3:], whole[3:], strict=True):
            assert not torch.equal(a, b)  # it was cut
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "chip, D, dtype, packed",
    [
        (90, 128, BF16, {}), (90, 128, HALF, {"window": 80}), (90, 64, BF16, {"window": 80}),
        (90, 80, HALF, None), (100, 32, BF16, {"window": 80}), (100, 64, HALF, {}),
    ],
)  # fmt: skip
def test_other_chips(interpreted, chip, D, dtype, packed):
    """Their blocks, and descriptors in the place of pointers, which change no bit."""
    layout = layout_of([90, 30, 50], [-1, 0, 0])
    options = {"key_start": i32(0, 100)} if packed is None else {"layout": layout, **packed}
    shape = (2, 1, 1, 90, 130, D) if packed is None else (1, 2, 1, 170, 170, D)
    on = "attention_probe", (chip, True)
    check(interpreted, shape, dtype, *on, **options)
    tensors = inputs(shape, dtype)
    pointers = run(interpreted, tensors, on[0], (chip, False), **options)
    assert_same_bits(run(interpreted, tensors, *on, **options), pointers)


def test_heads_in_sections(interpreted):
    """As where their keys do not fit into the L2 cache together: 8 of 10 lanes, then 2, and of the
    5 of keys 2, 2 and 1."""
    tensors = inputs((1, 10, 5, 150, 150, 32), HALF)
    found = run(interpreted, tensors, "attention_probe", (80, False))
    assert_same_bits(found, run(interpreted, tensors))


@pytest.mark.parametrize("on", [(), ("attention_probe", (90, True))], ids=["80", "90"])
@pytest.mark.parametrize("garbage", [math.nan, math.inf])
def test_garbage_where_no_keys_are_reaches_nothing(interpreted, garbage, on):
    start, end = i32(0, 60, 50), i32(150, 120, 50)
    tensors = inputs((3, 1, 1, 100, 150, 32), HALF)
    j = torch.arange(150)
    for options in ({"key_start": start, "key_end": end}, {"key_start": start}):
        outside = (j < start[:, None]) | (j >= options.get("key_end", i32(150))[:, None])
        filled = list(tensors)
        for i in (1, 2):
            filled[i] = tensors[i].masked_fill(outside[:, None, :, None], garbage)
        found = run(interpreted, filled, *on, **options)
        assert_same_bits(found, run(interpreted, tensors, *on, **options))
        assert not any(grad[outside[:, None]].any() for grad in found[3:])


@pytest.mark.parametrize("window", [None, 9])
@pytest.mark.parametrize("packed", [False, True])
def test_gradients_of_keys_and_values_with_a_mean(interpreted, packed, window):
    """As those of layers with a bias have: <grad_output, output> with an output of 16 bits alone
    would be wrong by more than the gradient of the queries is large."""
    layout = layout_of([70, 20, 40], [-1, 0, 0]) if packed else None
    options = {"layout": layout, "window": window}
    query, key, value, grad_output, grad_lse = inputs((1, 2, 1, 130, 130, 32), SINGLE)
    tensors = [x.to(HALF) for x in (query, key + 3, value + 1, grad_output)]
    found = run(interpreted, [*tensors, 0 * grad_lse], **options)
    assert_no_worse_than_eager(found[2:], tensors, **options)


def test_queries_without_keys(interpreted):
    """Output 0, lse -inf, no gradient, whatever comes from above; the others are not touched."""
    tensors = list(inputs((2, 1, 1, 150, 60, 32)))
    tensors[4][1] = math.nan  # as logaddexp of two lse -inf gives
    tensors[4][0, :, :90] = math.nan  # these stand before the first key
    output, lse, *grads = run(interpreted, tensors, key_end=i32(60, 0))
    assert not output[0, :, :90].any() and not output[1].any()
    assert (lse[0, :, :90] == -math.inf).all() and (lse[1] == -math.inf).all()
    assert not grads[0][0, :, :90].any() and not any(grad[1].any() for grad in grads)
    for x in (output, *grads):
        assert x.isfinite().all() and x[0].any()


@pytest.mark.parametrize("needs", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 1), (0, 0, 0)])
def test_only_the_gradients_that_are_needed(interpreted, needs):
    needs = [bool(needed) for needed in needs]
    layout = layout_of([40, 20], [-1, 0])
    query, key, value, grad_output, grad_lse = tensors = inputs((1, 2, 1, 60, 60, 32), HALF)
    visible = visible_of(query, layout=layout)
    saved = interpreted(MODULE, "attention_fwd", query, key, value, *visible, True)
    expected = run(interpreted, tensors, layout=layout)[2:]
    saved = (grad_output, grad_lse, query, key, value, *saved)
    grads = interpreted(MODULE, "attention_bwd", *saved, *visible, *needs)
    for grad, full, needed in zip(grads, expected, needs, strict=True):
        assert torch.equal(grad, full) if needed else grad.shape == (0,)


@pytest.mark.parametrize("missing", ["grad_output", "grad_lse"])
def test_either_gradient_from_above_alone(interpreted, missing):
    query, key, value, grad_output, grad_lse = tensors = inputs((1, 2, 1, 70, 70, 32))
    visible = visible_of(query)
    results = interpreted(MODULE, "attention_fwd", query, key, value, *visible, False)
    given = [None if missing == "grad_output" else grad_output]
    given += [None if missing == "grad_lse" else grad_lse]
    saved = (*given, query, key, value, *results)
    grads = interpreted(MODULE, "attention_bwd", *saved, *visible, True, True, True)
    zero = [
        torch.zeros_like(x) if g is None else g for x, g in zip(tensors[3:], given, strict=True)
    ]
    truth = plain([query, key, value, *zero], torch.float64)
    for actual, exact in zip(grads, truth[2:], strict=True):
        torch.testing.assert_close(actual.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(0, 2, 1, 5, 5, 32), (2, 2, 1, 0, 5, 32), (2, 2, 1, 5, 0, 32)])
def test_nothing_to_do(interpreted, shape):
    for options in ({}, {"causal": False}):
        output, lse, *grads = run(interpreted, inputs(shape), **options)
        assert not output.any() and (lse == -math.inf).all()
        assert all(grad.isfinite().all() and not grad.any() for grad in grads)


def test_a_layout_without_tokens(interpreted):
    for layout in (layout_of([], []), layout_of([0, 0], [-1, 0])):
        output, lse, *grads = run(interpreted, inputs((1, 2, 1, 0, 0, 32)), layout=layout)
        assert output.shape == (1, 2, 0, 32) and lse.shape == (1, 2, 0)
        assert [grad.numel() for grad in grads] == [0, 0, 0]
