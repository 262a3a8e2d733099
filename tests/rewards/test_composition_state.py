"""Compositions over a run: weights that change, and states that go through a checkpoint."""

import copy
import json
import math
import random
from types import SimpleNamespace

import pytest
import torch

from fastrl.models import LSTMLanguageModel
from fastrl.rewards.composition import (
    Clipped,
    Minimum,
    NormalizedSum,
    Product,
    RunningNormalized,
    SaturationSchedule,
    Scaled,
    StepSchedule,
    WeightedSum,
)
from fastrl.trainers import PolicyGradientConfig, PolicyGradientTrainer
from fastrl.trainers._tree import flatten, unflatten


def call(reward, step=None, count=2, **arguments):
    if step is not None:
        arguments["trainer_state"] = SimpleNamespace(global_step=step)
    return reward(["a"] * count, ["x"] * count, [[1, 2]] * count, **arguments)


def constant(value):
    return lambda completions: [value] * len(completions)


POINTS = [[2, 1.0], [6, 0.3], [8, -0.1]]


@pytest.mark.parametrize(
    "shape, between",
    [
        ("linear", {3: 0.825, 4: 0.65, 7: 0.1}),
        ("cosine", {3: 1 - 0.7 * (1 - math.sqrt(0.5)) / 2, 4: 0.65, 7: 0.1}),
        ("constant", {3: 1.0, 4: 1.0, 5.999: 1.0, 7: 0.3}),
    ],
)
def test_step_schedules(shape, between):
    schedule = StepSchedule(POINTS, shape)
    assert {step: schedule(step) for step in (0, 2, 6, 8, 9)} == {
        0: 1.0, 2: 1.0, 6: 0.3, 8: -0.1, 9: -0.1,
    }  # fmt: skip
    assert {step: schedule(step) for step in between} == pytest.approx(between, abs=1e-15)
    assert StepSchedule([(5, 2.0)], shape)(0) == StepSchedule([(5, 2.0)], shape)(7) == 2


def test_weights_follow_the_trainers_step():
    logged = {}
    weights = {"up": StepSchedule([(0, 0.0), (4, 8.0)]), "own": lambda step: -step, "fixed": 0.5}
    reward = WeightedSum(dict.fromkeys(weights, constant(1.0)), weights)
    for step in range(6):
        found = call(reward, step, log_metric=lambda name, x: logged.update({name: x}))
        assert found == [min(8, 2 * step) - step + 0.5] * 2
        assert logged["rewards/weighted_sum/own/weight"] == -step
    with pytest.raises(ValueError, match="trainer_state with global_step .* part up, got none"):
        call(reward)
    reward = WeightedSum([constant(1.0)], [lambda step: math.inf])
    with pytest.raises(ValueError, match="finite weight of part lambda, got inf"):
        call(reward, 0)


def test_a_saturated_part_gives_way():
    # running means: 0.2, 0.95, twice the same, 1.1, 0.55, 0.275
    levels = [0.2, 1.7, math.nan, None, 1.25, 0.0, 0.0]
    left, logged = iter(levels), []

    def part(completions):
        return [next(left), None]

    def log_metric(name, value):
        if name.endswith("/weight"):
            logged.append(value)

    schedule = SaturationSchedule(2.0, 1.0, at=0.9, decay=0.5)
    reward = WeightedSum([part], [schedule])
    found = [call(reward, log_metric=log_metric)[0] for _ in levels]
    assert logged == pytest.approx([2, 2, 1.5, 1.5, 1.5, 1, 2])
    assert found[:2] == [0.4, 3.4] and schedule.mean == pytest.approx(0.275)

    schedule = SaturationSchedule(1, -1, at=2, decay=0.0, ceiling=6)
    weights = []
    for mean in (1, 2, 3, 5, 6, 7, 4):
        schedule.observe(mean)
        weights.append(schedule())
    assert weights == [1, 1, 0.5, -0.5, -1, -1, 0]


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: StepSchedule([]), "StepSchedule: expected points .* got \\[\\]"),
        (lambda: StepSchedule([(1, 1), (1, 2)]), "steps rising"),
        (lambda: StepSchedule([(1, 1), (2, 2, 3)]), "pairs"),
        (lambda: StepSchedule([(1, math.nan)]), "finite"),
        (lambda: StepSchedule([(1, 1)], "square"), "one of 'linear', .* got 'square'"),
        (lambda: SaturationSchedule(1, 0, at=1.0), "at < ceiling finite, .* at = 1.0, ceiling = 1"),
        (lambda: SaturationSchedule(1, math.inf), "finite, got start = 1, end = inf"),
        (lambda: SaturationSchedule(1, 0, decay=1.0), r"decay in \[0, 1\), got 1.0"),
    ],
)
def test_schedules_check_their_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_parts_do_not_share_a_schedule_that_remembers():
    schedule, steps = SaturationSchedule(1, 0), StepSchedule([(0, 1)])
    with pytest.raises(ValueError, match="a schedule of its own"):
        WeightedSum([constant(1), constant(1)], [schedule, schedule])
    assert call(WeightedSum([constant(1), constant(1)], [steps, steps]), 0) == [2, 2]


