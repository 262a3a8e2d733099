"""The launcher in Triton's interpreter against the definition, and what it makes Triton compile."""

import itertools

import pytest
import torch
from budget import assert_within_budget

from fastrl import reference

MODULE = "fastrl.kernels.decode_attention"
NAN = float("nan")
OWN_CHUNK, PREFIX_CHUNK = 256, 512  # a test below holds them against the kernels' own
NAMES = ("query", "key", "value", "key_start", "key_end", "prefix_key", "prefix_value")
NAMES += ("prefix_end", "prefix_cu_rows")


@pytest.fixture
def ours(interpreted):
    def run(arguments, *, scale=None, window=None, softcap=None):
        scale = arguments["query"].shape[-1] ** -0.5 if scale is None else scale
        given = [arguments.get(name) for name in NAMES]
        return interpreted(MODULE, "decode_attention", *given, scale, window, softcap)

    return run


def int32(numbers):
    return torch.tensor(numbers, dtype=torch.int32)


def inputs(
    ends, heads=(2, 1), queries=1, keys=20, width=16, starts=None, lengths=(), rows=None, shared=0,
    dtype=torch.float32,
):  # fmt: skip
    """Rows with keys from starts to ends, and prefixes of these lengths; NaN in other keys."""
    batch = len(ends)
    arguments = {
        "query": 1.5 * torch.randn(batch, heads[0], queries, width).to(dtype),
        "key": torch.randn(batch, heads[1], keys, width).to(dtype),
        "value": torch.randn(batch, heads[1], keys, width).to(dtype),
        "key_end": int32(ends),
    }
    if starts is not None:
        arguments["key_start"] = int32(starts)
    for name in ("key", "value"):
        for x, start, end in zip(arguments[name], starts or [0] * batch, ends, strict=True):
            x[:, :start] = x[:, end:] = NAN
    if lengths:
        for name in ("prefix_key", "prefix_value"):
            x = torch.randn(len(lengths), heads[1], shared, width).to(dtype)
            for p, length in enumerate(lengths):
                x[p, :, length:] = NAN
            arguments[name] = x
        arguments["prefix_end"] = int32(lengths)
    if rows is not None:
        arguments["prefix_cu_rows"] = int32(rows)
    return arguments


CASES = {
    "caches alone": dict(ends=[20, 7, 1, 0], heads=(4, 2), starts=[3, 2, 0, 0]),
    "chunks, the second with one key": dict(ends=[OWN_CHUNK + 1, OWN_CHUNK], keys=300),
    "a chunk that starts late": dict(ends=[300], starts=[20], keys=300, queries=2),
    "one prefix": dict(ends=[3, 5], lengths=[40], shared=50),
    "prefixes of uneven groups, two of them empty": dict(
        ends=[3, 0, 5, 8, 1], lengths=[9, 24, 3, 30, 0], rows=[0, 0, 2, 2, 4, 5], shared=30,
        queries=2,
    ),
    "prefixes evenly": dict(ends=[1, 2, 3, 4], lengths=[24, 5], shared=24, width=33),
    "a prefix of chunks": dict(ends=[4, 2], lengths=[PREFIX_CHUNK + 40], shared=600, heads=(1, 1)),
    "more rows than a tile takes": dict(ends=[1] * 9, lengths=[6, 20], rows=[0, 7, 9], shared=20,
                                        heads=(3, 1), queries=4, keys=2),
    "more queries a row than a tile takes": dict(ends=[9, 20], heads=(5, 1), queries=14),
    "no room for keys": dict(ends=[0, 0], lengths=[4], shared=5, keys=0),
    "no keys at all": dict(ends=[0, 0], lengths=[0], shared=0, keys=0),
    "no rows": dict(ends=[], lengths=[0], shared=3),
}  # fmt: skip


def double(arguments):
    return {k: x.double() if x.is_floating_point() else x for k, x in arguments.items()}


