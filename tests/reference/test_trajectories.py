"""What holds for all returns: packing, masking, shapes, dtypes and gradients."""

import pytest
import torch

from fastrl import reference

NAN = float("nan")

# op -> the tensors and the constants that it takes beyond what all of them take
RETURNS = {
    "discounted_returns": (["rewards"], ["gamma"], {}),
    "gae": (["rewards", "values"], ["gamma", "gae_lambda"], {}),
    "lambda_returns": (["rewards", "values"], ["gamma", "gae_lambda"], {}),
    "vtrace": (
        ["rewards", "values", "log_ratio"],
        ["gamma", "gae_lambda"],
        {"rho_clip": 1.3, "c_clip": 0.9},
    ),
    "retrace_returns": (
        ["rewards", "values", "q_values", "log_ratio"],
        ["gamma", "gae_lambda"],
        {"c_clip": 1.1},
    ),
    "n_step_returns": (["rewards", "values"], ["gamma"], {"n": 3}),
}
FLAGS = ["terminated", "truncated", "mask"]
every_op = pytest.mark.parametrize("op", RETURNS)


def call(op, inputs):
    """The op's outputs as a tuple; keys of `inputs` that it does not know are left out."""
    tensors, rates, constants = RETURNS[op]
    optional = [*rates, *FLAGS, "next_values", "bootstrap_value", "cu_seqlens"]
    keywords = {name: inputs[name] for name in optional if inputs.get(name) is not None}
    outputs = getattr(reference, op)(*(inputs[name] for name in tensors), **keywords, **constants)
    return outputs if isinstance(outputs, tuple) else (outputs,)


def with_bootstrap(inputs):
    value = torch.arange(1.0, 1 + len(inputs["rewards"]), dtype=torch.float64)
    return inputs | {"next_values": None, "truncated": None, "bootstrap_value": value}


@every_op
@pytest.mark.parametrize("bootstrap", [False, True])
def test_packed_is_each_row_by_itself(op, bootstrap, random_rows):
    inputs = random_rows(4, 9)
    if bootstrap:
        inputs = with_bootstrap(inputs)
    lengths = [9, 0, 4, 1]
    rows = [
        {
            k: v[i] if k == "bootstrap_value" else v[i, :n]
            for k, v in inputs.items()
            if v is not None
        }
        for i, n in enumerate(lengths)
    ]
    packed = {k: torch.cat([r[k] for r in rows]) for k in rows[0] if k != "bootstrap_value"}
    packed["cu_seqlens"] = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0).int()
    packed["bootstrap_value"] = inputs.get("bootstrap_value")

    together = call(op, packed)
    apart = zip(*(call(op, row) for row in rows), strict=True)
    for got, expected in zip(together, apart, strict=True):
        torch.testing.assert_close(got, torch.cat(list(expected)), rtol=0, atol=0)


@every_op
@pytest.mark.parametrize("bootstrap", [False, True])
def test_masked_is_the_row_without_those_steps(op, bootstrap, random_rows):
    inputs = random_rows(1, 12, seed=3)
    if bootstrap:
        inputs = with_bootstrap(inputs)
    mask = inputs["mask"]
    per_step = {k: v for k, v in inputs.items() if v is not None and k != "bootstrap_value"}
    compact = {k: v[mask][None] for k, v in per_step.items()} | {"mask": None}
    compact["bootstrap_value"] = inputs.get("bootstrap_value")
    spoiled = {
        k: v.masked_fill(~mask, NAN if v.is_floating_point() else True)
        for k, v in per_step.items()
        if k != "mask"
    }
    for got, expected in zip(call(op, inputs | spoiled), call(op, compact), strict=True):
        torch.testing.assert_close(got[mask], expected[0])
        assert (got[~mask] == 0).all()


@every_op
@pytest.mark.parametrize("bootstrap", [False, True])
def test_nan_at_masked_steps_reaches_no_gradient(op, bootstrap, random_rows):
    inputs = random_rows(3, 7, seed=1)
    mask = inputs["mask"]
    names = RETURNS[op][0] + RETURNS[op][1] + ["next_values"]
    for name in names:
        inputs[name] = inputs[name].masked_fill(~mask, NAN).requires_grad_()
    leaves = {name: inputs[name] for name in names}
    if bootstrap:
        inputs = with_bootstrap(inputs)
    sum(output.sin().sum() for output in call(op, inputs)).backward()
    unused = {"values"} if not bootstrap else {"next_values"}
    for name, leaf in leaves.items():
        if leaf.grad is None:
            assert name in unused
        else:
            assert leaf.grad.isfinite().all() and (leaf.grad[~mask] == 0).all(), name
    assert (leaves["rewards"].grad[mask] != 0).all()


