"""gae, lambda_returns and discounted_returns: one recursion, one list of cases for all three."""

import math

import pytest
import torch
from budget import assert_within_budget

import fastrl
from fastrl import _C, reference

OPS = ["gae", "lambda_returns", "discounted_returns"]
# No step; one; less than a vector; a vector and its neighbours; a block of 1024 and its neighbours.
LENGTHS = [0, 1, 3, 7, 8, 9, 17, 1023, 1024, 1025, 2500]
SEGMENTS = [0, 0, 1, 9, 9, 1300, 3000]
# What may be given together; each is one row of the table of edges in the docstrings.
GIVEN = [
    "",
    "bootstrap_value",
    "mask",
    "mask bootstrap_value terminated",
    "terminated next_values",
    "truncated next_values",
    "mask terminated truncated next_values",
    "gamma gae_lambda mask bootstrap_value",
]


@pytest.fixture(params=_C.build_facts()["simd_levels"])
def simd_level(request):
    before = _C.simd_level()
    if not _C.select_simd_level(request.param):
        pytest.skip(f"this processor has no {request.param}")
    yield request.param
    assert _C.select_simd_level(before)


def case(op, given, shape, dtype=torch.float64, segments=None):
    """Random arguments of one call; NaN wherever mask says that nothing may be looked at."""
    rows = shape[:-1] if segments is None else (len(segments) - 1,)
    x = {"rewards": torch.randn(shape), "values": torch.randn(shape)}
    x |= {"gamma": 0.99, "gae_lambda": 0.95}
    for name in given.split():
        if name in ("mask", "terminated", "truncated"):
            x[name] = torch.rand(shape) < (0.7 if name == "mask" else 0.2)
        elif name == "bootstrap_value":
            x[name] = torch.randn(rows)
        else:
            x[name] = torch.rand(shape)
    if segments is not None:
        x["cu_seqlens"] = torch.tensor(segments, dtype=torch.int32)
    if op == "discounted_returns":
        del x["values"], x["gae_lambda"]
        x = {k: v for k, v in x.items() if k != "gae_lambda"}
    for name in ("rewards", "values", "next_values", "gamma", "gae_lambda"):
        if "mask" in x and isinstance(x.get(name), torch.Tensor):
            x[name] = x[name].masked_fill(~x["mask"], math.nan)
    return {
        k: v.to(dtype) if isinstance(v, torch.Tensor) and v.is_floating_point() else v
        for k, v in x.items()
    }


def outputs_and_gradients(namespace, op, arguments, weights):
    leaves = {
        k: v.detach().clone().requires_grad_()
        for k, v in arguments.items()
        if k in ("rewards", "values", "next_values", "bootstrap_value")
    }
    out = getattr(namespace, op)(**(arguments | leaves))
    out = out if isinstance(out, tuple) else (out,)
    sum((o * w.to(o.dtype)).sum() for o, w in zip(out, weights, strict=False)).backward()
    return [o.detach() for o in out] + [
        torch.zeros_like(v) if v.grad is None else v.grad for v in leaves.values()
    ]


def check(op, arguments, dtype):
    truth_arguments = {
        k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v
        for k, v in arguments.items()
    }
    weights = [torch.randn(arguments["rewards"].shape) for _ in range(2)]
    ours = outputs_and_gradients(fastrl, op, arguments, weights)
    eager = outputs_and_gradients(reference, op, arguments, weights)
    truth = outputs_and_gradients(reference, op, truth_arguments, weights)
    for actual, plain, exact in zip(ours, eager, truth, strict=True):
        assert_within_budget(actual, plain, exact, dtype)


@pytest.mark.parametrize("given", GIVEN)
@pytest.mark.parametrize("op", OPS)
def test_error_budget(simd_level, op, given):
    check(op, case(op, given, (2, 3, 70), torch.float32), torch.float32)
    check(op, case(op, given, (SEGMENTS[-1],), torch.float32, SEGMENTS), torch.float32)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("op", OPS)
