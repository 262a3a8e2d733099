"""TorchRL's vtrace_advantage_estimate: ours against the original, by hand, and where they part."""

import math

import pytest
import torch
from compat.steps import ENDS, SHAPES, assert_same, both, log_probs, trajectories

from fastrl.compat import vtrace_advantage_estimate


@pytest.fixture
def original(torchrl_value):
    return torchrl_value.functional.vtrace_advantage_estimate


def case(shape, time_dim, *, dtype=torch.float32, ends="both", one_network=False):
    made = trajectories(shape, time_dim, dtype=dtype, ends=ends) | log_probs(shape, dtype)
    if one_network:  # the next state's value is the next step's value, inside a trajectory
        value, next_value = (
            made[k].movedim(time_dim, 0) for k in ("state_value", "next_state_value")
        )
        inside = ~made["done"].movedim(time_dim, 0)[:-1]
        next_value[:-1] = torch.where(inside, value[1:], next_value[:-1])
    return made | {"gamma": 0.97}


@pytest.mark.parametrize("one_network", [True, False])
@pytest.mark.parametrize("ends", ENDS)
@pytest.mark.parametrize("shape, time_dim", SHAPES)
def test_values_and_gradients(original, shape, time_dim, ends, one_network):
    arguments = case(shape, time_dim, ends=ends, one_network=one_network)
    assert_same(*both(vtrace_advantage_estimate, original, arguments), torch.float32)


@pytest.mark.parametrize("rho, c", [(1.0, 1.0), (0.5, 0.8), (2.0, 0.3), (math.inf, math.inf)])
def test_bounds(original, rho, c):
    arguments = case((4, 30, 1), -2)
    for kind in (float, torch.tensor, lambda x: torch.tensor([x])):
        bounds = {"rho_thresh": kind(rho), "c_thresh": kind(c)}
        ours, theirs = both(vtrace_advantage_estimate, original, arguments | bounds)
        assert_same(ours, theirs, torch.float32)


@pytest.mark.parametrize("one_network", [True, False])
@pytest.mark.parametrize("shape, time_dim", SHAPES[3:])
def test_gamma_per_step(original, shape, time_dim, one_network):
    """With its gradient, which is fastrl.reference's, and without."""
    arguments = case(shape, time_dim, one_network=one_network)
    arguments["gamma"] = 0.8 + 0.2 * torch.rand(shape)
    ours, theirs = both(vtrace_advantage_estimate, original, arguments)
    assert_same(ours, theirs, torch.float32)
    for x, y in zip(vtrace_advantage_estimate(**arguments), ours[0], strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)


def test_one_entry_per_step_with_time_first(original):
    """[T], and no entry per feature, also where there are as many of these."""
    arguments = case((5, 3, 5), 0, ends="done")
    arguments |= {"gamma": torch.rand(5), **log_probs((5,))}
    assert_same(*both(vtrace_advantage_estimate, original, arguments), torch.float32)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("which", ["all", "state_value", "log_mu", "reward"])
def test_dtypes(original, dtype, which):
    arguments = case((3, 9, 2), -2)
    for k, x in arguments.items():
        if isinstance(x, torch.Tensor) and x.is_floating_point() and which in ("all", k):
            arguments[k] = x.to(dtype)
    ours, theirs = both(vtrace_advantage_estimate, original, arguments)
    assert_same(ours, theirs, torch.float32 if dtype == torch.float64 else dtype)


def test_features_may_share_an_action(original):
    arguments = case((3, 9, 2), -2)
    for name in ("log_pi", "log_mu", "terminated"):
        arguments[name] = arguments[name][..., :1]
    arguments["done"] = arguments["done"] | arguments["terminated"]
    assert_same(*both(vtrace_advantage_estimate, original, arguments), torch.float32)


