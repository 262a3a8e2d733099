import math

import pytest
import torch
from budget import assert_within_budget
from decode_inputs import BOUNDS, inputs

import fastrl
from fastrl import reference

NAN = float("nan")
FLOATS = [torch.float32, torch.bfloat16, torch.float16]


def double(arguments):
    return {k: x.double() if x.is_floating_point() else x for k, x in arguments.items()}


def assert_budget(arguments, **options):
    dtype = arguments["query"].dtype
    actual = fastrl.decode_attention(**arguments, return_lse=True, **options)
    eager = reference.decode_attention(**arguments, return_lse=True, **options)
    truth = reference.decode_attention(**double(arguments), return_lse=True, **options)
    assert actual[0].dtype == dtype and actual[1].dtype == eager[1].dtype
    assert_within_budget(actual[0], eager[0], truth[0], dtype)
    assert_within_budget(actual[1], eager[1], truth[1], eager[1].dtype)


OPTIONS = [{}, {"window": 9, "softcap": 2.0}, {"window": 1}, {"softcap": 50.0, "scale": 0.4}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize("prefixes", [0, 3])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_error_budget(any_kernel, dtype, prefixes, queries, options):
    arguments = inputs(any_kernel, 7, queries=queries, prefixes=prefixes, dtype=dtype)
    assert_budget(arguments, **options)


# One; less than a vector of any processor; just above one; the head sizes that models have.
@pytest.mark.parametrize("width", [1, 5, 33, 64, 80, 96, 112, 128, 256])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_widths(any_kernel, width, dtype):
    assert_budget(inputs(any_kernel, width=width, prefixes=2, queries=2, dtype=dtype))


# One key; a tile of the CPU's and its neighbours; more than a chunk of the GPU's and of the CPU's.
@pytest.mark.parametrize("keys", [1, 63, 64, 65, 300, 1300])
def test_lengths(any_kernel, keys):
    arguments = inputs(any_kernel, keys=keys, prefixes=2, shared=keys)
    for options in ({}, {"window": 70}):
        assert_budget(arguments, **options)


# As many heads of keys as of queries; one for all; groups of 7; more queries than go together.
@pytest.mark.parametrize("heads, queries", [((3, 3), 1), ((4, 1), 1), ((7, 1), 3), ((8, 1), 16)])
def test_heads_and_queries(any_kernel, heads, queries):
    arguments = inputs(any_kernel, 12, heads, queries, prefixes=2)
    for options in ({}, {"window": 5}):
        assert_budget(arguments, **options)


@pytest.mark.parametrize("left_out", [*BOUNDS, None])
def test_bounds_that_are_not_given(device, left_out):
    bounds = () if left_out is None else [name for name in BOUNDS if name != left_out]
    assert_budget(inputs(device, 6, prefixes=3, bounds=bounds))


def test_float64_on_a_cpu():
    for options in OPTIONS:
        arguments = double(inputs("cpu", keys=600, width=37, prefixes=2, queries=2))
        assert_budget(arguments, **options)


@pytest.mark.parametrize("sizes", [(0, 3, 2), (2, 0, 2), (2, 3, 0), (2, 0, 0)])
@pytest.mark.parametrize("queries", [0, 1])
def test_empty(device, sizes, queries):
    batch, keys, shared = sizes
    arguments = inputs(
        device, batch, queries=queries, keys=keys, prefixes=1, shared=shared, bounds=()
    )
    assert_budget(arguments)


def test_rows_without_keys_give_zero(any_kernel):
    arguments = inputs(any_kernel, queries=2, prefixes=2)
    zero = torch.zeros(4, dtype=torch.int32, device=any_kernel)
    arguments |= {"key_start": zero, "key_end": zero, "prefix_end": zero[:2]}
    output, lse = fastrl.decode_attention(**arguments, return_lse=True)
    assert (output == 0).all() and (lse == -math.inf).all()


def test_what_lies_beyond_the_ends_reaches_nothing(any_kernel):
    """NaN there, by `inputs`: the bits are those with zeros."""
    arguments = inputs(any_kernel, 7, queries=2, prefixes=3)
    clean = {k: x.nan_to_num(0.0) if x.is_floating_point() else x for k, x in arguments.items()}
    for options in OPTIONS:
        found = fastrl.decode_attention(**arguments, return_lse=True, **options)
        expected = fastrl.decode_attention(**clean, return_lse=True, **options)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        assert found[0].isfinite().all()


def test_nan_in_a_key_that_a_query_sees_is_not_hidden(any_kernel):
    arguments = inputs(any_kernel, bounds=())
    arguments["key"][1, 0, 7, 3] = NAN
    output = fastrl.decode_attention(**arguments)
    assert output[1, :2].isnan().all() and output[1, 2:].isfinite().all()
    assert output[[0, 2, 3]].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("queries", [1, 5])
def test_a_row_depends_neither_on_the_others_nor_on_who_shares_its_prefix(
    any_kernel, dtype, queries
):
    arguments = inputs(any_kernel, 40, (4, 2), queries, 600, 48, 3, 700, dtype=dtype)
    rows = arguments["prefix_cu_rows"].tolist()
    for options in ({}, {"window": 650, "softcap": 3.0}):
        together = fastrl.decode_attention(**arguments, return_lse=True, **options)
        for p in range(3):
            for b in {rows[p], rows[p + 1] - 1} & {*range(rows[p], rows[p + 1])}:
                alone = {k: x[b : b + 1].clone() for k, x in arguments.items() if k in OF_A_ROW}
                alone |= {
                    k: arguments[k][p : p + 1].clone()
                    for k in ("prefix_key", "prefix_value", "prefix_end")
                }
                found = fastrl.decode_attention(**alone, return_lse=True, **options)
                assert all(torch.equal(x[0], y[b]) for x, y in zip(found, together, strict=True))


OF_A_ROW = ("query", "key", "value", "key_start", "key_end")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_row_depends_neither_on_threads_nor_on_room_in_its_cache(device, dtype):
    arguments = inputs(device, 9, keys=1300, width=40, prefixes=2, shared=900, dtype=dtype)
    expected = fastrl.decode_attention(**arguments)
    threads = torch.get_num_threads()
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        assert torch.equal(fastrl.decode_attention(**arguments), expected)
    torch.set_num_threads(threads)
    for name in ("key", "value", "prefix_key", "prefix_value"):
        arguments[name] = torch.nn.functional.pad(arguments[name], (0, 0, 0, 300), value=NAN)
    assert torch.equal(fastrl.decode_attention(**arguments), expected)


def test_where_a_cache_stands_and_its_strides_do_not_matter(device):
    arguments = inputs(device, queries=3, width=24, prefixes=2)
    expected = fastrl.decode_attention(**arguments)

    def transposed(x):  # [B, T, H, D], as models make them
        return x.transpose(1, 2).contiguous().transpose(1, 2)

    def inside(x):  # a slice of something larger, at an odd address
        whole = torch.full((*x.shape[:-1], x.shape[-1] + 5), NAN, dtype=x.dtype, device=x.device)
        whole[..., 1:-4] = x
        return whole[..., 1:-4]

    def sparse(x):
        return x.repeat_interleave(2, dim=-1)[..., ::2]

    for change in (transposed, inside, sparse):
        moved = {k: change(x) if x.dim() == 4 else x for k, x in arguments.items()}
        assert torch.equal(fastrl.decode_attention(**moved), expected)
    for name in BOUNDS:
        arguments[name] = arguments[name].repeat_interleave(2)[::2]
    assert torch.equal(fastrl.decode_attention(**arguments), expected)
