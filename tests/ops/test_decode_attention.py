import math

import pytest
import torch
import torch._dynamo.testing
from budget import assert_within_budget

import fastrl
from fastrl import reference

NAN = float("nan")
FLOATS = [torch.float32, torch.bfloat16, torch.float16]
BOUNDS = ("key_start", "key_end", "prefix_end", "prefix_cu_rows")


def inputs(
    device, batch=4, heads=(4, 2), queries=1, keys=40, width=16, prefixes=0, shared=24,
    dtype=torch.float32, bounds=BOUNDS, seed=0,
):  # fmt: skip
    """Arguments of a call, with NaN in each key that does not exist. prefixes 0: no prefix."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    def ends(most, count):
        return torch.randint(most + 1, (count,), generator=generator, dtype=torch.int32)

    arguments = {
        "query": 1.5 * normal(batch, heads[0], queries, width),
        "key": normal(batch, heads[1], keys, width),
        "value": normal(batch, heads[1], keys, width),
    }
    given = {"key_end": ends(keys, batch)}
    given["key_start"] = given["key_end"] // 3
    if prefixes:
        arguments["prefix_key"] = normal(prefixes, heads[1], shared, width)
        arguments["prefix_value"] = normal(prefixes, heads[1], shared, width)
        given["prefix_end"] = ends(shared, prefixes)
        given["prefix_cu_rows"] = torch.cat(
            [ends(0, 1), ends(batch, prefixes - 1).sort().values, ends(0, 1) + batch]
        )
    arguments |= {name: x for name, x in given.items() if name in bounds}
    for kind, first, last in (("", "key_start", "key_end"), ("prefix_", None, "prefix_end")):
        for name in (f"{kind}key", f"{kind}value"):
            for b, x in enumerate(arguments.get(name, ())):
                x[:, : arguments[first][b] if first in arguments else 0] = NAN
                x[:, arguments[last][b] if last in arguments else x.shape[1] :] = NAN
    return {name: x.to(device) for name, x in arguments.items()}


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


def test_decoding_into_a_cache_is_attention_over_the_whole_rows(device):
    """Step by step, the cache written in place, rows that end early keep their last result."""
    torch.manual_seed(0)
    batch, steps, prompt = 6, 5, 7
    q, k, v = (torch.randn(batch, h, prompt + steps, 8, device=device) for h in (4, 2, 2))
    for x in (k, v):
        x[:, :, :prompt] = x[::3, :, :prompt].repeat_interleave(3, dim=0)
    key, value = (torch.full((batch, 2, steps, 8), NAN, device=device) for _ in range(2))
    key_end = torch.zeros(batch, dtype=torch.int32, device=device)
    expected = reference.attention(q, k, v)
    for step in range(steps):
        key[:, :, step], value[:, :, step] = k[:, :, prompt + step], v[:, :, prompt + step]
        key_end += 1
        output = fastrl.decode_attention(
            q[:, :, prompt + step : prompt + step + 1], key, value, key_end=key_end,
            prefix_key=k[::3, :, :prompt], prefix_value=v[::3, :, :prompt],
        )  # fmt: skip
        torch.testing.assert_close(output[:, :, 0], expected[:, :, prompt + step])


def test_opcheck(device):
    for prefixes in (0, 2):
        given = inputs(device, prefixes=prefixes)
        names = ("query", "key", "value", "key_start", "key_end", "prefix_key", "prefix_value")
        tensors = [given.get(name) for name in (*names, *BOUNDS[2:])]
        op = torch.ops.fastrl.decode_attention.default
        torch.library.opcheck(op, (*tensors, 0.25, None if prefixes else 7, 3.0))


def test_compiles_without_a_break_and_once_for_all_steps(device):
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    @torch.compile(backend=counter, fullgraph=True)
    def step(arguments):
        return 2 * fastrl.decode_attention(**arguments, window=30)

    for seed in range(4):  # other bounds, and other rows for each prefix
        arguments = inputs(device, prefixes=2, seed=seed)
        expected = 2 * fastrl.decode_attention(**arguments, window=30)
        assert torch.equal(step(arguments), expected)
    assert counter.frame_count == 1


def wrong(message, error=ValueError, **changes):
    return pytest.param(changes, error, message, id=message)


MESSAGES = [
    wrong("expected query as a tensor, got list", TypeError, query=[1.0]),
    wrong("expected key of dtype float32, got torch.float16", TypeError, key=lambda x: x.half()),
    wrong("expected query of dtype .*, got torch.int64", TypeError, query=lambda x: x.long()),
    wrong(r"expected query \[B, Hq, T, D\], got \(4, 4, 16\)", query=lambda x: x[:, :, 0]),
    wrong(r"expected key \[B = 4, Hkv, S, D = 16\], got \(3, 2, 40, 16\)", key=lambda x: x[:3]),
    wrong(r"expected value \[B = 4, Hkv = 2, S, D = 16\]", value=lambda x: x[:, :1]),
    wrong(r"expected value \(4, 2, 40, 16\) like key", value=lambda x: x[:, :, 1:]),
    wrong("expected Hq = 3 heads of queries as a multiple of Hkv", query=lambda x: x[:, :3]),
    wrong("expected prefix_key and prefix_value together", prefix_value=None),
    wrong(r"expected prefix_key \[P, Hkv = 2, Sp, D = 16\]", prefix_key=lambda x: x[..., 1:]),
    wrong(r"expected prefix_value .* like prefix_key", prefix_value=lambda x: x[:, :, 1:]),
    wrong("expected key_end of dtype int32, got torch.int64", TypeError,
          key_end=lambda x: x.long()),
    wrong(r"expected key_end \(4,\), got \(3,\)", key_end=lambda x: x[:3]),
    wrong(r"expected key_end in \[0, 40\], got 41", key_end=lambda x: x * 0 + 41),
    wrong(r"expected key_start in \[0, 40\], got -1", key_start=lambda x: x * 0 - 1),
    wrong("expected key_start <= key_end", key_start=lambda x: x * 0 + 40),
    wrong(r"expected prefix_end in \[0, 24\], got 25", prefix_end=lambda x: x * 0 + 25),
    wrong(r"expected prefix_cu_rows \(3,\), got \(2,\)", prefix_cu_rows=lambda x: x[1:]),
    wrong("expected prefix_cu_rows from 0 to B = 4, got from 0 to 3", prefix_cu_rows=[0, 2, 3]),
    wrong(r"expected prefix_cu_rows that rise, got \[5, 4\] at 1", prefix_cu_rows=[0, 5, 4]),
    wrong("expected prefix_key with prefix_end, got None", prefix_key=None, prefix_value=None),
    wrong("expected scale as a number, got str", TypeError, scale="1"),
    wrong("expected window >= 1, got 0", window=0),
    wrong("expected softcap > 0 and finite, got 0", softcap=0.0),
    wrong("expected key without gradient, got requires_grad=True. Use attention",
          key=lambda x: x.requires_grad_()),
]  # fmt: skip


@pytest.mark.parametrize("changes, error, message", MESSAGES)
def test_messages(changes, error, message):
    arguments = inputs("cpu", prefixes=2)
    for name, change in changes.items():
        if callable(change):
            change = change(arguments[name])
        if name == "prefix_cu_rows" and isinstance(change, list):
            change = torch.tensor(change, dtype=torch.int32)
        arguments[name] = change
    with pytest.raises(error, match=f"decode_attention: {message}"):
        fastrl.decode_attention(**arguments)


def test_prefixes_that_rows_cannot_share_evenly():
    arguments = inputs("cpu", prefixes=3)
    del arguments["prefix_cu_rows"]
    with pytest.raises(ValueError, match="expected B a multiple of the number of prefixes"):
        fastrl.decode_attention(**arguments)


def test_without_grad_mode_a_parameters_output_is_welcome():
    arguments = inputs("cpu")
    arguments["query"].requires_grad_()
    with torch.no_grad():
        output = fastrl.decode_attention(**arguments)
    assert not output.requires_grad and output.isfinite().all()


def test_the_compiled_module_reads_no_foreign_memory_whatever_it_is_given():
    """What the checks above refuse, as a compiled graph passes it: there nobody looks inside."""
    arguments = inputs("cpu", prefixes=2)
    tensors = [arguments[n] for n in ("query", "key", "value")]
    prefix = [arguments[n] for n in ("prefix_key", "prefix_value")]
    wild = torch.tensor([-5, 2**31 - 1, -(2**31), 41], dtype=torch.int32)
    op = torch.ops.fastrl.decode_attention.default
    op(*tensors, wild, wild.flip(0), *prefix, wild[:2], None, 0.25, None, None)
    for rows in ([0, 5, 4], [-1, 2, 4], [0, 2, 5], [1, 2, 4]):
        bounds = torch.tensor(rows, dtype=torch.int32)
        with pytest.raises(RuntimeError, match="prefix_cu_rows must rise from 0 to the batch"):
            op(*tensors, None, None, *prefix, None, bounds, 0.25, None, None)
