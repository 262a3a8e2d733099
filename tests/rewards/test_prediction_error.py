"""Random network distillation: what is familiar loses its bonus, what is new keeps it."""

import json
import math
from types import SimpleNamespace

import pytest
import torch

from fastrl.rewards._moments import Moments
from fastrl.rewards.prediction_error import PredictionError
from fastrl.trainers import _tree

SMALL = dict(vocab_size=50, n=2, dim=8, hidden=32, outputs=8)


def call(reward, ids, **options):
    return reward(["p"] * len(ids), ["c"] * len(ids), ids, **options)


def rows(seed, *shape):
    return torch.randint(50, shape, generator=torch.Generator().manual_seed(seed)).tolist()


def errors_by_hand(reward, ids):
    """The errors of one completion, token by token, with plain loops over the context."""
    out = []
    for t in range(len(ids)):
        context = [ids[k] if k >= 0 else reward.vocab_size for k in range(t - reward.n + 1, t + 1)]
        x = torch.cat([reward._embeddings[i] for i in context])
        outputs = []
        for weights in (reward._target, reward._predictor):
            h = x
            for i in range(0, len(weights), 2):
                h = h @ weights[i].detach() + weights[i + 1].detach()
                h = h.clamp(min=0) if i + 2 < len(weights) else h
            outputs.append(h)
        out.append(float((outputs[0] - outputs[1]).square().mean()))
    return out


def test_bonuses_are_errors_over_the_deviation_of_all_so_far():
    reward = PredictionError(**SMALL, scale=2.0, passes=3)
    seen = []
    for ids in ([[1, 2, 3], [4], []], [[2, 3], [1, 2, 3], [7, 7, 7]]):
        errors = [errors_by_hand(reward, row) for row in ids]
        seen += [e for row in errors for e in row]
        deviation = float(torch.tensor(seen, dtype=torch.float64).std(correction=0))
        expected = [[2.0 * e / deviation for e in row] for row in errors]
        given = call(reward, ids)
        assert [len(row) for row in given] == [len(row) for row in ids]
        for row, by_hand in zip(given, expected, strict=True):
            assert row == pytest.approx(by_hand, rel=1e-4)


def test_training_is_adam_on_the_mean_squared_error():
    reward = PredictionError(**SMALL, learning_rate=0.01)
    ids = rows(0, 3, 4)
    x = torch.cat([reward._inputs(row) for row in ids])
    before = [w.detach().clone().requires_grad_() for w in reward._predictor]
    h = (x @ before[0] + before[1]).relu()
    h = (h @ before[2] + before[3]).relu() @ before[4] + before[5]
    target = (x @ reward._target[0]).relu() @ reward._target[2]
    (h - target).square().mean().backward()
    call(reward, ids)
    for weight, old in zip(reward._predictor, before, strict=True):
        step = 0.01 * old.grad / (old.grad.abs() + 1e-8)  # Adam's first
        torch.testing.assert_close(weight.detach(), (old - step).detach(), rtol=1e-4, atol=1e-6)


def test_what_is_repeated_loses_its_bonus_and_what_is_new_keeps_it():
    reward = PredictionError(**SMALL, learning_rate=3e-3)
    familiar = [[1, 2, 3, 4, 5, 6], [7, 8, 9, 8, 7, 8]]
    new = [[21, 22, 23, 24, 25, 26], [31, 32, 33, 34, 35, 36]]
    frozen = PredictionError(**SMALL, passes=0)

    def error(model, ids):
        state = model.state_dict()
        mean = {}
        call(model, ids, log_metric=mean.__setitem__)
        model.load_state_dict(state)
        return mean["prediction_error/error"]

    nothing = {}
    assert call(reward, [[]], log_metric=nothing.__setitem__) == [[]] and not nothing
    start = error(reward, familiar), error(reward, new)
    first = [sum(row) for row in call(reward, familiar)]
    for _ in range(200):
        last = [sum(row) for row in call(reward, familiar)]
    assert all(b < 0.1 * a for a, b in zip(first, last, strict=True))
    assert error(reward, familiar) < 0.02 * start[0]
    assert error(reward, new) > 0.4 * start[1]
    assert error(frozen, familiar) == start[0]