@every_op
def test_all_masked_rows_and_empty_segments_give_nothing(op, random_rows):
    inputs = with_bootstrap(random_rows(2, 5))
    inputs["mask"] = torch.tensor([[False] * 5, [True] * 5])
    inputs["bootstrap_value"] = torch.tensor([NAN, 2.0], dtype=torch.float64, requires_grad=True)
    inputs["terminated"] = None
    outputs = call(op, inputs)
    assert all((output[0] == 0).all() for output in outputs)
    sum(output.sum() for output in outputs).backward()
    assert inputs["bootstrap_value"].grad[0] == 0
    assert inputs["bootstrap_value"].grad[1] != 0


@every_op
@pytest.mark.parametrize("bootstrap", [False, True])
def test_gradcheck(op, bootstrap, random_rows):
    inputs = random_rows(2, 5, seed=5)
    if bootstrap:
        inputs = with_bootstrap(inputs)
    names = RETURNS[op][0] + RETURNS[op][1]
    names = names + (["bootstrap_value"] if bootstrap else ["next_values"])
    leaves = [inputs[name].detach().requires_grad_() for name in names]

    def outputs(*leaves):
        return call(op, inputs | dict(zip(names, leaves, strict=True)))

    assert torch.autograd.gradcheck(outputs, leaves)


@every_op
def test_any_leading_shape_and_stride(op, random_rows):
    inputs = random_rows(6, 5, seed=2)
    flat = call(op, inputs)
    shaped = {k: v.T.contiguous().T.unflatten(0, (2, 3)) for k, v in inputs.items()}
    assert not shaped["rewards"].is_contiguous()
    single = call(op, {k: v[4] for k, v in inputs.items()})
    for got, expected, one in zip(call(op, shaped), flat, single, strict=True):
        assert got.shape == (2, 3, 5)
        torch.testing.assert_close(got.flatten(0, 1), expected, rtol=0, atol=0)
        torch.testing.assert_close(one, expected[4], rtol=0, atol=0)


@every_op
@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0,)])
def test_empty(op, shape):
    inputs = dict.fromkeys(["rewards", "values", "q_values", "log_ratio"], torch.zeros(shape))
    for output in call(op, inputs | {"gamma": 0.9, "gae_lambda": 0.9}):
        assert output.shape == shape and output.dtype == torch.float32


@every_op
def test_constant_rates_are_tensors_of_equal_entries(op, random_rows):
    inputs = random_rows(3, 6, seed=4)
    full = torch.full((3, 6), 0.75, dtype=torch.float64)
    constant = call(op, inputs | {"gamma": 0.75, "gae_lambda": 0.75})
    for got, expected in zip(
        constant, call(op, inputs | {"gamma": full, "gae_lambda": full}), strict=True
    ):
        torch.testing.assert_close(got, expected, rtol=0, atol=0)


@every_op
def test_16_bit_inputs_are_computed_in_float32(op, random_rows):
    inputs = random_rows(2, 6)
    half = {k: v.bfloat16() if v.is_floating_point() else v for k, v in inputs.items()}
    exact = {k: v.double() if v.is_floating_point() else v for k, v in half.items()}
    for got, expected in zip(call(op, half), call(op, exact), strict=True):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)


@every_op
def test_a_rate_of_float64_gives_float64_as_in_the_op(op, random_rows):
    inputs = random_rows(2, 6)
    single = {k: v.float() if v.is_floating_point() else v for k, v in inputs.items()}
    for name in RETURNS[op][1]:
        for output in call(op, single | {name: torch.full((2, 6), 0.9, dtype=torch.float64)}):
            assert output.dtype == torch.float64


@every_op
def test_bad_combinations(op, random_rows):
    inputs = random_rows(2, 6)
    with pytest.raises(ValueError, match=f"{op}: expected next_values with truncated, got None"):
        call(op, inputs | {"next_values": None})
    with pytest.raises(ValueError, match=f"{op}: expected one of bootstrap_value and next_values"):
        call(op, inputs | {"bootstrap_value": torch.zeros(2)})