def test_lengths(simd_level, op, length):
    check(op, case(op, "mask terminated bootstrap_value", (3, length)), torch.float64)
    check(op, case(op, "", (length,)), torch.float64)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_inputs_are_computed_in_float32(op, dtype):
    arguments = case(op, "bootstrap_value", (2, 40), dtype)
    out = getattr(fastrl, op)(**arguments)
    out = out[0] if isinstance(out, tuple) else out
    assert out.dtype == torch.float32
    check(op, arguments, dtype)


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


@pytest.mark.parametrize("op", OPS)
def test_nothing_behind_a_termination_is_looked_at(op):
    arguments = case(op, "next_values terminated", (2, 30), torch.float32)
    arguments["terminated"][:, 4] = True
    arguments["next_values"][:, 4] = math.inf
    out = getattr(fastrl, op)(**arguments)
    assert all(o.isfinite().all() for o in (out if isinstance(out, tuple) else (out,)))


@pytest.mark.parametrize("given", ["mask bootstrap_value", "gamma terminated"])
@pytest.mark.parametrize("op", OPS)
def test_a_row_alone_is_bitwise_the_row_in_a_batch_dense_or_packed(simd_level, op, given):
    batch = case(op, given, (5, 1500), torch.float32)

    def pick(convert):
        out = getattr(fastrl, op)(**{k: convert(v) for k, v in batch.items()})
        return out[0] if isinstance(out, tuple) else out

    together = pick(lambda v: v)
    for row in range(5):
        alone = pick(lambda v, row=row: v[row] if isinstance(v, torch.Tensor) else v)
        assert torch.equal(alone, together[row])
    batch |= {k: v.flatten() for k, v in batch.items() if isinstance(v, torch.Tensor)}
    batch["cu_seqlens"] = torch.arange(0, 7501, 1500, dtype=torch.int32)
    assert torch.equal(pick(lambda v: v), together.flatten())


def test_long_rows_stay_exact():
    """float32, T = 100 000, gamma * lambda near 1: within 1e-6 of float64."""
    arguments = case("gae", "", (1, 100_000), torch.float32)
    arguments |= {"gamma": 0.9999, "gae_lambda": 1.0}
    advantages, _ = fastrl.gae(**arguments)
    rewards, values = arguments["rewards"][0].double(), arguments["values"][0].double()
    exact, x, after = torch.empty(100_000, dtype=torch.float64), 0.0, 0.0
    for t in reversed(range(100_000)):
        x = rewards[t].item() + 0.9999 * after - values[t].item() + 0.9999 * x
        after, exact[t] = values[t].item(), x
    assert (advantages[0].double() - exact).abs().max() <= 1e-6 * exact.abs().max()


@pytest.mark.parametrize("op", OPS)
def test_strided_inputs(op):
    dense = case(op, "mask bootstrap_value", (6, 50), torch.float32)
    strided = {
        k: torch.stack([v, v], -1)[..., 0] if isinstance(v, torch.Tensor) else v
        for k, v in dense.items()
    }
    time_major = {
        k: v.t().contiguous().t() if isinstance(v, torch.Tensor) and v.dim() == 2 else v
        for k, v in dense.items()
    }
    results = [getattr(fastrl, op)(**a) for a in (dense, strided, time_major)]
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=0, atol=0)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0,)])
def test_empty_batches(op, shape):
    check(op, case(op, "bootstrap_value", shape), torch.float64)


@pytest.mark.parametrize("op", OPS)
def test_all_masked_rows_give_zero(op):
    arguments = case(op, "bootstrap_value mask", (2, 6), torch.float32)
    arguments["mask"][0] = False
    arguments["rewards"][0] = math.nan
    out = getattr(fastrl, op)(**arguments)
    out = out if isinstance(out, tuple) else (out,)
    assert all(not o[0].any() for o in out)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("given", ["mask terminated bootstrap_value", "truncated next_values"])
def test_opcheck_and_compile(op, given):
    arguments = case(op, given, (2, 12), torch.float32)
    if "mask" in arguments:
        arguments = {
            k: v.nan_to_num(0.0) if isinstance(v, torch.Tensor) and v.is_floating_point() else v
            for k, v in arguments.items()
        }
    arguments["rewards"].requires_grad_()
    schema = getattr(torch.ops.fastrl, op).default
    names = [a.name for a in schema._schema.arguments]
    torch.library.opcheck(schema, tuple(arguments.get(name) for name in names))

    def loss(**arguments):
        out = getattr(fastrl, op)(**arguments)
        return (out[0] if isinstance(out, tuple) else out).square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    compiled(**arguments).backward()
    ours, arguments["rewards"].grad = arguments["rewards"].grad, None
    loss(**arguments).backward()
    torch.testing.assert_close(ours, arguments["rewards"].grad)


