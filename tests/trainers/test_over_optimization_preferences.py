"""Cross-validated preference models as the gold reward of a run that learns from another one."""

import random
import warnings

import pytest
import torch
from gamed_runs import HELD_OUT, TOKEN, TRAINED_ON, make_run, share, up_to_a_half

from fastrl.models import ActorCritic, LSTMLanguageModel
from fastrl.rewards import PreferenceReward
from fastrl.rewards.preference import (
    PreferenceConfig,
    PreferenceModel,
    cross_validate,
    train_preference_model,
)
from fastrl.trainers import PolicyGradientTrainer
from fastrl.trainers.over_optimization import OverOptimizationMonitor

CONFIG = PreferenceConfig(epochs=3, pairs_per_step=32, learning_rate=0.02)


def make_model():
    return ActorCritic(LSTMLanguageModel(8, 8, 24, 1))


def judged(quality, seed, count=600):
    """Pairs of random completions, in which the better one is chosen."""
    draw = random.Random(seed)
    pairs = []
    while len(pairs) < count:
        often = [draw.random() for _ in range(2)]
        both = [
            [TOKEN if draw.random() < p else draw.randrange(8) for _ in range(8)] for p in often
        ]
        a, b = quality(both)
        if a != b:
            chosen, rejected = both if a > b else both[::-1]
            pairs.append({"prompt": [draw.randrange(8)], "chosen": chosen, "rejected": rejected})
    return pairs


def watched(wanted, **config):
    """A run on a model of judges who love a word, and the folds' models of what is wanted."""
    torch.manual_seed(0)
    found = cross_validate(make_model, judged(wanted, 0), CONFIG, folds=2)
    assert found.evaluation["accuracy"] > 0.7  # by models that have not seen the prompt
    folds = [PreferenceReward(model, name=f"fold_{i}") for i, model in enumerate(found.models)]
    proxy = PreferenceModel(make_model())
    train_preference_model(proxy, judged(share, 1), CONFIG)
    trainer, _ = make_run(share, max_steps=30, **config)
    trainer = PolicyGradientTrainer(
        trainer.model, PreferenceReward(proxy), TRAINED_ON, trainer.config
    )
    options = {"every": 3, "completions_per_prompt": 2, "action": "stop"}
    monitor = OverOptimizationMonitor(trainer, folds, HELD_OUT, **options)
    trainer.attach("over_optimization", monitor)
    return trainer, monitor


def test_judges_who_love_a_word_too_much_are_found_out(tmp_path):
    trainer, monitor = watched(up_to_a_half, output_dir=tmp_path)
    with pytest.warns(RuntimeWarning, match="gold falls while the proxy rises.* Training stops."):
        records = trainer.train()
    assert len(records) < 30 and records[-1]["gold/alarm"] == 1
    of_folds = [records[-1][f"gold/gold/fold_{i}"] for i in range(2)]
    assert records[-1]["gold/gold"] == pytest.approx(sum(of_folds), abs=1e-5)
    golds = {e["step"]: e["gold/gold"] for e in monitor.evaluations}
    best = max(golds, key=golds.__getitem__)
    assert f'"step": {best:g},' in (tmp_path / "best" / "trainer.json").read_text()
    assert golds[best] > golds[len(records)] + 0.5


def test_judges_of_one_mind_are_left_alone():
    trainer, monitor = watched(share)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "Reward stalled")
        assert len(trainer.train()) == 30
    first, last = monitor.evaluations[0], monitor.evaluations[-1]
    assert last["gold/proxy"] > first["gold/proxy"] and last["gold/gold"] > first["gold/gold"]
