"""The estimators of returns: one recursion, one list of cases for all six."""

import math

import pytest
import torch
from returns_cases import GIVEN, INPUTS, OPS, call, case, check, on_tensors

import fastrl
from fastrl import reference

every_op = pytest.mark.parametrize("op", OPS)
# No step; one; less than a vector; a vector and its neighbours; some vectors and a rest.
LENGTHS = [0, 1, 3, 7, 8, 9, 17, 255, 1025]
SEGMENTS = [0, 0, 1, 9, 9, 130, 300]
CHUNK = 16384  # kRowChunk of csrc/cpu/returns_kernels.h: longer rows are scanned in several pieces


@pytest.mark.parametrize("given", GIVEN)
@every_op
def test_error_budget(simd_level, op, given):
    check(op, case(op, given, (2, 3, 37), torch.float32), torch.float32)
    check(op, case(op, given, (SEGMENTS[-1],), torch.float32, SEGMENTS), torch.float32)


@pytest.mark.parametrize("given", GIVEN)
@every_op
def test_error_budget_of_rows_side_by_side(simd_level, op, given):
    """[T, B] transposed: 11 rows are a vector and a rest, at every width."""
    arguments = case(op, given, (11, 21), torch.float32)
    check(op, on_tensors(time_major, arguments), torch.float32)


@pytest.mark.parametrize("length", LENGTHS)
@every_op
def test_lengths(simd_level, op, length):
    check(op, case(op, "mask terminated bootstrap_value", (3, length)), torch.float64)
    check(op, case(op, "", (length,)), torch.float64)


@every_op
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_inputs_give_float32(simd_level, op, dtype):
    arguments = case(op, "bootstrap_value", (2, 41), dtype)
    assert all(o.dtype == torch.float32 for o in call(fastrl, op, arguments))
    check(op, arguments, dtype)


@every_op
def test_dtypes_may_differ(op):
    """Each tensor is read in its own dtype; one of float64 makes the results float64."""
    arguments = case(op, "next_values terminated", (2, 41), torch.float32)
    mixed = arguments | {"next_values": arguments["next_values"].bfloat16()}
    widened = arguments | {"next_values": mixed["next_values"].float()}
    for actual, expected in zip(call(fastrl, op, mixed), call(fastrl, op, widened), strict=True):
        assert actual.dtype == torch.float32 and torch.equal(actual, expected)
    given = case(op, "bootstrap_value", (2, 41), torch.float32)
    wide = {k: v.double() for k, v in given.items() if torch.is_tensor(v) and k != "log_ratio"}
    expected = call(fastrl, op, given | wide)
    for name in wide:  # bootstrap_value alone, too
        out = call(fastrl, op, given | {name: wide[name]})
        assert all(o.dtype == torch.float64 for o in out) and all(map(torch.equal, out, expected))


@pytest.mark.parametrize("name", ["gamma", "gae_lambda"])
@every_op
def test_one_rate_at_every_step_gives_the_bits_of_the_number(op, name):
    arguments = case(op, "bootstrap_value", (3, 41), torch.float32)
    if name in arguments:
        number = call(fastrl, op, arguments | {name: 0.5})
        per_step = call(fastrl, op, arguments | {name: torch.full((3, 41), 0.5)})
        assert all(map(torch.equal, number, per_step))


def test_hand_computed_gae():
    """Row with a termination inside; gamma = 0.5, lambda = 0.5, bootstrap 8.

    delta = [1 + 2 - 2, 2 - 4, 0 + 4 - 6] = [1, -2, -2]; the termination stands at step 1.
    """
    advantages, returns = fastrl.gae(
        torch.tensor([1.0, 2.0, 0.0]),
        torch.tensor([2.0, 4.0, 6.0]),
        gamma=0.5,
        gae_lambda=0.5,
        bootstrap_value=torch.tensor(8.0),
        terminated=torch.tensor([False, True, False]),
    )
    assert advantages.tolist() == [0.5, -2.0, -2.0]
    assert returns.tolist() == [2.5, 2.0, 4.0]


@pytest.mark.parametrize("n", [1, 2, 7, 40, 41, 2**70])
def test_n_steps_of_every_size(simd_level, n):
    """One; a few; more than is left; as long as the row, and longer."""
    for given in ("bootstrap_value mask terminated", "next_values truncated mask"):
        arguments = case("n_step_returns", given, (3, 41), torch.float32) | {"n": n}
        check("n_step_returns", arguments, torch.float32)