@pytest.mark.parametrize("case", CASES)
def test_error_budget(ours, case):
    arguments = inputs(**CASES[case])
    for options in ({}, {"window": 9, "softcap": 2.0}, {"softcap": 1e4}):
        eager = reference.decode_attention(**arguments, return_lse=True, **options)
        truth = reference.decode_attention(**double(arguments), return_lse=True, **options)
        for parts in zip(ours(arguments, **options), eager, truth, strict=True):
            assert_within_budget(*parts, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("width", [1, 80, 130])
def test_sixteen_bits_and_widths(ours, width, dtype):
    arguments = inputs([8, 2], lengths=[20], shared=20, width=width, dtype=dtype)
    eager = reference.decode_attention(**arguments, return_lse=True, scale=0.2)
    truth = reference.decode_attention(**double(arguments), return_lse=True, scale=0.2)
    found = ours(arguments, scale=0.2)
    assert_within_budget(found[0], eager[0], truth[0], dtype)
    assert_within_budget(found[1], eager[1], truth[1], torch.float32)


def test_a_row_depends_neither_on_the_others_nor_on_who_shares_its_prefix(ours):
    arguments = inputs(
        [300, 4, 20, 20, 7, 0], keys=300, lengths=[9, 540], rows=[0, 2, 6], shared=540, width=24,
        queries=2, dtype=torch.float16,
    )  # fmt: skip
    for options in ({}, {"window": 535}):
        together = ours(arguments, **options)
        for b, p in ((0, 0), (3, 1)):
            own = {k: arguments[k][b : b + 1] for k in ("query", "key", "value", "key_end")}
            shared = {
                k: arguments[k][p : p + 1] for k in ("prefix_key", "prefix_value", "prefix_end")
            }
            alone = ours(own | shared, **options)
            assert all(torch.equal(x[0], y[b]) for x, y in zip(alone, together, strict=True))


def test_strides(ours):
    arguments = inputs([8, 2], heads=(4, 2), queries=3, lengths=[20], shared=20)
    expected = ours(arguments)
    moved = {
        k: x.transpose(1, 2).contiguous().transpose(1, 2) if x.dim() == 4 else x
        for k, x in arguments.items()
    }
    assert all(torch.equal(a, b) for a, b in zip(ours(moved), expected, strict=True))
    for name in ("value", "prefix_value", "query"):  # each in its own way
        found = ours(arguments | {name: moved[name]})
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_bounds_out_of_range_are_moved_into_it(ours):
    arguments = inputs([20, 20, 20], keys=20, lengths=[10, 10], shared=10, rows=[0, 1, 3])
    expected = ours(arguments)
    wild = {"key_end": int32([21, 2**31 - 1, 20]), "key_start": int32([0, -7, -(2**31)])}
    wild |= {"prefix_end": int32([11, 10**9]), "prefix_cu_rows": int32([-4, 1, 77])}
    found = ours(arguments | wild)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    ours(arguments | {"prefix_cu_rows": int32([3, -9, 1])})  # no meaning; it reads nothing foreign


def test_each_configuration_that_ships_is_compiled(recorded):
    from fastrl.kernels.decode_attention import config_for

    reached, shipped = set(), set()
    for request in recorded[90]:
        if "decode_attention_chunk" in request.name:
            block_d = request.named_constants["BLOCK_D"]
            size = 4 if "*fp32" == request.signature["query_ptr"] else 2
            names = ("BLOCK_M", "BLOCK_N", "STAGES")
            config = [request.named_constants[name] for name in names]
            reached.add((size, block_d, *config, request.options["num_warps"]))
    for size, few, block_d in itertools.product((2, 4), (16, 17), (32, 64, 128, 256)):
        if size == 4 and block_d == 32:
            continue  # as 64
        names = ("BLOCK_M", "BLOCK_N", "num_stages", "num_warps")
        config = config_for(size, few, block_d)
        shipped.add((size, block_d, *(config[name] for name in names)))
    assert shipped <= reached


def test_neither_rows_nor_lengths_nor_groups_make_a_new_kernel():
    pytest.importorskip("triton")
    from ahead_of_time import record

    from fastrl.kernels.decode_attention import decode_attention

    def keys(batch, queries, num_keys, prefixes, shared, dtype=torch.float32):
        query = torch.empty(batch, 8, queries, 64, dtype=dtype)
        key = torch.empty(batch, 2, num_keys, 64, dtype=dtype)
        prefix = torch.empty(prefixes, 2, shared, 64, dtype=dtype)
        row = torch.empty(batch + 1, dtype=torch.int32)[1:]  # off 16-byte bounds
        bounds = (torch.empty(prefixes, dtype=torch.int32), torch.empty(prefixes + 1).int())
        call = (query, key, key, None, row, prefix, prefix, *bounds, 1.0, None, None)
        return tuple(request.key for request in record(90, decode_attention, *call))

    sizes = itertools.product((1, 16, 17), (1, 3), (1, 256, 4097), (2, 16), (1, 4097))
    assert len({keys(*size) for size in sizes}) == 1
    # Of 16 bits the block does follow from the queries a row.
    assert len({keys(batch, 1, 256, 2, 512, torch.bfloat16) for batch in (1, 3, 40)}) == 1


def test_keys_are_read_16_bytes_at_a_time_and_ahead_of_their_use(compiled):
    """Also those of a prefix that was searched for."""
    kinds = set()
    for kernel in compiled:
        constants = kernel.request.named_constants
        if "decode_attention_chunk" in kernel.name and constants["D"] == 128:
            # Of keys and of values, before the loop and in it.
            assert kernel.ptx.count("cp.async.cg.shared.global") >= 4, kernel.request
            kinds.add((constants["PREFIX"], constants["SEARCH"] > 0))
    assert {(True, True), (False, False)} <= kinds


def test_the_sizes_above_are_the_kernels():
    kernels = pytest.importorskip(MODULE)
    assert (kernels.OWN_CHUNK, kernels.PREFIX_CHUNK) == (OWN_CHUNK, PREFIX_CHUNK)
