"""What changes from step to step, by hand and in short runs: rates, temperatures, coefficients."""

import math

import pytest
import torch

from fastrl.trainers import PolicyGradientConfig
from fastrl.trainers.schedules import EntropyController, KLController, learning_rate, temperature


def config(**fields):
    return PolicyGradientConfig(**fields)


@pytest.mark.parametrize(
    "fields, rates",
    [
        ({}, [0.4] * 9),
        ({"warmup_steps": 4}, [0.1, 0.2, 0.3, 0.4, 0.4, 0.4, 0.4, 0.4, 0.4]),
        ({"lr_schedule": "linear"}, [0.4, 0.35, 0.3, 0.25, 0.2, 0.15, 0.1, 0.05, 0]),
        (
            {"lr_schedule": "linear", "warmup_steps": 4},
            [0.1, 0.2, 0.3, 0.4, 0.4, 0.3, 0.2, 0.1, 0],
        ),
        (
            {"lr_schedule": "cosine", "warmup_steps": 4},
            [0.1, 0.2, 0.3, 0.4]
            + [0.2 * (1 + math.cos(math.pi * x)) for x in (0, 0.25, 0.5, 0.75, 1)],
        ),
    ],
)
def test_learning_rates(fields, rates):
    whole = config(learning_rate=0.4, max_steps=8, **fields)
    assert [learning_rate(whole, step) for step in range(9)] == pytest.approx(rates, abs=1e-12)
    assert learning_rate(whole, 100) == pytest.approx(rates[-1])


def test_temperatures():
    whole = config(temperature=2.0, temperature_end=0.5, max_steps=4)
    assert [temperature(whole, s) for s in range(6)] == [2.0, 1.5, 1.0, 0.5, 0.5, 0.5]
    assert [temperature(config(temperature=0.7), s) for s in (0, 50)] == [0.7, 0.7]
    assert temperature(config(temperature_end=2.0, max_steps=1), 0) == 1.0


def test_the_rates_are_those_of_the_optimizer(make_trainer):
    """AdamW's first step moves each weight with a gradient by the rate."""
    trainer = make_trainer(learning_rate=0.4, warmup_steps=4, lr_schedule="cosine", max_steps=8)
    before = trainer.policy.lm_head.bias.detach().clone()
    records = trainer.train(max_steps=1)
    moved = (trainer.policy.lm_head.bias - before).abs()
    assert moved.max().item() == pytest.approx(0.1, rel=1e-3)
    records += trainer.train()
    expected = [learning_rate(trainer.config, step) for step in range(8)]
    assert [r["learning_rate"] for r in records] == pytest.approx(expected)
    assert [r["epoch"] for r in records] == [1, 2, 3, 4, 5, 6, 7, 8]


@pytest.mark.parametrize("kind", ["policy_gradient", "actor_critic"])
def test_sampling_and_learning_have_the_same_temperature(make_trainer, kind):
    trainer = make_trainer(kind, temperature=2.0, temperature_end=0.5, max_steps=4)
    records = trainer.train()
    assert [r["temperature"] for r in records] == [2.0, 1.5, 1.0, 0.5]
    assert all(r["logprob_gap"] < 1e-5 for r in records)
    assert records[-1]["entropy"] < records[0]["entropy"] - 0.01


def test_kl_controller_by_hand():
    """Ziegler et al. 2019, section 2.2: 5 % off changes by 5 % in a horizon, far off by 20 %."""
    controller = KLController(0.1, target=2.0, horizon=100)
    controller.update(2.1, completions=50)
    assert controller.coef == pytest.approx(0.1 * (1 + 0.05 * 0.5))
    controller.update(100.0, completions=50)
    assert controller.coef == pytest.approx(0.1025 * 1.1)
    controller.update(0.0, completions=10)
    assert controller.coef == pytest.approx(0.1025 * 1.1 * 0.98)
    last = controller.coef
    controller.update(math.nan, completions=50)
    controller.update(2.0, completions=50)
    assert controller.coef == last
    controller.update(0.0, completions=10**6)  # more than a horizon at once
    assert controller.coef == pytest.approx(0.8 * last)
    fixed = KLController(0.1, target=None, horizon=100)
    fixed.update(100.0, completions=50)
    assert fixed.coef == 0.1
    fixed.load_state_dict(controller.state_dict())
    assert fixed.coef == controller.coef


