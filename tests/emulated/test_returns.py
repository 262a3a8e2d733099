"""The returns' kernels, compiled for a CPU and run in the emulator: against fastrl.reference."""

import math

import pytest
import torch
from budget import assert_within_budget
from emulated.returns import FLOATS, OPS, OPTIONS, arguments, backward, forward, in_double, path

from fastrl import reference

# Around 8 steps of a thread, 256 of a warp and 2048 of a block; and empty ones.
LENGTHS = [
    0,
    1,
    3,
    7,
    8,
    9,
    31,
    32,
    33,
    0,
    0,
    127,
    128,
    129,
    5,
    255,
    256,
    257,
    1,
    1,
    1023,
    1024,
    1025,
]
LENGTHS += [2, 2047, 2048, 2049, 100, 0]
OUTPUTS = {"gae": 2, "vtrace": 2}
EVERY = [(op, option) for op in OPS for option in OPTIONS]
# With what a row is given in each layout, and its length.
ROWS = [
    ("everything", 1),
    ("mask", 27),
    ("everything", 128),
    ("everything", 2048),
    ("bootstrap", 600),
    ("mask", 4099),
]


def packed(lengths=LENGTHS):
    bounds = torch.tensor([0, *lengths]).cumsum(0).int()
    return (int(bounds[-1]),), bounds


def results(op, given):
    """What the op gives in the reference."""
    found = getattr(reference, op)(**given)
    return found if isinstance(found, tuple) else (found,)


def check(emulated, op, given, dtype=torch.float32):
    """To the tolerance, without what eager PyTorch may be wrong."""
    truth, actual = results(op, in_double(given)), forward(emulated, op, given)
    result = torch.float64 if dtype is torch.float64 else torch.float32
    for i in range(OUTPUTS.get(op, 1)):
        assert actual[i].dtype is result
        assert_within_budget(actual[i], truth[i], truth[i], result)


@pytest.mark.parametrize("op, option", [(op, o) for op in OPS for o in OPTIONS if o != "alone"])
def test_packed_rows_of_all_lengths(emulated, op, option):
    shape, bounds = packed()
    check(emulated, op, arguments(op, shape, option, cu_seqlens=bounds))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("op", OPS)
def test_other_dtypes(emulated, op, dtype):
    shape, bounds = packed([700, 3, 2100, 128])
    for option in ("mask", "everything"):
        check(emulated, op, arguments(op, shape, option, dtype, bounds), dtype)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("shape", [(2, 3, 129), (3, 1), (5,), (0, 7), (4, 0), (3, 2300)])
def test_dense_rows(emulated, op, shape):
    for option in ("alone", "bootstrap", "next_values"):
        check(emulated, op, arguments(op, shape, option))


def layouts(x):
    """A dense [B, T] as it is, with gaps between its rows, and time-major."""
    wide = torch.full((x.shape[0], x.shape[1] + 3), torch.nan).to(x.dtype)
    wide[:, 1:-2] = x
    return x, wide[:, 1:-2], x.t().contiguous().t()


def everything_of(emulated, op, given):
    """Outputs and gradients."""
    outputs = forward(emulated, op, given)
    generator = torch.Generator().manual_seed(1)
    grads = []
    for _ in range(OUTPUTS.get(op, 1)):
        grad = torch.randn(given["rewards"].shape, generator=generator)
        grads.append(torch.empty_like(given["rewards"], dtype=torch.float32).copy_(grad))
    return [*outputs, *backward(emulated, op, given, outputs, grads).values()]