@pytest.mark.parametrize("clip", [0.0, 1e-3, 5.0, math.inf])
@pytest.mark.parametrize("op", ["vtrace", "retrace_returns"])
def test_clips_of_every_size(simd_level, op, clip):
    arguments = case(op, "bootstrap_value terminated", (3, 41), torch.float32)
    clips = {k: clip for k in ("rho_clip", "c_clip") if k in arguments}
    check(op, arguments | clips, torch.float32)


@pytest.mark.parametrize(
    "dtype, least, most", [(torch.float32, -87, 88), (torch.float64, -708, 709)]
)
def test_ratios_are_exponentials_to_their_last_places(simd_level, dtype, least, most):
    """Without gamma and clips an advantage is the ratio times the reward."""
    log_ratio = torch.linspace(least, most, 4001, dtype=dtype)
    log_ratio = torch.cat([log_ratio, log_ratio.new_tensor([-760, 720, -math.inf, math.inf])])
    rewards, values = torch.ones_like(log_ratio), torch.zeros_like(log_ratio)
    ratios, _ = fastrl.vtrace(rewards, values, log_ratio, gamma=0.0, rho_clip=math.inf)
    torch.testing.assert_close(ratios, log_ratio.exp(), rtol=4 * torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("op", ["vtrace", "retrace_returns"])
def test_extreme_ratios(simd_level, op):
    """exp overflows float32 at 89 and float64 at 710, and underflows; a NaN stays one."""
    arguments = case(op, "bootstrap_value", (1, 12), torch.float32)
    extremes = torch.tensor([[90.0, -110.0, 720.0, -800.0, 1e4, -1e4, 3e38, -3e38, 0, 0, 0, 0]])
    check(op, arguments | {"log_ratio": extremes}, torch.float32)
    spoiled = extremes.index_fill(1, torch.tensor([3]), math.nan)
    for out in call(fastrl, op, arguments | {"log_ratio": spoiled}):
        # No step before one that weighs 0 sees it: exp(-110) is 0 in no more than float32.
        assert out[0, 3:].isnan()[0] == (op == "vtrace") and out[0, 4:].isfinite().all()


@pytest.mark.parametrize("op", ["vtrace", "retrace_returns"])
def test_unclipped_ratios_whose_product_overflows(simd_level, op):
    """exp(0.2 * 4000) is no double; what follows the first steps is 0 all the same."""
    arguments = {name: torch.zeros(2, 4000) for name in INPUTS[op]} | {"gamma": 1.0}
    arguments["log_ratio"] += 0.2
    arguments["rewards"][:, :50] = torch.randn(2, 50)
    clips = ("rho_clip", "c_clip") if op == "vtrace" else ("c_clip",)
    arguments |= dict.fromkeys(clips, math.inf)
    truth = call(reference, op, on_tensors(torch.Tensor.double, arguments))
    for out, exact in zip(call(fastrl, op, arguments), truth, strict=True):
        torch.testing.assert_close(
            out.double(), exact, rtol=2e-6, atol=1e-6 * exact.abs().max().item()
        )


@every_op
def test_a_nan_reaches_all_steps_before_it_however_far(simd_level, op):
    """0.5 ** 20000 is 0 in a double. A window of n = 19 999 reaches it but from the first step."""
    arguments = case(op, "", (20_000,), torch.float32) | {"gamma": 0.5}
    arguments |= {"n": 19_999} if op == "n_step_returns" else {}
    arguments["rewards"][-1] = math.nan
    if "log_ratio" in arguments:
        arguments["log_ratio"].zero_()
    first = 1 if op == "n_step_returns" else 0
    assert all(o[first:].isnan().all() for o in call(fastrl, op, arguments))


@pytest.mark.parametrize("end", ["terminated", "truncated next_values"])
@pytest.mark.parametrize("at", [7, 20])
@every_op
def test_a_nan_gradient_stays_in_its_episode(simd_level, op, at, end):
    """Backward passes run on in time, and an end stops them as it stops the recursion."""
    arguments = case(op, end, (3, 40), torch.float32)
    flag = end.split()[0]
    arguments[flag] = arguments[flag].index_fill(1, torch.tensor([20]), True)
    names = [*INPUTS[op], *(["next_values"] if "next_values" in end else [])]
    for lay in (torch.Tensor.contiguous, time_major):
        laid = on_tensors(lay, arguments)
        leaves = [laid[name].detach().requires_grad_() for name in names]
        out = call(fastrl, op, laid | dict(zip(names, leaves, strict=True)))
        good = [torch.ones_like(o) for o in out]
        spoiled = [g.clone() for g in good]
        for g in spoiled:
            g[1, at] = math.nan
        expected = torch.autograd.grad(out, leaves, good, retain_graph=True)
        found = torch.autograd.grad(out, leaves, spoiled)
        assert found[0][1, at].isnan()
        for actual, whole in zip(found, expected, strict=True):
            assert torch.equal(actual[::2], whole[::2]) and whole.isfinite().all()
            assert torch.equal(actual[1, :at], whole[1, :at])
            assert torch.equal(actual[1, 21:], whole[1, 21:])


def time_major(x):
    return x.movedim(-1, 0).contiguous().movedim(0, -1) if x.dim() > 1 else x


def layouts(arguments):
    """The same rows: dense, rows of a wider tensor, side by side in memory, packed."""
    count, length = arguments["rewards"].shape
    yield "dense", arguments, lambda out: out
    wider = on_tensors(
        lambda v: torch.cat([v, v[:, :3]], 1)[:, :length] if v.dim() > 1 else v, arguments
    )
    yield "rows of a wider tensor", wider, lambda out: out
    yield "time-major", on_tensors(time_major, arguments), lambda out: out
    strided = on_tensors(lambda v: torch.stack([v, v], -1)[..., 0], arguments)
    yield "strided", strided, lambda out: out
    packed = on_tensors(torch.Tensor.flatten, arguments)
    bounds = torch.arange(0, count * length + 1, length, dtype=torch.int32)
    yield "packed", packed | {"cu_seqlens": bounds}, lambda out: out.view(count, length)


@pytest.mark.parametrize("length", [1500, CHUNK + 1, 2 * CHUNK + 777])
@pytest.mark.parametrize("given", ["mask bootstrap_value", "gamma terminated", "next_values"])
@every_op
def test_a_row_gives_the_same_bits_alone_in_a_batch_and_in_every_layout(
    simd_level, op, given, length
):
    batch = case(op, given, (3, length), torch.float32)
    together = call(fastrl, op, batch)
    for row in range(3):
        alone = call(fastrl, op, on_tensors(lambda v, row=row: v[row], batch))
        for actual, expected in zip(alone, together, strict=True):
            assert torch.equal(actual, expected[row])
    for name, arguments, restore in layouts(batch):
        for actual, expected in zip(call(fastrl, op, arguments), together, strict=True):
            assert torch.equal(restore(actual), expected), name


def outputs_and_gradients(op, arguments):
    """By the tensors shaped like rewards, as they lie."""
    leaves = [arguments[name].detach().requires_grad_() for name in INPUTS[op]]
    out = call(fastrl, op, arguments | dict(zip(INPUTS[op], leaves, strict=True)))
    return [*out, *torch.autograd.grad(sum(o.nan_to_num().sin().sum() for o in out), leaves)]


@pytest.mark.parametrize("shape", [(3 * CHUNK,), (3, 2 * CHUNK + 5)])
@every_op
def test_threads_do_not_change_a_bit(op, shape):
    """They share the chunks of a row, and of rows side by side."""
    arguments = on_tensors(time_major, case(op, "mask bootstrap_value", shape, torch.float32))
    threads, found = torch.get_num_threads(), []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        found.append(outputs_and_gradients(op, arguments))
    torch.set_num_threads(threads)
    for several in found[1:]:
        assert all(map(torch.equal, several, found[0]))


@pytest.mark.parametrize("op", [op for op in OPS if op != "n_step_returns"])
def test_gradients_of_long_rows_do_not_depend_on_the_layout(simd_level, op):
    """Backward passes too are cut into chunks, and run over rows side by side."""
    batch = case(op, "mask bootstrap_value", (3, 2 * CHUNK + 5), torch.float32)
    expected = outputs_and_gradients(op, batch)
    for name, arguments, restore in layouts(batch):
        for actual, dense in zip(outputs_and_gradients(op, arguments), expected, strict=True):
            assert torch.equal(restore(actual), dense), name


@pytest.mark.parametrize("threads", [1, 2, 4])
@pytest.mark.parametrize("behind", [1, CHUNK + 3, 2 * CHUNK])
@every_op
def test_a_row_whose_end_is_masked_has_the_gradients_of_a_shorter_one(op, behind, threads):
    """Its last step, which next_values end on, and its last chunk are different threads'."""
    steps = 3 * CHUNK + 1 - behind
    whole = case(op, "next_values", (1, 3 * CHUNK + 1), torch.float32)
    whole["mask"] = torch.arange(3 * CHUNK + 1)[None] < steps
    shorter = on_tensors(lambda x: x[:, :steps], whole)
    names = [*INPUTS[op], "next_values"]

    def gradients(arguments):
        leaves = {name: arguments[name].clone().requires_grad_() for name in names}
        out = call(fastrl, op, arguments | leaves)
        return torch.autograd.grad(sum(o.sum() for o in out), list(leaves.values()))

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for masked, expected in zip(gradients(whole), gradients(shorter), strict=True):
            assert torch.equal(masked[:, :steps], expected) and not masked[:, steps:].any()
    finally:
        torch.set_num_threads(before)


def test_long_rows_stay_exact():
    """float32, T = 100 000, gamma lambda = 0.9999: within 1e-6 of a float64 loop, relative."""
    steps = 100_000
    rewards = torch.rand(steps)  # of one sign: no cancellation hides in the relative error
    values = torch.rand(steps) / 16
    for gamma, gae_lambda in ((0.9999, 1.0), (1.0, 0.9999)):
        advantages, returns = fastrl.gae(rewards, values, gamma=gamma, gae_lambda=gae_lambda)
        x, after, exact = 0.0, 0.0, []
        for r, v in zip(rewards.tolist()[::-1], values.tolist()[::-1], strict=True):
            x = r + gamma * after - v + gamma * gae_lambda * x
            after = v
            exact.append((x, x + v))
        truth = torch.tensor(exact[::-1], dtype=torch.float64)
        for actual, expected in ((advantages, truth[:, 0]), (returns, truth[:, 1])):
            assert ((actual - expected) / expected).abs().max() <= 1e-6


def test_lengths_from_none_to_a_million_in_one_batch():
    lengths = [3, 0, 1_000_000, 1, 0, 24, CHUNK, 24, 5000]
    ends = torch.tensor([0, *lengths]).cumsum(0)
    rewards = torch.rand(int(ends[-1]))
    returns = fastrl.discounted_returns(rewards, gamma=0.9999, cu_seqlens=ends.int())
    for start, end in zip(ends.tolist()[:-1], ends.tolist()[1:], strict=True):
        alone = fastrl.discounted_returns(rewards[start:end], gamma=0.9999)
        assert torch.equal(returns[start:end], alone)
        x, exact = 0.0, []
        for r in reversed(rewards[start:end].tolist()):
            x = r + 0.9999 * x
            exact.append(x)
        truth = torch.tensor(exact[::-1], dtype=torch.float64)
        torch.testing.assert_close(returns[start:end].double(), truth, rtol=2e-7, atol=0)


@every_op
def test_layouts_without_a_copy_keep_theirs(op):
    arguments = on_tensors(time_major, case(op, "bootstrap_value", (4, 5, 6), torch.float32))
    rewards = arguments["rewards"]
    for out in call(fastrl, op, arguments):
        assert out.stride() == rewards.stride() != out.contiguous().stride()


@every_op
@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0,)])
def test_empty_batches(op, shape):
    check(op, case(op, "bootstrap_value", shape), torch.float64)


@every_op
def test_all_masked_rows_give_zero(op):
    arguments = case(op, "bootstrap_value mask", (2, 6), torch.float32)
    arguments["mask"][0] = False
    for name in INPUTS[op]:
        arguments[name][0] = math.nan
    assert all(not o[0].any() for o in call(fastrl, op, arguments))


@every_op
def test_only_what_is_asked_for_gets_a_gradient(op):
    arguments = case(op, "bootstrap_value", (2, 6), torch.float32)
    names = [*INPUTS[op], "bootstrap_value"]
    for name in names:
        leaf = arguments[name].clone().requires_grad_()
        out = call(fastrl, op, arguments | {name: leaf})
        (gradient,) = torch.autograd.grad(sum(o.sum() for o in out), leaf)
        every = {k: arguments[k].clone().requires_grad_() for k in names}
        out = call(fastrl, op, arguments | every)
        expected = torch.autograd.grad(sum(o.sum() for o in out), list(every.values()))
        torch.testing.assert_close(gradient, expected[names.index(name)], rtol=0, atol=0)
        others = [k for k in names if k != name]
        assert all(arguments[k].grad is None for k in others)
