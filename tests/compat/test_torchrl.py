"""TorchRL's two functions for GAE: ours against the originals, and by hand where they part."""

import inspect
import math

import pytest
import torch
from compat.steps import ENDS, SHAPES, assert_same, both, trajectories

from fastrl import compat, reference
from fastrl.compat import torchrl as module

NAMES = ["generalized_advantage_estimate", "vec_generalized_advantage_estimate"]


@pytest.fixture(params=NAMES)
def pair(request, torchrl_value):
    """Ours, and the original of that name."""
    return getattr(compat, request.param), getattr(torchrl_value.functional, request.param)


@pytest.mark.parametrize("name", [*NAMES, "vtrace_advantage_estimate"])
def test_signatures_are_those_of_torchrl(torchrl_value, name):
    ours, theirs = getattr(compat, name), getattr(torchrl_value.functional, name)
    parameters = [inspect.signature(f).parameters.values() for f in (ours, theirs)]
    assert [(p.name, p.kind, p.default) for p in parameters[0]] == [
        (p.name, p.kind, p.default) for p in parameters[1]
    ]


@pytest.mark.parametrize("ends", ENDS)
@pytest.mark.parametrize("shape, time_dim", SHAPES)
def test_values_and_gradients(pair, shape, time_dim, ends):
    arguments = trajectories(shape, time_dim, ends=ends) | {"gamma": 0.97, "lmbda": 0.9}
    assert_same(*both(*pair, arguments), torch.float32)


@pytest.mark.parametrize("gamma, lmbda", [(0.0, 0.9), (0.9, 0.0), (1.0, 1.0), (0.5, 0.5)])
def test_discounts(torchrl_value, pair, gamma, lmbda):
    """TorchRL's vectorised form has an IndexError for 0, so its loop is what to be like there."""
    arguments = trajectories((3, 40, 1), -2) | {"gamma": gamma, "lmbda": lmbda}
    original = (
        pair[1] if gamma * lmbda > 0 else torchrl_value.functional.generalized_advantage_estimate
    )
    assert_same(*both(pair[0], original, arguments), torch.float32)
    of_one_entry = arguments | {"gamma": torch.tensor(gamma), "lmbda": torch.tensor([lmbda])}
    for x, y in zip(pair[0](**of_one_entry), pair[0](**arguments), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-6)  # float32 rounds the discount


@pytest.mark.parametrize("shape, time_dim", SHAPES[3:])
@pytest.mark.parametrize("per_step", ["gamma", "lmbda", "gamma lmbda"])
def test_discounts_per_step(pair, shape, time_dim, per_step):
    """With their gradients, which are fastrl.reference's, and without."""
    arguments = trajectories(shape, time_dim) | {"gamma": 0.97, "lmbda": 0.9}
    arguments |= {name: 0.8 + 0.2 * torch.rand(shape) for name in per_step.split()}
    ours, theirs = both(*pair, arguments)
    assert_same(ours, theirs, torch.float32)
    for x, y in zip(pair[0](**arguments), ours[0], strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)


def test_discounts_broadcast(torchrl_value):
    arguments = trajectories((2, 9, 3), -2) | {"lmbda": 0.9}
    original = torchrl_value.functional.generalized_advantage_estimate
    for shape in ((3,), (9, 1), (2, 1, 1), (1, 9, 3)):
        arguments["gamma"] = torch.rand(shape)
        assert_same(
            *both(compat.generalized_advantage_estimate, original, arguments), torch.float32
        )


@pytest.mark.parametrize("shape", [(5, 5), (5, 3, 5), (7, 2)])
def test_a_discount_per_step_with_time_first(pair, shape):
    """[T], and no entry per feature, also where there are as many of these."""
    arguments = trajectories(shape, 0) | {"gamma": torch.rand(shape[0]), "lmbda": 0.9}
    assert_same(*both(*pair, arguments), torch.float32)


def test_a_learned_gamma(torchrl_value):
    """All of its gradient by both names. TorchRL's vectorised form loses that through the sum."""
    gradients = {}
    data = trajectories((3, 20, 1), -2)
    for name in NAMES:
        for functions in (compat, torchrl_value.functional):
            gamma = torch.tensor(0.9, requires_grad=True)
            getattr(functions, name)(gamma, 0.9, **data)[0].sum().backward()
            gradients[name, functions] = gamma.grad
            with torch.no_grad():
                assert not getattr(compat, name)(gamma, 0.9, **data)[0].requires_grad
    loop, vectorised = (
        [gradients[name, f] for f in (compat, torchrl_value.functional)] for name in NAMES
    )
    torch.testing.assert_close(loop[0], loop[1])
    torch.testing.assert_close(vectorised[0], loop[1])
    assert (vectorised[1] - loop[1]).abs() > 0.1


