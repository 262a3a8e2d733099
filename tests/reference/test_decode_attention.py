import math

import pytest
import torch

from fastrl.reference import attention, decode_attention

NAN = float("nan")


def randn(*shape):
    return torch.randn(shape, dtype=torch.float64)


def int32(*numbers):
    return torch.tensor(numbers, dtype=torch.int32)


def test_by_hand():
    """Two rows on one prefix: scores log 2 times 0, 1 of the prefix and 2, 3 of a row."""
    query = torch.full((2, 1, 1, 1), math.log(2))
    prefix_key, prefix_value = torch.tensor([[[[0.0], [1.0]]]]), torch.tensor([[[[3.0], [6.0]]]])
    key = torch.tensor([[[[2.0], [3.0]]], [[[3.0], [NAN]]]])
    value = torch.tensor([[[[9.0], [0.0]]], [[[1.0], [NAN]]]])
    prefix = {"prefix_key": prefix_key, "prefix_value": prefix_value}
    output, lse = decode_attention(
        query, key, value, key_end=int32(2, 1), return_lse=True, **prefix
    )
    expected = [(3 + 12 + 36 + 0) / (1 + 2 + 4 + 8), (3 + 12 + 8) / (1 + 2 + 8)]
    torch.testing.assert_close(output.flatten(), torch.tensor(expected))
    torch.testing.assert_close(lse.flatten(), torch.tensor([15.0, 11.0]).log())
    output = decode_attention(query, key, value, key_end=int32(2, 0), window=3, **prefix)
    expected = [(12 + 36) / (2 + 4 + 8), (3 + 12) / (1 + 2)]
    torch.testing.assert_close(output.flatten(), torch.tensor(expected))
    output = decode_attention(query, key, value, key_end=int32(2, 1), prefix_end=int32(1), **prefix)
    expected = [(3 + 36) / (1 + 4 + 8), (3 + 8) / (1 + 8)]
    torch.testing.assert_close(output.flatten(), torch.tensor(expected))
    output = decode_attention(query, key, value, key_start=int32(1, 0), key_end=int32(2, 1))
    torch.testing.assert_close(output.flatten(), torch.tensor([0.0, 1.0]))


OPTIONS = [{}, {"window": 3}, {"window": 1}, {"softcap": 0.7, "scale": 1.3}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("queries", [1, 3])
def test_is_attention_on_a_copy_of_the_prefix_before_the_rows_own_keys(options, queries):
    torch.manual_seed(0)
    starts, ends, lengths, rows = [0, 2, 1, 4, 0], [5, 5, 1, 6, 0], [4, 2, 0], [0, 2, 2, 5]
    query, key, value = randn(5, 4, queries, 8), randn(5, 2, 6, 8), randn(5, 2, 6, 8)
    shared_key, shared_value = randn(3, 2, 4, 8), randn(3, 2, 4, 8)
    for x, y in ((key, shared_key), (value, shared_value)):
        for b in range(5):
            x[b, :, : starts[b]] = x[b, :, ends[b] :] = NAN
        for p in range(3):
            y[p, :, lengths[p] :] = NAN
    output, lse = decode_attention(
        query, key, value, key_start=int32(*starts), key_end=int32(*ends), prefix_key=shared_key,
        prefix_value=shared_value, prefix_end=int32(*lengths), prefix_cu_rows=int32(*rows),
        return_lse=True, **options,
    )  # fmt: skip
    for b, p in enumerate([0, 0, 2, 2, 2]):
        own, shared = slice(starts[b], ends[b]), slice(0, lengths[p])
        k, v = (
            torch.cat([y[p, :, shared], x[b, :, own]], dim=1)[None]
            for x, y in ((key, shared_key), (value, shared_value))
        )
        expected = attention(query[b : b + 1], k, v, return_lse=True, **options)
        torch.testing.assert_close(output[b : b + 1], expected[0])
        torch.testing.assert_close(lse[b : b + 1], expected[1])
    for b in (2, 4):  # no keys of their own, and an empty prefix
        assert (output[b] == 0).all() and (lse[b] == -torch.inf).all()


def test_rows_share_prefixes_evenly_by_default():
    torch.manual_seed(0)
    query, key, prefix = randn(6, 2, 1, 4), randn(6, 1, 3, 4), randn(2, 1, 5, 4)
    shared = {"prefix_key": prefix, "prefix_value": prefix}
    output = decode_attention(query, key, key, **shared)
    expected = decode_attention(query, key, key, prefix_cu_rows=int32(0, 3, 6), **shared)
    assert torch.equal(output, expected)
    one = {"prefix_key": prefix[1:], "prefix_value": prefix[1:]}
    torch.testing.assert_close(output[3:], decode_attention(query[3:], key[3:], key[3:], **one))


@pytest.mark.parametrize("shape", [(0, 3, 2), (2, 0, 2), (2, 3, 0), (2, 0, 0)])
def test_empty(shape):
    batch, num_keys, num_shared = shape
    key, prefix = randn(batch, 1, num_keys, 4), randn(min(batch, 1), 1, num_shared, 4)
    output = decode_attention(
        randn(batch, 2, 1, 4), key, key, prefix_key=prefix, prefix_value=prefix
    )
    assert output.shape == (batch, 2, 1, 4) and output.isfinite().all()
    if num_keys + num_shared == 0:
        assert (output == 0).all()


def test_sixteen_bits_are_computed_in_float32():
    torch.manual_seed(0)
    query, key, prefix = (randn(*s).bfloat16() for s in ((2, 2, 1, 8), (2, 1, 9, 8), (1, 1, 7, 8)))
    shared = {"prefix_key": prefix, "prefix_value": prefix}
    output, lse = decode_attention(query, key, key, return_lse=True, **shared)
    assert output.dtype == torch.bfloat16 and lse.dtype == torch.float32
    wide = {name: x.double() for name, x in shared.items()}
    exact = decode_attention(query.double(), key.double(), key.double(), **wide)
    torch.testing.assert_close(output, exact.bfloat16(), rtol=2**-7, atol=1e-6)
