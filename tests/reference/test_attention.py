import math

import pytest
import torch

from fastrl.layout import PackedLayout, pack_groups
from fastrl.reference import attention

NAN = float("nan")


def randn(*shape):
    return torch.randn(shape, dtype=torch.float64)


def one_row(query, keys, values, scale):
    """A single query [D] over its keys [n, D], by the definition."""
    weights = torch.stack([(query @ key * scale).exp() for key in keys])
    return sum(w * v for w, v in zip(weights, values, strict=True)) / weights.sum()


def test_by_hand():
    query = torch.tensor([[[[0.0], [math.log(2)]]]])  # scores of query 1: 0, log 2
    key = torch.tensor([[[[0.0], [1.0]]]])
    value = torch.tensor([[[[3.0], [6.0]]]])
    expected = torch.tensor([[[[3.0], [5.0]]]])  # (1 * 3 + 2 * 6) / 3
    torch.testing.assert_close(attention(query, key, value), expected)
    expected = torch.tensor([[[[4.5], [5.0]]]])
    torch.testing.assert_close(attention(query, key, value, causal=False), expected)
    capped = attention(query, key, value, softcap=0.5)
    weight = math.exp(0.5 * math.tanh(math.log(2) / 0.5))
    expected = torch.tensor((3 + 6 * weight) / (1 + weight))
    torch.testing.assert_close(capped[0, 0, 1, 0], expected)