@pytest.mark.parametrize(
    "dtypes",
    [("float64",) * 3, ("float16",) * 3, ("float16", "float16", "float32"),
     ("float32", "float64", "float32"), ("float64", "float32", "float32"),
     ("float32", "float32", "int64")],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("name", NAMES)
def test_dtypes(torchrl_value, name, dtypes):
    arguments = trajectories((3, 9, 2), -2) | {"gamma": 0.9, "lmbda": 0.9}
    for key, dtype in zip(("state_value", "next_state_value", "reward"), dtypes, strict=True):
        arguments[key] = (2 * arguments[key]).to(getattr(torch, dtype))
    coarsest = torch.float16 if "float16" in dtypes else torch.float32
    pair = getattr(compat, name), getattr(torchrl_value.functional, name)
    assert_same(*both(*pair, arguments), coarsest)


def test_float64_is_float64(torchrl_value):
    """TorchRL multiplies the discount with an integer, which makes it a float32."""
    arguments = trajectories((2, 50, 1), -2, dtype=torch.float64)
    done, terminated = arguments["done"], arguments["terminated"]
    truth = reference.gae(
        *(arguments[k].squeeze(-1) for k in ("reward", "state_value")), gamma=0.99, gae_lambda=0.95,
        next_values=arguments["next_state_value"].squeeze(-1),
        terminated=terminated.squeeze(-1), truncated=(done & ~terminated).squeeze(-1),
    )  # fmt: skip
    worst = {}
    for functions in (compat, torchrl_value.functional):
        found = functions.generalized_advantage_estimate(0.99, 0.95, **arguments)
        errors = [(x.squeeze(-1) - y).abs().max() for x, y in zip(found, truth, strict=True)]
        worst[functions] = max(errors)
    assert worst[compat] < 1e-13 and worst[torchrl_value.functional] > 1e-9


def test_by_hand():
    """gamma = lambda = 1/2; step 1 is truncated and its next value counts, step 2 terminated.

    delta = [1 + 2 - 2, 2 + 4 - 4, 0 - 6, 1 + 1 - 1] = [1, 2, -6, 1]; only A_0 looks ahead.
    """
    arguments = {
        "gamma": 0.5, "lmbda": 0.5,
        "reward": torch.tensor([1.0, 2, 0, 1]), "state_value": torch.tensor([2.0, 4, 6, 1]),
        "next_state_value": torch.tensor([4.0, 8, 99, 2]),
        "done": torch.tensor([False, True, True, False]),
        "terminated": torch.tensor([False, False, True, False]),
    }  # fmt: skip
    expected = [1.5, 2, -6, 1], [3.5, 6, 0, 2]
    for name in NAMES:
        function = getattr(compat, name)
        assert tuple(x.tolist() for x in function(**arguments, time_dim=-1)) == expected
        columns = {
            k: x[:, None] if isinstance(x, torch.Tensor) else x for k, x in arguments.items()
        }
        assert tuple(x.squeeze(1).tolist() for x in function(**columns)) == expected


@pytest.mark.parametrize("vectorized", [True, False])
def test_their_module_on_our_functions(torchrl_value, monkeypatch, vectorized):
    from tensordict import TensorDict

    x = trajectories((3, 20, 1), -2)
    after = {"state_value": "next_state_value"} | {k: k for k in ("reward", "done", "terminated")}
    data = {"state_value": x["state_value"], "next": {k: x[v] for k, v in after.items()}}
    estimator = torchrl_value.GAE(
        gamma=0.97, lmbda=0.9, value_network=None, vectorized=vectorized, average_gae=True
    )
    expected = estimator(TensorDict(data, (3, 20)))
    calls = []
    for name in NAMES:

        def count(*args, name=name, **kwargs):
            calls.append(name)
            return getattr(compat, name)(*args, **kwargs)

        monkeypatch.setattr(torchrl_value.advantages, name, count)
    found = estimator(TensorDict(data, (3, 20)))
    assert calls == [NAMES[vectorized]]
    for name in ("advantage", "value_target"):
        torch.testing.assert_close(found[name], expected[name], rtol=2e-5, atol=2e-5)


def test_terminated_without_done(torchrl_value):
    """done is the end of a trajectory for whatever reason. Where a terminated step lacks it, theirs
    lets the next trajectory's advantage in; ours is theirs with done as documented."""
    arguments = trajectories((3, 20, 1), -2) | {"gamma": 0.9, "lmbda": 0.9}
    mended = arguments | {"done": arguments["done"] | arguments["terminated"]}
    arguments["done"] = arguments["done"] & ~arguments["terminated"]
    for name in NAMES:
        ours, theirs = getattr(compat, name), getattr(torchrl_value.functional, name)
        assert (theirs(**arguments)[0] - theirs(**mended)[0]).abs().max() > 0.1
        for x, y in zip(ours(**arguments), theirs(**mended), strict=True):
            torch.testing.assert_close(x, y, rtol=2e-5, atol=2e-5)


def test_nothing_behind_a_termination_is_looked_at(torchrl_value):
    arguments = trajectories((3, 20, 1), -2) | {"gamma": 0.9, "lmbda": 0.9}
    expected = compat.generalized_advantage_estimate(**arguments)
    arguments["next_state_value"].masked_fill_(arguments["terminated"], math.nan)
    for name in NAMES:
        for x, y in zip(getattr(compat, name)(**arguments), expected, strict=True):
            assert torch.equal(x, y)
        assert getattr(torchrl_value.functional, name)(**arguments)[0].isnan().any()


@pytest.mark.parametrize("name", NAMES)
def test_sizes_that_theirs_refuse_or_bend(torchrl_value, name):
    ours = getattr(compat, name)
    for shape, time_dim in (((0, 5, 1), -2), ((3, 0, 1), -2), ((0,), -1), ((2, 3, 0), -2)):
        arguments = trajectories(shape, time_dim)
        assert [x.shape for x in ours(0.9, 0.9, **arguments)] == [shape, shape]
    line = trajectories((5,), 0)
    assert [x.shape for x in ours(0.9, 0.9, **line)] == [(5,), (5,)]
    theirs = getattr(torchrl_value.functional, name)(0.9, 0.9, **line)
    assert [x.shape for x in theirs] == [(5, 1), (5, 1)]
    for x, y in zip(ours(0.9, 0.9, **line), theirs, strict=True):
        torch.testing.assert_close(x, y.squeeze(1), rtol=2e-5, atol=2e-5)


def test_a_tiny_decay(torchrl_value):
    arguments = trajectories((2, 9, 1), -2) | {"gamma": 1e-4, "lmbda": 1e-4}
    with pytest.raises(IndexError):
        torchrl_value.functional.vec_generalized_advantage_estimate(**arguments)
    expected = torchrl_value.functional.generalized_advantage_estimate(**arguments)
    for x, y in zip(compat.vec_generalized_advantage_estimate(**arguments), expected, strict=True):
        torch.testing.assert_close(x, y)


def test_one_feature_is_passed_without_a_copy(monkeypatch):
    seen = {}
    monkeypatch.setattr(module.ops, "gae", lambda **x: seen.update(x) or (x["rewards"],) * 2)
    arguments = trajectories((3, 20, 1), -2)
    found = compat.generalized_advantage_estimate(0.9, 0.9, **arguments)[0]
    assert seen["rewards"].is_contiguous() and seen["rewards"].shape == (3, 1, 20)
    assert seen["rewards"].data_ptr() == arguments["reward"].data_ptr() == found.data_ptr()
    assert seen["truncated"].data_ptr() == arguments["done"].data_ptr()
    assert seen["gamma"] == 0.9 and found.shape == (3, 20, 1)


def test_strides_and_compiling():
    arguments = trajectories((9, 3, 2), -2)
    strided = {
        k: x.transpose(0, 2).contiguous().transpose(0, 2) if isinstance(x, torch.Tensor) else x
        for k, x in arguments.items()
    }
    function = compat.vec_generalized_advantage_estimate
    compiled = torch.compile(function, fullgraph=True)
    expected = function(0.9, 0.95, **arguments)
    for found in (function(0.9, 0.95, **strided), compiled(0.9, 0.95, **strided)):
        assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))
    # What is generated from a graph has been seen above; this is another graph.
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for x, y in zip(compiled(torch.tensor(0.9), 0.95, **arguments), expected, strict=True):
        torch.testing.assert_close(x, y)