def test_state_goes_on_bit_for_bit_and_torchs_generator_is_left_alone():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    one, other = PredictionError(**SMALL), PredictionError(**SMALL)
    batches = [rows(seed, 4, 7) for seed in range(6)]
    with torch.inference_mode():  # as an evaluation may call it
        call(one, batches[0])
    for batch in batches[1:3]:
        call(one, batch)
    document, tensors = _tree.flatten(one.state_dict())
    state = _tree.unflatten(json.loads(json.dumps(document)), tensors.__getitem__)
    expected = [call(one, batch) for batch in batches[3:]]
    other.load_state_dict(state)
    assert [call(other, batch) for batch in batches[3:]] == expected
    other.load_state_dict(state)  # loading copies too
    assert call(other, batches[3]) == expected[0]
    fresh = PredictionError(**SMALL)
    fresh_state = fresh.state_dict()
    first = call(fresh, batches[3])
    assert first != expected[0]
    fresh.load_state_dict(fresh_state)  # of before the first training
    assert call(fresh, batches[3]) == first
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("change", [{"seed": 1}, {"hidden": 16}])
def test_a_state_of_other_networks_is_refused(change):
    with pytest.raises(ValueError, match="expected the state of the same networks"):
        PredictionError(**SMALL).load_state_dict(PredictionError(**SMALL | change).state_dict())


def test_features_of_ones_own_sums_and_annealing():
    table = torch.randn(50, 6, generator=torch.Generator().manual_seed(1))
    options = dict(hidden=32, outputs=8, passes=0, feature_size=6, features=lambda i: table[i])
    per_token = call(PredictionError(**options), [[1, 2, 3], [], [4]])
    sums = call(PredictionError(**options, immediate=False), [[1, 2, 3], [], [4]])
    assert sums == pytest.approx([math.fsum(row) for row in per_token]) and sums[0] > 0
    half = PredictionError(**options, immediate=False, anneal_steps=4)
    state = SimpleNamespace(global_step=2)
    given = call(half, [[1, 2, 3], [], [4]], trainer_state=state)
    assert given == pytest.approx([total / 2 for total in sums])
    with pytest.raises(ValueError, match=r"expected features \[T, feature_size\] = \(2, 5\)"):
        call(PredictionError(**options | {"feature_size": 5}), [[1, 2]])
    assert call(PredictionError(**options), [[], []]) == [[], []]
    assert call(PredictionError(**options), [[1, 1]]) == [[0.0, 0.0]]  # errors do not differ


def test_moments_come_in_parts():
    values = torch.randn(100, dtype=torch.float64) * 3 + 1e4
    moments = Moments()
    for part in values.split([1, 0, 60, 39]):
        moments.merge(part.tolist(), part.abs().tolist())
    assert moments.deviation(sample=False) == pytest.approx(
        float(values.std(correction=0)), rel=1e-9
    )


def test_bad_arguments_are_refused():
    for message, options in (
        ("either vocab_size", {}),
        ("either vocab_size", {"vocab_size": 5, "features": len, "feature_size": 1}),
        ("either vocab_size", {"features": len}),
        ("n to be", {"vocab_size": 5, "n": 0}),
        ("passes to be", {"vocab_size": 5, "passes": -1}),
        ("learning_rate above 0", {"vocab_size": 5, "learning_rate": 0.0}),
        ("scale", {"vocab_size": 5, "scale": float("nan")}),
    ):
        with pytest.raises(ValueError, match=f"PredictionError: expected {message}"):
            PredictionError(**options)
    with pytest.raises(ValueError, match=r"expected token ids in \[0, 50\)"):
        call(PredictionError(**SMALL), [[1, 50]])