def test_entropy_controller_by_hand():
    controller = EntropyController(0.1, target=1.0, rate=0.2)
    controller.update(0.5)
    assert controller.coef == pytest.approx(0.2)
    controller.update(1.25)
    assert controller.coef == pytest.approx(0.15)
    controller.update(math.nan)
    assert controller.coef == pytest.approx(0.15)
    controller.update(5.0)
    assert controller.coef == 0  # never a penalty
    controller.update(0.9)
    assert controller.coef == pytest.approx(0.02)
    fixed = EntropyController(0.1, target=None, rate=0.2)
    fixed.update(0.0)
    assert fixed.coef == 0.1


def mean_of_last(records, name, count=30):
    return sum(r[name] for r in records[-count:]) / count


STEERED = {"max_steps": 80, "baseline": "rloo", "gamma": 0.0, "completions_per_prompt": 8}


@pytest.mark.parametrize("kl_in, start", [("loss", 0.3), ("reward", 1.0)])
def test_the_divergence_comes_to_its_target(make_trainer, kl_in, start):
    """From a coefficient that is too small, with which it would come to 1.2, or too large."""
    records = make_trainer(
        kl_coef=start, kl_in=kl_in, kl_target=0.4, kl_horizon=120, learning_rate=0.02, **STEERED
    ).train()
    assert mean_of_last(records, "kl") == pytest.approx(0.4, abs=0.15)
    assert 0.4 < records[-1]["kl_coef"] < 0.7
    controller = KLController(start, 0.4, 120)
    for record in records:  # a step learns with what the steps before it have made of it
        assert record["kl_coef"] == pytest.approx(controller.coef)
        controller.update(record["kl"], 24)


def test_the_entropy_comes_to_its_target(make_trainer):
    """Each from the same coefficient."""
    options = {"entropy_coef": 0.4, "entropy_rate": 0.01, "learning_rate": 0.03}
    low, high = (
        make_trainer(entropy_target=target, **options, **STEERED).train() for target in (1.0, 1.3)
    )
    assert mean_of_last(low, "entropy") == pytest.approx(1.0, abs=0.14)
    assert mean_of_last(high, "entropy") == pytest.approx(1.3, abs=0.14)
    controller = EntropyController(0.4, 1.3, 0.01)
    for record in high:
        assert record["entropy_coef"] == pytest.approx(controller.coef)
        controller.update(record["entropy"])


def test_the_divergence_is_measured_as_often_as_asked(make_trainer):
    every, third, never = (
        make_trainer(kl_every=n, max_steps=7, learning_rate=0.01).train() for n in (1, 3, 0)
    )
    assert ["kl" in r for r in every] == [True] * 7
    assert ["kl" in r for r in third] == [True, False, False, True, False, False, True]
    assert not any("kl" in r for r in never)
    assert third[6]["kl"] == every[6]["kl"] > 0
    assert make_trainer(kl_every=0).reference is None
    learned = make_trainer(kl_every=0, kl_coef=0.1)
    assert "kl" in learned.train(max_steps=1)[0] and learned.reference is not None


def test_what_is_steered_is_remembered(make_trainer):
    options = {"kl_coef": 0.1, "kl_target": 0.1, "kl_horizon": 20, "entropy_target": 1.0}
    trainer = make_trainer(max_steps=3, **options)
    trainer.train()
    state = trainer.state_dict()
    other = make_trainer(**options)
    other.load_state_dict(state)
    assert (other.kl.coef, other.entropy.coef) == (trainer.kl.coef, trainer.entropy.coef)
    assert (other.step, other.num_tokens) == (3, trainer.num_tokens)
    assert other.kl.coef != 0.1
    assert torch.equal(other.state_dict()["baseline"]["total"], state["baseline"]["total"])