X = torch.zeros(2, 5, 1)


@pytest.mark.parametrize(
    "change, error, message",
    [
        (
            {"done": X.int()},
            TypeError,
            r"expected done of dtype bool, got torch.int32. Use done.bool",
        ),
        ({"terminated": X}, TypeError, "terminated of dtype bool"),
        ({"done": X[..., 0].bool()}, ValueError, r"done \(2, 5, 1\) like reward, got \(2, 5\)"),
        ({"state_value": X[:, :4]}, ValueError, r"state_value \(2, 5, 1\) like reward"),
        ({"next_state_value": X.int()}, TypeError, "next_state_value of dtype float32"),
        ({"reward": 1.0}, TypeError, "reward as a tensor, got float"),
        ({"time_dim": 3}, ValueError, r"time_dim to be a dimension of reward \(2, 5, 1\), got 3"),
        ({"time_dim": -4}, ValueError, "time_dim to be a dimension"),
        ({"gamma": X[:, :3]}, ValueError, r"gamma that broadcasts to reward .*, got \(2, 3, 1\)"),
        ({"lmbda": torch.ones(1, 2, 5, 3)}, ValueError, "lmbda that broadcasts to reward"),
        ({"gamma": 1.01}, ValueError, r"gamma in \[0, 1\], got 1.01"),
        ({"gamma": X + 2}, ValueError, r"gamma in \[0, 1\], got entries outside it"),
    ],
)
@pytest.mark.parametrize("name", NAMES)
def test_what_is_refused(name, change, error, message):
    arguments = {
        "gamma": 0.9, "lmbda": 0.9, "state_value": X, "next_state_value": X, "reward": X,
        "done": X.bool(), "terminated": X.bool(),
    }  # fmt: skip
    with pytest.raises(error, match=message):
        getattr(compat, name)(**(arguments | change))


def test_one_dimension_wants_its_time_dim():
    with pytest.raises(ValueError, match=r"reward \(5,\), got -2. Pass .*: -1 for \[T\]"):
        compat.generalized_advantage_estimate(
            0.9, 0.9, X[0, :, 0], X[0, :, 0], X[0, :, 0], X[0, :, 0].bool()
        )