@pytest.mark.parametrize("option, length", ROWS)
@pytest.mark.parametrize("op", OPS)
def test_a_row_gives_the_same_bits_in_every_layout(emulated, op, option, length):
    shape = (3, length)
    given = arguments(op, shape, option)
    expected = everything_of(emulated, op, given)
    per_step = {k for k, x in given.items() if isinstance(x, torch.Tensor) and x.shape == shape}
    for i in (1, 2):
        moved = {k: layouts(x)[i] if k in per_step else x for k, x in given.items()}
        for a, b in zip(everything_of(emulated, op, moved), expected, strict=True):
            assert a.shape == b.shape and torch.equal(a, b)
            assert i == 1 or a.dim() == 1 or length == 1 or a.stride() == (1, 3)
    for row in range(2):
        rows = per_step | {"bootstrap_value"}
        alone = {k: x[row : row + 1] if k in rows else x for k, x in given.items()}
        for a, b in zip(forward(emulated, op, alone), expected, strict=False):
            assert torch.equal(a[0], b[row])
    flat = {k: x.reshape(-1) if k in per_step else x for k, x in given.items()}
    flat["cu_seqlens"] = torch.arange(4, dtype=torch.int32) * length
    for a, b in zip(everything_of_packed(emulated, op, flat, shape), expected, strict=True):
        assert torch.equal(a.reshape(b.shape), b)


def everything_of_packed(emulated, op, flat, shape):
    outputs = forward(emulated, op, flat)
    generator = torch.Generator().manual_seed(1)
    grads = [torch.randn(shape, generator=generator).reshape(-1) for _ in range(OUTPUTS.get(op, 1))]
    return [*outputs, *backward(emulated, op, flat, outputs, grads).values()]


@pytest.mark.parametrize("op, option", EVERY)
def test_gradients_are_those_of_the_reference(emulated, op, option):
    """In float64: the formulas to the last digits."""
    shape, bounds = packed([0, 1, 5, 150, 0, 128, 2200])
    given = arguments(op, shape, option, torch.float64, bounds)
    names = [n for n in ("rewards", *FLOATS[op], "bootstrap_value", "next_values") if n in given]
    # NaN in the reference's graph would spread by 0 * NaN; the emulated keep theirs.
    leaves = {n: given[n].nan_to_num(0.5).requires_grad_() for n in names}
    expected = results(op, {**given, **leaves})
    grads = [torch.randn_like(x) for x in expected]
    for keep in range(1, 2 ** len(grads)):  # of vtrace's outputs one alone, too
        some = [g if keep >> i & 1 else None for i, g in enumerate(grads)]
        loss = sum((x * g).sum() for x, g in zip(expected, some, strict=True) if g is not None)
        truth = torch.autograd.grad(
            loss, list(leaves.values()), retain_graph=True, materialize_grads=True
        )
        found = backward(emulated, op, given, forward(emulated, op, given), some)
        assert found.keys() == set(names)
        for name, g in zip(names, truth, strict=True):
            torch.testing.assert_close(found[name], g, rtol=1e-11, atol=1e-11, msg=name)


@pytest.mark.parametrize("op", OPS)
def test_long_rows_do_not_depend_on_the_order_of_blocks(emulated, op):
    """Chunks wait for each other; what is not asked for may be left out."""
    shape, bounds = packed([6500, 3, 15000, 2500])
    given = arguments(op, shape, "mask", cu_seqlens=bounds)
    expected = everything_of(emulated, op, given)
    for workers, seed in ((1, 5), (4, 6), (8, 7)):
        emulated.configure(workers, seed)
        for a, b in zip(everything_of(emulated, op, given), expected, strict=True):
            assert torch.equal(a, b)
    for i, x in enumerate(forward(emulated, op, given, keep=False)):
        assert torch.equal(x, expected[i]) if i < OUTPUTS.get(op, 1) else x.numel() == 0


def gae_in_double(given):
    """One row; as plain as can be."""
    rewards, values = (given[name].double().tolist() for name in ("rewards", "values"))
    advantages, following, after = [], 0.0, float(given["bootstrap_value"])
    for reward, value in zip(reversed(rewards), reversed(values), strict=True):
        delta = reward + given["gamma"] * after - value
        following = delta + given["gamma"] * given["gae_lambda"] * following
        after = value
        advantages.append(following)
    return torch.tensor(advantages[::-1], dtype=torch.float64)