def test_by_hand():
    """gamma = 1/2, pi / mu = [2, 1/2, 2, 1], bounds 1; step 1 truncated, step 2 terminated.

    delta = [1 (1 + 2 - 2), 1/2 (2 + 4 - 4), 1 (0 - 6), 1 (1 + 1 - 1)] = [1, 1, -6, 1];
    vs = [2 + 1 + 1/2, 4 + 1, 6 - 6, 1 + 1];
    A = [1 + 5/2 - 2, 1/2 (2 + 8/2 - 4), 0 - 6, 1 + 2/2 - 1]
    """
    arguments = {
        "gamma": 0.5, "log_pi": torch.tensor([2.0, 0.5, 2.0, 1.0]).log(), "log_mu": torch.zeros(4),
        "reward": torch.tensor([1.0, 2, 0, 1]), "state_value": torch.tensor([2.0, 4, 6, 1]),
        "next_state_value": torch.tensor([4.0, 8, 99, 2]),
        "done": torch.tensor([False, True, True, False]),
        "terminated": torch.tensor([False, False, True, False]),
    }  # fmt: skip
    advantage, value_target = vtrace_advantage_estimate(**arguments, time_dim=-1)
    torch.testing.assert_close(advantage, torch.tensor([1.5, 1, -6, 1]))
    torch.testing.assert_close(value_target, torch.tensor([3.5, 5, 0, 2]))


@pytest.mark.parametrize("one_network", [True, False])
def test_nothing_crosses_the_end_of_a_trajectory(one_network):
    """Each trajectory is as if it stood alone. TorchRL's advantages were not at truncations, where
    they took the next trajectory's first value target, until its pull request 4210."""
    arguments = case((1, 60, 1), -2, ends="truncated", one_network=one_network)
    found = vtrace_advantage_estimate(**arguments)
    ends = [0, *(arguments["done"].flatten().nonzero().flatten() + 1).tolist(), 60]
    assert len(ends) > 6
    for begin, end in zip(ends, ends[1:], strict=False):
        alone = {
            k: x[:, begin:end] if isinstance(x, torch.Tensor) else x for k, x in arguments.items()
        }
        for x, y in zip(found, vtrace_advantage_estimate(**alone), strict=True):
            torch.testing.assert_close(x[:, begin:end], y)


def test_a_truncation_by_hand():
    """Two trajectories without reward, worth 1 and 100: A_1 was 99 before that pull request."""
    value = torch.tensor([1.0, 1, 100, 100])
    done = torch.tensor([False, True, False, True])
    advantage, value_target = vtrace_advantage_estimate(
        1.0, value, value, value, value, 0 * value, done, done & False, time_dim=-1
    )
    assert advantage.tolist() == [0, 0, 0, 0] and value_target.tolist() == value.tolist()


def test_terminated_without_done(original):
    """done is the end of a trajectory for whatever reason. Where a terminated step lacks it, theirs
    lets the next trajectory's corrections in; ours is theirs with done as documented."""
    arguments = case((3, 20, 1), -2)
    mended = arguments | {"done": arguments["done"] | arguments["terminated"]}
    arguments["done"] = arguments["done"] & ~arguments["terminated"]
    ours, theirs = vtrace_advantage_estimate(**arguments), original(**mended)
    assert (original(**arguments)[1] - theirs[1]).abs().max() > 0.1
    for x, y in zip(ours, theirs, strict=True):
        torch.testing.assert_close(x, y, rtol=2e-5, atol=2e-5)


def test_nothing_behind_a_termination_is_looked_at(original):
    arguments = case((3, 20, 1), -2)
    expected = vtrace_advantage_estimate(**arguments)
    arguments["next_state_value"].masked_fill_(arguments["terminated"], math.nan)
    for x, y in zip(vtrace_advantage_estimate(**arguments), expected, strict=True):
        assert torch.equal(x, y)
    assert original(**arguments)[0].isnan().any()


def test_time_dim_as_the_last_positional_argument():
    """Theirs does not transpose then, and stacks along it."""
    names = (
        "gamma", "log_pi", "log_mu", "state_value", "next_state_value", "reward", "done",
        "terminated",
    )  # fmt: skip
    arguments = case((2, 3, 9), -1)
    expected = vtrace_advantage_estimate(**arguments)
    found = vtrace_advantage_estimate(*(arguments[k] for k in names), 1.0, 1.0, -1)
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