class Noisy:
    """Numbers, lists, None and NaN, from a state of its own."""

    def __init__(self, seed, has_lists=True):
        self.random, self.has_lists = random.Random(seed), has_lists

    def __call__(self, completion_ids, **_):
        kinds = [None, math.nan, *["number"] * 4, *["list" if self.has_lists else "number"] * 4]
        found = [self.random.choice(kinds) for _ in completion_ids]
        made = {"number": self.number, "list": lambda: [self.number(), self.number()]}
        return [made[kind]() if isinstance(kind, str) else kind for kind in found]

    def number(self):
        return self.random.gauss(0.5, 0.3)

    def state_dict(self):
        version, internal, gauss = self.random.getstate()
        return {"version": version, "internal": list(internal), "gauss": gauss}

    def load_state_dict(self, state):
        self.random.setstate((state["version"], tuple(state["internal"]), state["gauss"]))


def everything(seed):
    """One of each, in one another."""
    running = RunningNormalized(Noisy(seed), decay=0.75, clip=2.0)
    worst = Minimum({"a": Noisy(seed + 1), "b": running}, over="running")
    weights = [SaturationSchedule(1.0, 0.1, at=0.1, decay=0.5), StepSchedule(POINTS), -0.5]
    total = NormalizedSum(
        [worst, Clipped(Noisy(seed + 2), 0, 1), Noisy(seed + 3)], weights, over="running"
    )
    return WeightedSum(
        {"p": Product([total, Noisy(seed + 4, has_lists=False)]), "s": Scaled(Noisy(seed + 5))}
    )


def through_a_checkpoint(state):
    document, tensors = flatten(state)
    return unflatten(json.loads(json.dumps(document)), tensors.__getitem__)


def test_a_resumed_composition_goes_on_bit_by_bit():
    def rewards(reward, steps):
        return [repr(call(reward, step, count=5)) for step in steps]

    whole = rewards(everything(0), range(8))
    first, second = everything(0), everything(50)
    before = rewards(first, range(3))
    state = through_a_checkpoint(first.state_dict())
    rewards(second, range(2))  # what it starts from does not matter
    second.load_state_dict(state)
    assert second.state_dict() == state
    assert before + rewards(second, range(3, 8)) == whole

    # As an evaluation does it.
    reward = everything(0)
    assert rewards(reward, range(3)) == before
    remembered = copy.deepcopy(reward.state_dict())
    rewards(reward, range(4))
    reward.load_state_dict(remembered)
    assert rewards(reward, range(3, 8)) == whole[3:]


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: NormalizedSum({"a": Noisy(0)}, over="running", name="x"), None),
        (
            lambda: NormalizedSum({"b": Noisy(0)}, over="running"),
            r"NormalizedSum normalized_sum: expected states of the parts \['b'\], got \['a'\]",
        ),
        (
            lambda: NormalizedSum({"a": Noisy(0), "b": len}, over="running"),
            r"NormalizedSum: expected running statistics of the parts \['a', 'b'\], got \['a'\]",
        ),
        (lambda: NormalizedSum({"a": Noisy(0)}), r"running statistics of the parts \[\], got"),
        (
            lambda: NormalizedSum({"a": Noisy(0)}, [SaturationSchedule(1, 0)], over="running"),
            r"states of the schedules of the parts \['a'\], got \[\]",
        ),
        (lambda: WeightedSum({"a": Noisy(0)}), r"a state with \['parts', 'weights'\], got"),
        (lambda: Minimum({"a": Noisy(0)}), r"Minimum minimum: expected a state with \['parts'\]"),
    ],
)
def test_a_state_of_other_parts_is_refused(make, message):
    reward = NormalizedSum({"a": Noisy(0)}, over="running")
    call(reward)
    if message is None:
        make().load_state_dict(reward.state_dict())
        return
    with pytest.raises(ValueError, match=message):
        make().load_state_dict(reward.state_dict())


def test_a_run_with_a_composition_resumes_bit_by_bit(tmp_path):
    prompts = [torch.tensor([1, 2, 3]), torch.tensor([4]), torch.tensor([2, 5])]
    config = PolicyGradientConfig(
        max_new_tokens=4, prompts_per_step=3, completions_per_prompt=4, max_steps=6,
        learning_rate=0.01,
    )  # fmt: skip

    def dense(completion_ids, **_):
        return [[token / 8 for token in ids] for ids in completion_ids]

    def short(completion_ids):
        return [1.0 - len(ids) / 4 if ids[0] else None for ids in completion_ids]

    def make():
        torch.manual_seed(0)
        model = LSTMLanguageModel(8, 8, 24, 1)
        weights = [SaturationSchedule(1.0, 0.5, at=0.2, decay=0.5), StepSchedule([[0, 0], [5, 1]])]
        total = NormalizedSum(
            {"dense": dense, "short": RunningNormalized(short)}, weights, over="running"
        )
        return PolicyGradientTrainer(model, total, prompts, config)

    whole, first, second = make(), make(), make()
    records = whole.train()
    before = first.train(max_steps=3)
    first.evaluate(prompts)
    first.save(tmp_path / "run")
    after = second.resume(tmp_path / "run").train()
    second.evaluate(prompts)

    def shown(records):
        return [{k: repr(v) for k, v in r.items() if k.startswith("reward")} for r in records]

    assert shown(before + after) == shown(records)
    assert records[0]["rewards/normalized_sum/dense/weight"] == 1
    assert 0.5 <= records[3]["rewards/normalized_sum/dense/weight"] < 1
    assert [r["rewards/normalized_sum/short/weight"] for r in records] == pytest.approx(
        [0, 0.2, 0.4, 0.6, 0.8, 1]
    )
    assert second.scorer.state_dict() == whole.scorer.state_dict()
    for ours, theirs in zip(second.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
