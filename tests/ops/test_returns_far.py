"""Returns of rows and batches that several threads share: against float64 and row by row, and what
the recursion hands on over factors of 0 and over products that are next to it."""

import math
from contextlib import contextmanager

import pytest
import torch
from budget import TOLERANCE
from returns_cases import INPUTS, OPS, call, case, on_tensors, outputs_and_gradients

import fastrl
from fastrl import reference

every_op = pytest.mark.parametrize("op", OPS)
CHUNK = 16384  # kRowChunk of csrc/cpu/returns_kernels.h


@contextmanager
def threads(count):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@every_op
def test_sixteen_bits_are_what_their_float32_is(op):
    """Bit for bit: no arithmetic is done in them."""
    for dtype in (torch.bfloat16, torch.float16):
        arguments = case(op, "bootstrap_value terminated", (3, 41), dtype)
        wide = on_tensors(lambda x: x.float() if x.is_floating_point() else x, arguments)
        upstream = torch.randn(2, 3, 41)
        found = outputs_and_gradients(fastrl, op, arguments, upstream)
        expected = outputs_and_gradients(fastrl, op, wide, upstream)
        for actual, exact in zip(found, expected, strict=True):
            assert torch.equal(actual, exact.to(actual.dtype))


LONG = [(op, 2 * CHUNK + 77) for op in OPS]


@pytest.mark.parametrize(
    "op, steps",
    [("vtrace", CHUNK + 333), *(pytest.param(*x, marks=pytest.mark.slow) for x in LONG)],
)
def test_long_rows_and_their_gradients_are_exact(op, steps):
    """Cut into chunks, which threads compose: against the definition in float64."""
    shape = (steps,)
    arguments = case(op, "bootstrap_value mask terminated", shape, torch.float32)
    arguments["terminated"] &= torch.rand(shape) < 0.01  # chunks are handed something on
    upstream = torch.randn(2, *shape)
    with threads(3):
        found = outputs_and_gradients(fastrl, op, arguments, upstream)
    wide = on_tensors(lambda x: x.double() if x.is_floating_point() else x, arguments)
    truth = outputs_and_gradients(reference, op, wide, upstream)
    for actual, exact in zip(found, truth, strict=True):
        error = (actual.double() - exact).abs().max() / exact.abs().max()
        assert error < TOLERANCE[torch.float32]


@every_op
def test_many_short_segments_are_each_by_itself(op):
    """Threads divide the steps, and take whole segments: some of none stand at their borders."""
    lengths = torch.randint(0, 9, (25_000,), generator=torch.Generator().manual_seed(1))
    lengths[12_000:12_600] = 0
    bounds = torch.cat([torch.zeros(1), lengths.cumsum(0)]).int()
    N = int(bounds[-1])
    arguments = case(op, "", (N,), torch.float32) | {"cu_seqlens": bounds}
    arguments["bootstrap_value"] = torch.randn(len(lengths))
    arguments["mask"] = torch.rand(N) < 0.8
    upstream = torch.randn(2, N)
    results = []
    for count in (1, 2, 3):
        with threads(count):
            results.append(outputs_and_gradients(fastrl, op, arguments, upstream))
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))
    # As rows of one length, each with its padding masked.
    t = torch.arange(8)
    exists = t < lengths[:, None]
    at = (bounds[:-1, None] + t).clamp(max=N - 1)
    dense = {name: arguments[name][at] for name in INPUTS[op]}
    dense = arguments | dense | {"mask": arguments["mask"][at] & exists}
    del dense["cu_seqlens"]
    expected = outputs_and_gradients(fastrl, op, dense, upstream[:, at] * exists)
    for packed, rows in zip(results[0], expected, strict=True):
        assert torch.equal(packed, rows if packed.shape == rows.shape else rows[exists])


@pytest.mark.parametrize("gamma", [1e-60, 1e-200, 5e-324])
@pytest.mark.parametrize("shape", [(5 * CHUNK,), (3, 5 * CHUNK)])
def test_a_product_too_small_for_a_double_is_no_cut(shape, gamma):
    """Of eight factors it is 0, in chunks that are composed before it is known what follows."""
    rewards = torch.zeros(shape)
    rewards[..., -1] = math.nan
    side_by_side = rewards.movedim(-1, 0).contiguous().movedim(0, -1)
    for count in (1, 2, 3):
        with threads(count):
            for x in (rewards, side_by_side):
                assert fastrl.discounted_returns(x, gamma=gamma).isnan().all()


@pytest.mark.parametrize("shape", [(5 * CHUNK,), (3, 5 * CHUNK)])
def test_a_termination_is_a_cut_wherever_it_stands(shape):
    rewards, terminated = torch.zeros(shape), torch.zeros(shape, dtype=torch.bool)
    rewards[..., -1] = math.nan
    terminated[..., 2 * CHUNK + 5] = True
    for count in (1, 2, 3):
        with threads(count):
            found = fastrl.discounted_returns(rewards, gamma=1e-60, terminated=terminated)
            assert not found[..., : 2 * CHUNK + 6].any()
            assert found[..., 2 * CHUNK + 6 :].isnan().all()


RATES_OF_NONE = {
    "discounted_returns": ("gamma",),
    "gae": ("gamma", "gae_lambda"),
    "lambda_returns": ("gamma", "gae_lambda"),
    "retrace_returns": ("gamma", "gae_lambda", "c_clip"),
    "vtrace": ("gamma", "c_clip"),
}


@pytest.mark.parametrize("op, name", [(op, n) for op in RATES_OF_NONE for n in RATES_OF_NONE[op]])
def test_over_a_rate_of_0_nothing_is_handed_on(op, name):
    """Not NaN either; the definition says the same."""
    arguments = case(op, "", (2, 20), torch.float32) | {name: 0.0}
    arguments["rewards"][:, 13] = math.nan
    if name == "gamma":
        rate = torch.full((2, 20), 0.9)
        rate[:, 6] = 0.0
        arguments["gamma"] = rate
    # vtrace and retrace look a step ahead beside what they hand on.
    reached = range(7, 14) if name == "gamma" else range(13, 14)
    before = 7 if name == "gamma" else 12
    for module in (fastrl, reference):
        for out in call(module, op, arguments):
            assert out[:, reached].isnan().all(), module.__name__
            assert out[:, :before].isfinite().all() and out[:, 14:].isfinite().all()
    for actual, expected in zip(
        call(fastrl, op, arguments), call(reference, op, arguments), strict=True
    ):
        torch.testing.assert_close(actual, expected, equal_nan=True)


@every_op
def test_what_is_not_looked_at_may_be_nan(op):
    """next_values behind a termination; of n_step_returns the values that a window steps over, and
    of discounted_returns all next_values but those at a truncation."""
    arguments = case(op, "next_values terminated truncated", (3, 30), torch.float32)
    expected = call(fastrl, op, arguments)
    unread = arguments["terminated"].clone()
    if op == "discounted_returns":
        unread |= ~arguments["truncated"]
        unread[:, -1] = arguments["terminated"][:, -1]
    spoiled = arguments | {"next_values": arguments["next_values"].masked_fill(unread, math.nan)}
    for module in (fastrl, reference):
        for actual, clean in zip(call(module, op, spoiled), expected, strict=True):
            torch.testing.assert_close(actual, clean)
