"""attention against float64, and that a row's bits are its own."""

from pathlib import Path

import pytest
import torch
from budget import TOLERANCE, assert_within_budget
from forests import random_forest

import fastrl
from fastrl import reference
from fastrl.layout import PackedLayout

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
OPTIONS = {
    "causal": {},
    "full": {"causal": False},
    "window": {"window": 7},
    "window of two": {"window": 2},
    "window across blocks": {"window": 150},
    "softcap": {"softcap": 2.0},
    "window and softcap": {"window": 5, "softcap": 2.0},
    "negative scale": {"scale": -0.1},
    "no scale": {"scale": 0.0},
}
# (B, Hq, Hkv, T, S, D): square; a tail of a long cache; queries before the first key; one query;
# two; blocks and their neighbours, grouped and not; head sizes off every power of two.
SHAPES = [
    (2, 4, 2, 37, 37, 16),
    (2, 4, 4, 5, 37, 24),
    (1, 2, 1, 37, 5, 8),
    (3, 4, 1, 1, 40, 32),
    (1, 1, 1, 2, 2, 1),
    (1, 4, 2, 257, 257, 80),
    (1, 2, 2, 128, 520, 112),
    (1, 1, 1, 33, 1030, 96),
]


def layout_of(lengths, prefix):
    bounds = torch.tensor([0, *lengths]).cumsum(0).int()
    return PackedLayout(bounds, torch.tensor(prefix, dtype=torch.int32))


def inputs(batch, query_heads, key_heads, queries, keys, width, device="cpu", dtype=torch.float32):
    query = torch.randn(batch, queries, query_heads, width).transpose(1, 2)  # as models have it
    key, value = torch.randn(2, batch, key_heads, keys, width)
    return tuple(x.to(device, dtype) for x in (query, key, value))


def run(function, tensors, upstream, *, through_lse=False, **options):
    """output, lse, and the gradients of query, key and value."""
    leaves = [x.detach().requires_grad_() for x in tensors]
    output, lse = function(*leaves, return_lse=True, **options)
    total = (output.to(upstream.dtype) * upstream).sum()
    if through_lse:  # a query without keys has -inf there, whatever the inputs are
        total = total + (lse.masked_fill(lse == -torch.inf, 0) * upstream[..., 0]).sum()
    total.backward()
    return output.detach(), lse.detach(), *(x.grad for x in leaves)