ROW = torch.zeros(2, 5)
PACKED = {"rewards": torch.zeros(6), "values": torch.zeros(6)}


def bounds(*numbers):
    return torch.tensor(numbers, dtype=torch.int32)


BAD = [
    ({"rewards": [0.0]}, TypeError, "rewards as a tensor, got list"),
    ({"rewards": ROW.long()}, TypeError, "rewards of dtype float32"),
    ({"rewards": torch.tensor(1.0)}, ValueError, r"rewards \[..., T\]"),
    ({"values": torch.zeros(2, 6)}, ValueError, "Pass the last column as bootstrap_value"),
    ({"values": torch.zeros(5)}, ValueError, r"values \(2, 5\) like rewards, got \(5,\)"),
    ({"gamma": 1.5}, ValueError, r"gamma in \[0, 1\], got 1.5"),
    ({"gamma": math.nan}, ValueError, r"gamma in \[0, 1\], got nan"),
    ({"gamma": "1"}, TypeError, "gamma as a number, got str"),
    ({"gamma": ROW + 2}, ValueError, r"gamma in \[0, 1\], got entries outside it"),
    ({"gamma": torch.zeros(5)}, ValueError, r"gamma \(2, 5\) like rewards"),
    ({"gamma": ROW.clone().requires_grad_()}, ValueError, "gamma without gradient"),
    ({"gae_lambda": -0.1}, ValueError, "gae_lambda in"),
    ({"bootstrap_value": torch.zeros(2, 1)}, ValueError, r"bootstrap_value \(2,\), got \(2, 1\)"),
    ({"bootstrap_value": 0.0}, TypeError, "bootstrap_value as a tensor, got float"),
    ({"bootstrap_value": ROW[:, 0], "next_values": ROW}, ValueError, "got both"),
    ({"truncated": ROW.bool()}, ValueError, "next_values with truncated, got None"),
    ({"terminated": ROW}, TypeError, "terminated of dtype bool, got torch.float32"),
    ({"mask": torch.ones(5, dtype=torch.bool)}, ValueError, r"mask \(2, 5\) like rewards"),
    ({"cu_seqlens": bounds(0, 5)}, ValueError, "packed rewards"),
    (PACKED | {"cu_seqlens": bounds(0, 5)}, ValueError, "from 0 to N = 6, got from 0 to 5"),
    (PACKED | {"cu_seqlens": bounds(1, 6)}, ValueError, "from 0 to N = 6, got from 1 to 6"),
    (PACKED | {"cu_seqlens": bounds(0, 4, 3, 6)}, ValueError, "cu_seqlens that rise"),
    (PACKED | {"cu_seqlens": bounds(0, 6).long()}, TypeError, "cu_seqlens of dtype int32"),
    (PACKED | {"cu_seqlens": bounds()}, ValueError, r"cu_seqlens \[S \+ 1\]"),
]


@pytest.mark.parametrize("arguments, error, message", BAD)
@pytest.mark.parametrize("op", OPS)
def test_bad_arguments(op, arguments, error, message):
    call = {"rewards": ROW, "values": ROW, "gamma": 0.9, "gae_lambda": 0.9} | arguments
    if op == "discounted_returns":
        if "values" in arguments and "cu_seqlens" not in arguments or "gae_lambda" in arguments:
            pytest.skip("discounted_returns takes no values and no gae_lambda")
        call = {k: v for k, v in call.items() if k not in ("values", "gae_lambda")}
    with pytest.raises(error, match=message) as caught:
        getattr(fastrl, op)(**call)
    assert str(caught.value).startswith(f"{op}: expected ")


def test_a_device_without_a_kernel_is_refused():
    with pytest.raises(NotImplementedError, match="gae: expected tensors on cpu, got cuda"):
        from fastrl.ops import _checks

        class OnGpu:
            device = torch.device("cuda")

        _checks.implemented("gae", OnGpu())