@pytest.mark.parametrize("steps", [100_000, 1_100_000])
def test_long_rows_keep_their_digits(emulated, steps):
    """The longer one has more chunks than one look back covers."""
    generator = torch.Generator().manual_seed(0)
    rewards, values = torch.rand(2, 1, steps, generator=generator)
    given = {"rewards": rewards, "values": values, "bootstrap_value": torch.ones(1)}
    given |= {"gamma": 1.0, "gae_lambda": 0.9999}
    advantages = forward(emulated, "gae", given)[0]
    truth = gae_in_double({k: x[0] if isinstance(x, torch.Tensor) else x for k, x in given.items()})
    assert ((advantages[0] - truth) / truth).abs().max() < 1e-6


def test_gradients_of_a_long_row(emulated):
    """The transposed scan over more chunks than one look back covers."""
    steps = 1_100_000
    grad = torch.rand(1, steps, generator=torch.Generator().manual_seed(0))
    (found,) = emulated("td_bwd", grad, None, *path({"gamma": 0.9999}))
    truth, x = [], 0.0
    for g in grad[0].double().tolist():
        x = g + 0.9999 * x
        truth.append(x)
    truth = torch.tensor(truth, dtype=torch.float64)
    assert ((found[0] - truth) / truth).abs().max() < 1e-6


def test_what_is_not_finite_reaches_every_step_that_it_concerns(emulated):
    """A product of factors underflows after some thousand steps; only an exact 0 cuts."""
    steps = 30_000
    rewards = torch.zeros(1, steps)
    rewards[0, -1] = torch.nan
    terminated = torch.zeros(1, steps, dtype=torch.bool)
    for gamma in (0.5, 1e-60):  # from tile to tile, and within a thread's steps
        given = {"rewards": rewards, "gamma": gamma}
        assert forward(emulated, "discounted_returns", given)[0].isnan().all()
    terminated[0, 17_000] = True
    (found,) = forward(emulated, "discounted_returns", given | {"terminated": terminated})
    assert found[0, 17_001:].isnan().all() and (found[0, :17_001] == 0).all()


@pytest.mark.parametrize("op", ["gae", "discounted_returns", "n_step_returns"])
def test_gaps_longer_than_a_chunk(emulated, op):
    """In rows that end, begin and consist of them."""
    mask = torch.zeros(4, 6_500, dtype=torch.bool)
    mask[0, [0, 1, 4_000, 4_001, 6_499]] = True
    mask[1, 2049:2100] = True
    mask[2, 128 * 7] = True
    for name in ("bootstrap_value", "next_values"):
        given = arguments(op, (4, 6_500), "alone") | {"mask": mask}
        given[name] = torch.randn(4) if name == "bootstrap_value" else torch.randn(4, 6_500)
        for x in given.values():
            if isinstance(x, torch.Tensor) and x.is_floating_point() and x.dim() == 2:
                x[~mask] = torch.nan
        check(emulated, op, given)
        strided = {
            k: x.t().contiguous().t() if isinstance(x, torch.Tensor) and x.dim() == 2 else x
            for k, x in given.items()
        }
        for a, b in zip(forward(emulated, op, strided), forward(emulated, op, given), strict=True):
            assert torch.equal(a, b)


def test_hundred_thousand_empty_segments(emulated):
    lengths = torch.zeros(100_003, dtype=torch.int64)
    lengths[[0, 50_000, 50_001, 100_002]] = torch.tensor([3, 200, 1, 70])
    shape, bounds = packed(lengths.tolist())
    few, few_bounds = packed([3, 200, 1, 70])
    given = arguments("gae", shape, "alone", cu_seqlens=bounds)
    expected = forward(emulated, "gae", given | {"cu_seqlens": few_bounds})
    for a, b in zip(forward(emulated, "gae", given), expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("n", [1, 2, 40, 10_000])
def test_n_step_returns_of_other_n(emulated, n):
    shape, bounds = packed([0, 1, 33, 130, 500])
    for option in ("mask", "everything"):
        given = arguments("n_step_returns", shape, option, cu_seqlens=bounds) | {"n": n}
        check(emulated, "n_step_returns", given)


def test_infinite_clips(emulated):
    given = arguments("vtrace", (3, 300), "bootstrap") | {"rho_clip": math.inf, "c_clip": math.inf}
    check(emulated, "vtrace", given)