def assert_exact(tensors, dtype, **options):
    tensors = [x.to(dtype) for x in tensors]
    upstream = torch.randn_like(tensors[0], dtype=torch.float32)
    ours = run(fastrl.attention, tensors, upstream, **options)
    eager = run(reference.attention, tensors, upstream, **options)
    exact = [x.double() for x in tensors]
    truth = run(reference.attention, exact, upstream.double(), **options)
    for index, found in enumerate(zip(ours, eager, truth, strict=True)):
        assert_within_budget(*found, torch.float32 if index == 1 else dtype)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_error_budget(device, shape, options):
    for through_lse in (False, True):
        tensors = inputs(*shape, device=device)
        assert_exact(tensors, torch.float32, through_lse=through_lse, **options)


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_error_budget_of_every_dtype(any_kernel, dtype, options):
    if dtype == torch.float64 and any_kernel != "cpu":
        pytest.skip("float64 is for the CPU")
    tensors = inputs(2, 4, 2, 70, 70, 35, device=any_kernel)
    assert_exact(tensors, dtype, **options)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_keys_that_do_not_exist_are_not_used(device, options):
    start = torch.tensor([0, 3, 40, 20, 11], dtype=torch.int32, device=device)
    end = torch.tensor([40, 7, 40, 20, 40], dtype=torch.int32, device=device)
    for queries in (40, 9, 1):
        tensors = inputs(5, 4, 2, queries, 40, 16, device=device)
        j = torch.arange(40, device=device)
        outside = (j < start[:, None]) | (j >= end[:, None])
        for x in tensors[1:]:
            x.masked_fill_(outside[:, None, :, None], torch.nan)
        assert_exact(tensors, torch.float32, key_start=start, key_end=end, **options)
        tensors = inputs(5, 4, 2, queries, 40, 16, device=device)
        assert_exact(tensors, torch.float32, key_start=start // 2, **options)
        assert_exact(tensors, torch.float32, key_end=end, **options)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("dtype", FLOATS)
def test_forests(device, seed, dtype):
    lengths, prefix = random_forest(seed)
    layout = layout_of([9 * length + length // 2 for length in lengths], prefix).to(device)
    tensors = inputs(1, 4, 2, layout.num_tokens, layout.num_tokens, 16, device=device)
    for options in ({}, {"window": 20}, {"softcap": 2.0}, {"through_lse": True}):
        assert_exact(tensors, dtype, layout=layout, **options)


def group(prompt, *completions):
    return [prompt, *completions], [-1] + [0] * len(completions)


def test_a_group_with_blocks_on_every_side(device):
    """More keys than a block, completions of equal and of other lengths, of one token and none."""
    lengths, prefix = group(600, 128, 128, 128, 1, 0, 5, 130)
    layout = layout_of(lengths, prefix).to(device)
    tensors = inputs(1, 2, 1, layout.num_tokens, layout.num_tokens, 32, device=device)
    for options in ({}, {"window": 140}, {"softcap": 2.0, "through_lse": True}):
        assert_exact(tensors, torch.float32, layout=layout, **options)


@pytest.mark.parametrize("options", [{"window": 1}, {"window": 1, "softcap": 2.0}, {}], ids=str)
def test_a_query_that_sees_one_key_gives_its_value(device, options):
    """And no gradient to query and key, but for the rounding of two equal sums' difference."""
    tensors = inputs(2, 4, 2, *((9, 9) if options else (1, 1)), 16, device=device)
    upstream = torch.randn_like(tensors[0])
    output, lse, *grads = run(fastrl.attention, tensors, upstream, **options)
    value = tensors[2].repeat_interleave(2, dim=1)
    if device == "cpu":
        assert torch.equal(output, value)
    else:  # an exponential and a division of two units in the last place each
        torch.testing.assert_close(output, value, rtol=5e-7, atol=0)
    score = (tensors[0] * tensors[1].repeat_interleave(2, dim=1)).sum(-1) / 4
    cap = options.get("softcap")
    torch.testing.assert_close(lse, cap * (score / cap).tanh() if cap else score)
    rounding = 2e-6 * (upstream * value).abs().sum(-1).max()
    assert all(x.abs().max() <= rounding for x in grads[:2])
    torch.testing.assert_close(grads[2], upstream.unflatten(1, (2, 2)).sum(2))


def test_equal_scores(device):
    query, key, value = inputs(1, 2, 1, 40, 40, 16, device=device)
    assert_exact((0 * query, key, value), torch.float32)
    assert_exact((0 * query, key, value), torch.float32, softcap=1.0)
    output = fastrl.attention(query, torch.ones_like(key), value)
    mean = value.cumsum(2) / torch.arange(1, 41, device=device)[:, None]
    torch.testing.assert_close(output, mean.expand_as(output))


@pytest.mark.parametrize("options", [{}, {"softcap": 500.0}, {"window": 9}], ids=str)
def test_scores_in_the_thousands(any_kernel, options):
    """One key has all the weight. The gradients of query and key are differences of equal sums, so
    that what they are measured by is what they are made of."""
    query, key, value = inputs(1, 2, 2, 40, 40, 16, device=any_kernel)
    tensors, upstream = (100 * query, 100 * key, value), torch.randn_like(query)
    ours = run(fastrl.attention, tensors, upstream, **options)
    exact = [x.double() for x in tensors]
    truth = run(reference.attention, exact, upstream.double(), **options)
    for index in (0, 1, 4):  # a score's last place is 6e-5
        torch.testing.assert_close(ours[index].double(), truth[index], rtol=1e-4, atol=1e-4)
    terms = (upstream.abs().sum(-1).max() * value.abs().max() * 100 * key.abs().max()).item()
    for index in (2, 3):
        assert (ours[index] - truth[index]).abs().max() <= 1e-6 * terms


@pytest.mark.parametrize("options", [{}, {"window": 9}, {"softcap": 20.0}], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_of_keys_and_values_with_a_mean(dtype, options):
    """As those of layers with a bias have. <grad_output, output> of an output of 16 bits is then
    wrong by more than the gradient of the queries is large."""
    query, key, value = inputs(1, 4, 2, 70, 70, 32)
    tensors = [x.to(dtype) for x in (query, key + 10, value + 4)]
    assert_exact(tensors, dtype, **options)
    upstream = torch.randn_like(query)
    ours = run(fastrl.attention, tensors, upstream, through_lse=True, **options)[2]
    exact = [x.double() for x in tensors]
    truth = run(reference.attention, exact, upstream.double(), through_lse=True, **options)[2]
    assert (ours - truth).norm() <= TOLERANCE[dtype] * truth.norm()


def test_the_slope_of_a_softcap_far_out():
    """1 - tanh(x)^2 without the difference, of which nothing is left in float32 from x = 9 on."""
    query = torch.linspace(-12, 12, 97)[:, None].expand(1, 1, 97, 1).requires_grad_()
    one = torch.ones(1, 1, 1, 1)
    _, lse = fastrl.attention(query, one, one, causal=False, softcap=1.0, return_lse=True)
    (slope,) = torch.autograd.grad(lse.sum(), query)
    exact = query.detach().double().cosh() ** -2
    torch.testing.assert_close(slope.double(), exact, rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("dtype, rtol", [(torch.float32, 4e-7), (torch.float64, 4e-15)])
def test_a_softcap_is_a_tanh_to_its_last_places(any_kernel, dtype, rtol):
    """Also of scores far below it, where 1 - exp(-2 x) is 0. One key, whose score is the lse."""
    if any_kernel != "cpu":
        pytest.skip("one of the C++ kernels")
    size = torch.logspace(-18, 1.5, 400, dtype=torch.float64)
    query = torch.cat([size, -size])[None, None, :, None].to(dtype)
    one = torch.ones(1, 1, 1, 1, dtype=dtype)
    _, lse = fastrl.attention(query, one, one, causal=False, softcap=1.0, return_lse=True)
    torch.testing.assert_close(lse.double(), query[..., 0].double().tanh(), rtol=rtol, atol=0)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_value_that_is_not_finite_reaches_those_who_see_it(bad):
    """No completion beside it, in the forward and the backward pass; no query before it, and none
    that a window has taken past it, wherever a group of queries begins."""
    for prompt in (70, 71, 72, 73):
        layout = layout_of(*group(prompt, 6, 7, 6))
        tensors = inputs(1, 4, 2, layout.num_tokens, layout.num_tokens, 16)
        upstream = torch.randn_like(tensors[0])
        clean = run(fastrl.attention, tensors, upstream, layout=layout)
        tensors[2][:, :, prompt + 2 : prompt + 6] = bad
        found = run(fastrl.attention, tensors, upstream, layout=layout)
        for x, y in zip(clean, found, strict=True):
            assert torch.equal(x[:, :, prompt + 6 :], y[:, :, prompt + 6 :])
        assert torch.equal(clean[0][:, :, : prompt + 2], found[0][:, :, : prompt + 2])
        assert not found[0][:, :, prompt + 2 : prompt + 6].isfinite().any()
    query, key, value = inputs(1, 2, 1, 90, 90, 16)
    clean = fastrl.attention(query, key, value, window=5)
    value[:, :, 66] = bad
    found = fastrl.attention(query, key, value, window=5)
    seen = slice(66, 71)
    assert torch.equal(clean[:, :, :66], found[:, :, :66])
    assert torch.equal(clean[:, :, 71:], found[:, :, 71:])
    assert not found[:, :, seen].isfinite().any()


def test_a_shared_prompt_equals_its_copies(device):
    prompt, completions = 50, [7, 20, 1, 33]
    lengths, prefix = group(prompt, *completions)
    layout = layout_of(lengths, prefix).to(device)
    tensors = inputs(1, 4, 2, layout.num_tokens, layout.num_tokens, 16, device=device)
    upstream = torch.randn_like(tensors[0])
    upstream[:, :, :prompt] = 0  # each copy of the prompt would have a gradient of its own
    together = run(fastrl.attention, tensors, upstream, layout=layout)
    grads = [torch.zeros_like(x) for x in tensors]
    bounds = layout.cu_seqlens.tolist()
    for start, end in zip(bounds[1:], bounds[2:], strict=False):
        path = torch.cat([torch.arange(prompt), torch.arange(start, end)]).to(device)
        copy = run(fastrl.attention, [x[:, :, path] for x in tensors], upstream[:, :, path])
        at = slice(prompt, None)
        torch.testing.assert_close(together[0][:, :, start:end], copy[0][:, :, at])
        for grad, x in zip(grads, copy[2:], strict=True):
            grad.index_add_(2, path, x)
    for grad, x in zip(grads, together[2:], strict=True):
        torch.testing.assert_close(grad, x, rtol=1e-4, atol=1e-5)


# Of 16 bits the backward pass takes other sums.
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_row_alone_is_bitwise_the_row_in_a_batch(device, options, dtype):
    for shape in ((5, 4, 2, 45, 45, 16), (5, 4, 2, 3, 700, 16), (5, 4, 4, 1, 100, 80)):
        tensors = inputs(*shape, device=device, dtype=dtype)
        keys = shape[4]
        start = torch.tensor([0, 3, 0, 20, 0], dtype=torch.int32, device=device)
        end = torch.tensor([keys, keys - 5, 1, keys, 0], dtype=torch.int32, device=device)
        upstream = torch.randn_like(tensors[0])
        given = options | {"key_start": start, "key_end": end}
        together = run(fastrl.attention, tensors, upstream, **given)
        for b in range(5):
            row = [x[b : b + 1].clone() for x in tensors]
            own = given | {"key_start": start[b : b + 1], "key_end": end[b : b + 1]}
            alone = run(fastrl.attention, row, upstream[b : b + 1].clone(), **own)
            for x, y in zip(alone, together, strict=True):
                assert torch.equal(x[0], y[b])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [{}, {"window": 20}, {"softcap": 2.0}], ids=str)
def test_a_tree_alone_is_bitwise_the_tree_in_a_batch(device, options, dtype):
    trees = [group(37, 20, 5, 20), ([9, 4, 3, 17, 2], [-1, 0, 1, 1, 0]), group(130, 129), group(1)]
    lengths = [length for tree, _ in trees for length in tree]
    prefix, first = [], 0
    for tree, parents in trees:
        prefix += [p + first if p >= 0 else -1 for p in parents]
        first += len(tree)
    layout = layout_of(lengths, prefix).to(device)
    N = layout.num_tokens
    tensors = inputs(1, 4, 2, N, N, 16, device=device, dtype=dtype)
    upstream = torch.randn_like(tensors[0])
    together = run(fastrl.attention, tensors, upstream, layout=layout, **options)
    start = 0
    for tree, parents in trees:
        at = slice(start, start + sum(tree))
        start = at.stop
        own = layout_of(tree, parents).to(device)
        cut = [x[:, :, at].clone() for x in (*tensors, upstream)]
        alone = run(fastrl.attention, cut[:3], cut[3], layout=own, **options)
        for x, y in zip(alone, together, strict=True):
            assert torch.equal(x, y[:, :, at])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [{}, {"window": 20}, {"softcap": 2.0}], ids=str)
@pytest.mark.parametrize("length", [1, 6, 7, 20, 128, 200])
def test_a_completion_does_not_depend_on_those_beside_it(device, options, length, dtype):
    """Its outputs and the gradient of its queries, bit for bit; alone with its prompt, too."""
    for others in ([], [3], [length] * 3, [5, 64], [200, 1, 1]):
        layout = layout_of(*group(70, length)).to(device)
        more = layout_of(*group(70, length, *others)).to(device)
        N = more.num_tokens
        tensors = inputs(1, 4, 2, N, N, 16, device=device, dtype=dtype)
        upstream = torch.randn_like(tensors[0])
        beside = run(fastrl.attention, tensors, upstream, layout=more, **options)
        at = slice(0, 70 + length)
        cut = [x[:, :, at].clone() for x in (*tensors, upstream)]
        alone = run(fastrl.attention, cut[:3], cut[3], layout=layout, **options)
        for x, y in zip(alone[:3], beside[:3], strict=True):
            assert torch.equal(x, y[:, :, at])
        # Its own keys and values are seen by nobody else.
        for x, y in zip(alone[3:], beside[3:], strict=True):
            assert torch.equal(x[:, :, 70:], y[:, :, 70 : 70 + length])


def test_many_rows_are_as_each_of_them(device):
    """More than what the backward pass adds up over the heads in one go."""
    tensors = inputs(72, 4, 2, 256, 256, 32, device=device)
    upstream = torch.randn_like(tensors[0])
    together = run(fastrl.attention, tensors, upstream, window=3)
    for b in (0, 71):
        row = [x[b : b + 1].clone() for x in (*tensors, upstream)]
        alone = run(fastrl.attention, row[:3], row[3], window=3)
        assert all(torch.equal(x[0], y[b]) for x, y in zip(alone, together, strict=True))


def test_more_heads_share_keys_than_a_block_has_rows(device):
    assert_exact(inputs(1, 150, 1, 5, 9, 8, device=device), torch.float32)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux tells the memory")
def test_a_deep_tree_takes_no_memory_for_what_its_tokens_see():
    """3000 segments of one token, each behind the last: 4.5 million pairs, of causal rows."""
    N = 3000
    layout = PackedLayout(torch.arange(N + 1).int(), torch.arange(-1, N - 1).int())
    tensors = inputs(1, 1, 1, N, N, 8)
    upstream = torch.randn_like(tensors[0])
    expected = run(fastrl.attention, tensors, upstream)

    def high_water():
        return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024

    Path("/proc/self/clear_refs").write_text("5")
    before = high_water()
    found = run(fastrl.attention, tensors, upstream, layout=layout)
    assert high_water() - before < 12  # MiB
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_threads_do_not_change_a_bit(dtype):
    layout = layout_of(*group(300, 70, 70, 33, 5))
    tensors = inputs(1, 4, 2, layout.num_tokens, layout.num_tokens, 32, dtype=dtype)
    upstream = torch.randn_like(tensors[0])
    threads, results = torch.get_num_threads(), []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append([run(fastrl.attention, tensors, upstream, layout=layout, **options)
                        for options in ({}, {"window": 50}, {"softcap": 3.0})])  # fmt: skip
    torch.set_num_threads(threads)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_two_halves_merge_by_their_log_sum_exp(device):
    query, key, value = inputs(2, 4, 2, 9, 40, 16, device=device)
    whole = fastrl.attention(query, key, value, causal=False, return_lse=True)
    (a, lse_a), (b, lse_b) = (
        fastrl.attention(query, key[:, :, half], value[:, :, half], causal=False, return_lse=True)
        for half in (slice(0, 15), slice(15, 40))
    )
    lse = torch.logaddexp(lse_a, lse_b)
    merged = (lse_a - lse).exp()[..., None] * a + (lse_b - lse).exp()[..., None] * b
    bound = {"rtol": TOLERANCE[torch.float32], "atol": TOLERANCE[torch.float32]}
    torch.testing.assert_close(whole[0], merged, **bound)
    torch.testing.assert_close(whole[1], lse, **bound)