def test_heads_share_keys_in_blocks():
    torch.manual_seed(0)
    query, key, value = randn(2, 6, 3, 4), randn(2, 2, 3, 4), randn(2, 2, 3, 4)
    output = attention(query, key, value, scale=0.3)
    for h in range(6):
        expected = one_row(query[1, h, 1], key[1, h // 3, :2], value[1, h // 3, :2], 0.3)
        torch.testing.assert_close(output[1, h, 1], expected)


def test_padding_on_either_side_and_the_last_query_at_the_last_key():
    torch.manual_seed(1)
    query, key, value = randn(3, 1, 2, 4), randn(3, 1, 6, 4), randn(3, 1, 6, 4)
    start, end = torch.tensor([2, 0, 3]), torch.tensor([6, 4, 3])
    key[0, :, :2] = value[0, :, :2] = NAN
    key[1, :, 4:] = value[1, :, 4:] = NAN
    for x in (query, key, value):
        x.requires_grad_()
    output = attention(query, key, value, key_start=start, key_end=end)
    for row, i, keys in [
        (0, 0, [2, 3, 4]),
        (0, 1, [2, 3, 4, 5]),
        (1, 0, [0, 1, 2]),
        (1, 1, [0, 1, 2, 3]),
    ]:
        expected = one_row(query[row, 0, i], key[row, 0, keys], value[row, 0, keys], 0.5)
        torch.testing.assert_close(output[row, 0, i], expected)
    assert (output[2] == 0).all()
    output.sum().backward()
    for x in (query, key, value):
        assert x.grad.isfinite().all()
    assert (query.grad[2] == 0).all() and (value.grad[0, :, :2] == 0).all()

    both = attention(query, key, value, causal=False, key_start=start, key_end=end)
    expected = one_row(query[1, 0, 0], key[1, 0, :4], value[1, 0, :4], 0.5)
    torch.testing.assert_close(both[1, 0, 0], expected)


def test_queries_before_the_first_key_give_zero():
    torch.manual_seed(0)
    query, key = randn(1, 1, 4, 2), randn(1, 1, 2, 2)  # queries 2 and 3 stand at the keys
    output = attention(query, key, key)
    assert (output[0, 0, :2] == 0).all()
    torch.testing.assert_close(output[0, 0, 2], key[0, 0, 0])


def test_window_counts_the_query_itself():
    torch.manual_seed(0)
    query, key, value = randn(1, 1, 5, 4), randn(1, 1, 5, 4), randn(1, 1, 5, 4)
    output = attention(query, key, value, window=2)
    torch.testing.assert_close(output[0, 0, 0], value[0, 0, 0])
    expected = one_row(query[0, 0, 4], key[0, 0, 3:], value[0, 0, 3:], 0.5)
    torch.testing.assert_close(output[0, 0, 4], expected)


# A tree of depth 3 with an empty segment, before a second root:
# 0 -> 1 -> 2, 3 (empty) -> 4;  0 -> 5;  6
LENGTHS, PREFIX = [4, 2, 3, 0, 2, 3, 3], [-1, 0, 1, 1, 3, 0, -1]
LEAF_PATHS = [[0, 1, 2], [0, 1, 3, 4], [0, 5], [6]]


def tree(lengths=LENGTHS):
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    return PackedLayout(cu_seqlens, torch.tensor(PREFIX, dtype=torch.int32))


@pytest.mark.parametrize("options", [{}, {"window": 3}, {"softcap": 0.8, "scale": 1.1}])
def test_layout_is_attention_on_unshared_copies(options):
    torch.manual_seed(3)
    layout = tree()
    n = layout.num_tokens
    inputs = [randn(1, heads, n, 4).requires_grad_() for heads in (4, 2, 2)]
    weight = randn(1, 4, n, 4)
    output = attention(*inputs, layout=layout, **options)
    shared = torch.autograd.grad((output * weight).sum(), inputs)

    bounds = layout.cu_seqlens.tolist()
    loss, seen = 0.0, torch.zeros(n, dtype=torch.bool)
    for path in LEAF_PATHS:
        index = torch.cat([torch.arange(bounds[s], bounds[s + 1]) for s in path])
        copy = attention(*(x[:, :, index] for x in inputs), **options)
        torch.testing.assert_close(output[:, :, index], copy)
        first_copy = ~seen[index]  # a shared token's output counts once
        loss = loss + (copy * weight[:, :, index])[:, :, first_copy].sum()
        seen[index] = True
    assert seen.all()
    torch.testing.assert_close(shared, torch.autograd.grad(loss, inputs))


def test_completions_do_not_see_each_other():
    tokens = [torch.zeros(n, dtype=torch.int64) for n in (3, 2, 2)]
    layout = pack_groups([tokens[0]], [tokens[1:]]).layout
    torch.manual_seed(0)
    query, key, value = randn(1, 1, 7, 4), randn(1, 1, 7, 4), randn(1, 1, 7, 4)
    output = attention(query, key, value, layout=layout)
    keys = [0, 1, 2, 5, 6]
    expected = one_row(query[0, 0, 6], key[0, 0, keys], value[0, 0, keys], 0.5)
    torch.testing.assert_close(output[0, 0, 6], expected)


@pytest.mark.parametrize("options", [{"layout": tree([1] * 7)}, {"window": 2, "softcap": 1.0}])
def test_gradcheck(options):
    torch.manual_seed(0)
    n = 7 if "layout" in options else 4
    inputs = [randn(1, heads, n, 2).requires_grad_() for heads in (2, 1, 1)]
    assert torch.autograd.gradcheck(lambda *x: attention(*x, **options), inputs)


def test_gradcheck_with_padding():
    inputs = [randn(2, 2, 3, 2).requires_grad_() for _ in range(3)]
    ends = {"key_start": torch.tensor([1, 0]), "key_end": torch.tensor([3, 2])}
    assert torch.autograd.gradcheck(lambda *x: attention(*x, **ends), inputs)


def test_output_has_the_querys_dtype():
    torch.manual_seed(0)
    inputs = [torch.randn(1, 2, 5, 8).bfloat16() for _ in range(3)]
    output = attention(*inputs)
    assert output.dtype == torch.bfloat16
    exact = attention(*(x.double() for x in inputs))
    torch.testing.assert_close(output, exact.bfloat16(), rtol=2**-7, atol=1e-6)


@pytest.mark.parametrize(("queries", "keys"), [(0, 3), (3, 0)])
def test_empty(queries, keys):
    output = attention(randn(1, 2, queries, 4), randn(1, 1, keys, 4), randn(1, 1, keys, 4))
    assert output.shape == (1, 2, queries, 4) and (output == 0).all()


def test_layout_and_window_are_causal():
    x = randn(1, 1, sum(LENGTHS), 4)
    with pytest.raises(ValueError, match="attention: expected causal True with a layout"):
        attention(x, x, x, layout=tree(), causal=False)
    with pytest.raises(ValueError, match="attention: expected causal True with a window"):
        attention(x, x, x, window=2, causal=False)
