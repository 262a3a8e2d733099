"""The estimators of returns as ops: schemas, torch.compile, and what is refused."""

import math

import pytest
import torch
from returns_cases import INPUTS, NUMBERS, OPS, WITHOUT_LAMBDA, call, case, on_tensors
from torch import library

import fastrl
from fastrl.ops import _returns

every_op = pytest.mark.parametrize("op", OPS)
RENAMED = {"gamma_per_step": "gamma", "lambda_per_step": "gae_lambda"}


def schema_arguments(schema, arguments):
    def of(argument):
        given = arguments.get(RENAMED.get(argument.name, argument.name))
        if argument.name in RENAMED:
            return given if isinstance(given, torch.Tensor) else None
        if argument.name == "gae_lambda" and given is None:
            return 1.0
        return True if argument.name == "keep" else given

    return tuple(of(argument) for argument in schema._schema.arguments)


@every_op
@pytest.mark.parametrize("given", ["mask terminated bootstrap_value", "truncated next_values"])
@pytest.mark.parametrize("transposed", [False, True])
def test_opcheck_and_compile(op, given, transposed):
    arguments = case(op, given, (3, 12), torch.float32)
    arguments = on_tensors(lambda v: v.nan_to_num(0.0) if v.is_floating_point() else v, arguments)
    if transposed:
        arguments = on_tensors(lambda v: v.t().contiguous().t() if v.dim() == 2 else v, arguments)
    torch._dynamo.reset()
    leaves = [arguments[name].requires_grad_() for name in INPUTS[op]]
    schema = getattr(torch.ops.fastrl, op).default
    library.opcheck(schema, schema_arguments(schema, arguments))

    def loss(**arguments):
        return sum(o.square().sum() for o in call(fastrl, op, arguments))

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    ours = torch.autograd.grad(compiled(**arguments), leaves)
    expected = torch.autograd.grad(loss(**arguments), leaves)
    for actual, eager in zip(ours, expected, strict=True):
        torch.testing.assert_close(actual, eager)


@every_op
def test_one_graph_serves_many_shapes(op):
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(
        lambda **x: call(fastrl, op, x), fullgraph=True, backend=counter, dynamic=True
    )
    for shape in ((2, 12), (3, 20), (5, 7)):
        arguments = case(op, "bootstrap_value", shape, torch.float32)
        for actual, eager in zip(compiled(**arguments), call(fastrl, op, arguments), strict=True):
            assert torch.equal(actual, eager)
    assert counter.frame_count == 1


def test_of_many_bounds_the_one_that_falls_is_named():
    cu_seqlens = torch.arange(0, 101, dtype=torch.int32)
    cu_seqlens[70] = 60
    with pytest.raises(ValueError, match=r"cu_seqlens that rise, got \[69, 60\] at 69"):
        fastrl.discounted_returns(torch.zeros(100), gamma=0.9, cu_seqlens=cu_seqlens)


@every_op
def test_a_second_derivative_is_refused_and_not_incomplete(op):
    arguments = case(op, "bootstrap_value", (2, 6), torch.float32)
    rewards = arguments["rewards"].requires_grad_()
    loss = sum(o.square().sum() for o in call(fastrl, op, arguments))
    (first,) = torch.autograd.grad(loss, rewards, create_graph=True)
    with pytest.raises(NotImplementedError, match="differentiated once"):
        first.square().sum().backward()


ROW = torch.zeros(2, 5)


def bounds(*numbers):
    return torch.tensor(numbers, dtype=torch.int32)


def packed(op, cu_seqlens):
    return {name: torch.zeros(6) for name in INPUTS[op]} | {"cu_seqlens": cu_seqlens}


BAD = [
    ({"rewards": [0.0]}, TypeError, "rewards as a tensor, got list"),
    ({"rewards": ROW.long()}, TypeError, "rewards of dtype float32"),
    ({"rewards": torch.tensor(1.0)}, ValueError, r"rewards \[..., T\]"),
    ({"values": torch.zeros(2, 6)}, ValueError, "Pass the last column as bootstrap_value"),
    ({"values": torch.zeros(5)}, ValueError, r"values \(2, 5\) like rewards, got \(5,\)"),
    ({"values": None}, TypeError, "values as a tensor, got NoneType"),
    ({"log_ratio": torch.zeros(2, 4)}, ValueError, r"log_ratio \(2, 5\) like rewards"),
    ({"q_values": ROW.int()}, TypeError, "q_values of dtype float32"),
    ({"rho_clip": -1.0}, ValueError, "rho_clip >= 0, got -1.0"),
    ({"rho_clip": 10**400}, ValueError, "rho_clip >= 0, got 1000"),
    ({"c_clip": math.nan}, ValueError, "c_clip >= 0, got nan"),
    ({"c_clip": ROW}, TypeError, "c_clip as a number, got Tensor"),
    ({"n": 0}, ValueError, "n >= 1, got 0"),
    ({"n": 2.0}, TypeError, "n as an int, got float"),
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
    (bounds(0, 5), ValueError, "from 0 to N = 6, got from 0 to 5"),
    (bounds(1, 6), ValueError, "from 0 to N = 6, got from 1 to 6"),
    (bounds(0, 4, 3, 6), ValueError, "cu_seqlens that rise"),
    (bounds(0, 6).long(), TypeError, "cu_seqlens of dtype int32"),
    (bounds(), ValueError, r"cu_seqlens \[S \+ 1\]"),
]


@pytest.mark.parametrize("change, error, message", BAD)
@every_op
def test_bad_arguments(op, change, error, message):
    arguments = dict.fromkeys(INPUTS[op], ROW) | {"gamma": 0.9} | NUMBERS.get(op, {})
    if op not in WITHOUT_LAMBDA:
        arguments["gae_lambda"] = 0.9
    if isinstance(change, torch.Tensor):
        change = packed(op, change)
    shared = ("bootstrap_value", "next_values", "terminated", "truncated", "mask", "cu_seqlens")
    if not set(change) <= {*arguments, *shared}:
        pytest.skip("takes no such argument")
    with pytest.raises(error, match=message) as caught:
        getattr(fastrl, op)(**(arguments | change))
    assert str(caught.value).startswith(f"{op}: expected ")


def test_what_a_gpu_is_given_has_one_dtype():
    """The widest of the floats; flags and bounds stay."""
    half, single, flags = torch.ones(3).half(), torch.ones(3), torch.ones(3, dtype=torch.bool)
    bounds = torch.tensor([0, 3], dtype=torch.int32)
    for given, found in (
        ([half, half, None, flags, bounds], torch.float16),
        ([half, None, flags, single, bounds], torch.float32),
        ([single, half.bfloat16(), bounds], torch.float32),
        ([single, None, single.double()], torch.float64),
    ):
        steps = list(given)
        _returns._convert_to_one_dtype(steps)
        for before, after in zip(given, steps, strict=True):
            is_float = before is not None and before.is_floating_point()
            assert after.dtype == found if is_float else after is before