def test_both_paths_of_the_values_agree():
    """Whether anything requires grad decides if equal values are left alone: bitwise the same."""
    arguments = case((3, 20, 2), -2, one_network=True)
    expected = vtrace_advantage_estimate(**arguments)
    arguments["state_value"].requires_grad_()
    found = vtrace_advantage_estimate(**arguments)
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


def test_their_module_on_our_function(torchrl_value, monkeypatch):
    from tensordict import TensorDict
    from tensordict.nn import ProbabilisticTensorDictModule, ProbabilisticTensorDictSequential

    actor = ProbabilisticTensorDictSequential(
        ProbabilisticTensorDictModule(
            ["loc", "scale"], ["action"], distribution_class=torch.distributions.Normal,
            return_log_prob=True,
        )
    )  # fmt: skip
    estimator = torchrl_value.VTrace(gamma=0.97, actor_network=actor, value_network=None)
    shape = (3, 20, 1)
    arguments = case(shape, -2)
    after = {"state_value": "next_state_value"} | {k: k for k in ("reward", "done", "terminated")}
    data = {
        "loc": torch.randn(shape), "scale": torch.ones(shape), "action": torch.randn(shape),
        "action_log_prob": arguments["log_mu"], "state_value": arguments["state_value"],
        "next": {k: arguments[v] for k, v in after.items()},
    }  # fmt: skip
    expected = estimator(TensorDict(data, shape[:2]))
    calls = []

    def count(*args, **kwargs):
        calls.append(1)
        return vtrace_advantage_estimate(*args, **kwargs)

    monkeypatch.setattr(torchrl_value.advantages, "vtrace_advantage_estimate", count)
    found = estimator(TensorDict(data, shape[:2]))
    assert calls and expected["advantage"].abs().max() > 0.1
    for name in ("advantage", "value_target"):
        torch.testing.assert_close(found[name], expected[name], rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("shape, time_dim", [((0, 5, 1), -2), ((3, 0, 1), -2), ((0,), -1)])
@pytest.mark.parametrize("learns", [False, True])
def test_nothing_in_it(shape, time_dim, learns):
    arguments = case(shape, time_dim)
    arguments["state_value"].requires_grad_(learns)
    found = vtrace_advantage_estimate(**arguments)
    assert [x.shape for x in found] == [shape, shape]


def test_strides_and_compiling():
    arguments = case((9, 3, 2), -2)
    strided = {
        k: x.transpose(0, 2).contiguous().transpose(0, 2) if isinstance(x, torch.Tensor) else x
        for k, x in arguments.items()
    }
    expected = vtrace_advantage_estimate(**arguments)
    for x, y in zip(vtrace_advantage_estimate(**strided), expected, strict=True):
        assert torch.equal(x, y)
    compiled = torch.compile(vtrace_advantage_estimate, fullgraph=True)
    for x, y in zip(compiled(**arguments), expected, strict=True):
        torch.testing.assert_close(x, y)


X = torch.zeros(2, 5, 1)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"done": X.int()}, TypeError, "expected done of dtype bool"),
        (
            {"log_pi": X[:, :4], "log_mu": X[:, :4]},
            ValueError,
            "log_pi - log_mu that broadcasts to",
        ),
        ({"terminated": X[:, :2].bool()}, ValueError, "terminated that broadcasts to reward"),
        ({"terminated": X}, TypeError, "terminated of dtype bool"),
        ({"rho_thresh": X}, ValueError, r"rho_thresh of one entry, got \(2, 5, 1\)"),
        ({"c_thresh": torch.ones((), requires_grad=True)}, ValueError, "c_thresh without gradient"),
        ({"time_dim": -4}, ValueError, "time_dim to be a dimension of reward"),
        ({"gamma": 1.01}, ValueError, r"gamma in \[0, 1\], got 1.01"),
    ],
)
def test_what_is_refused(change, error, message):
    arguments = {
        "gamma": 0.9, "log_pi": X, "log_mu": X, "state_value": X, "next_state_value": X,
        "reward": X, "done": X.bool(),
    }  # fmt: skip
    with pytest.raises(error, match=message):
        vtrace_advantage_estimate(**(arguments | change))
