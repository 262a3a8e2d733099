"""decode_attention as it is called: step by step, compiled, and wrongly."""

import pytest
import torch
import torch._dynamo.testing
from decode_inputs import BOUNDS, NAN, inputs
from torch import library

import fastrl
from fastrl import reference


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
        library.opcheck(op, (*tensors, 0.25, None if prefixes else 7, 3.0))


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
    found = op(*tensors, wild, wild.flip(0), *prefix, wild[:2], None, 0.25, None, None)
    start, end, shared = (
        x.clamp(0, n) for x, n in ((wild, 40), (wild.flip(0), 40), (wild[:2], 24))
    )
    bounds = (start.minimum(end), end)  # moved into their range, a row that ends before it starts
    given = (*tensors, *bounds, *prefix, shared, None, 0.25, None, None)
    for x, y in zip(found, op(*given), strict=True):
        assert torch.equal(x.nan_to_num(7.0), y.nan_to_num(7.0))
    for rows in ([0, 5, 4], [-1, 2, 4], [0, 2, 5], [1, 2, 4]):
        bounds = torch.tensor(rows, dtype=torch.int32)
        with pytest.raises(RuntimeError, match="prefix_cu_rows must rise from 0 to the batch"):
            op(*tensors, None, None, *prefix, None, bounds, 0.25, None, None)
