"""A small run whose reward can be gamed, and one whose reward is what it seems."""

import random

import torch

from fastrl.models import LSTMLanguageModel
from fastrl.trainers import PolicyGradientConfig, PolicyGradientTrainer
from fastrl.trainers.over_optimization import OverOptimizationMonitor

TRAINED_ON = [torch.tensor([a]) for a in range(8)]
HELD_OUT = [torch.tensor([a, b]) for a in range(4) for b in range(8)]
TOKEN = 3


def share(completion_ids, **_):
    """Of one token in a completion: what is learned from."""
    return [ids.count(TOKEN) / len(ids) for ids in completion_ids]


def up_to_a_half(completion_ids, **_):
    """Some of that token is good, and more than a half of it worse than none."""
    return [s if s <= 0.5 else 0.5 - 2 * (s - 0.5) for s in share(completion_ids)]


def share_and_noise(completion_ids, **_):
    """What is learned from, but for chance."""
    return [s + random.gauss(0, 0.3) for s in share(completion_ids)]


def half_of_it_and_noise(completion_ids, **_):
    """What is learned from, as far as a half, but for chance: gold that comes to rest."""
    return [min(s, 0.5) + random.gauss(0, 0.1) for s in share(completion_ids)]


def make_run(gold, *, seed=0, monitor=None, **config):
    """A trainer with a monitor attached, and the monitor."""
    torch.manual_seed(seed)
    defaults = {
        "algorithm": "rloo", "prompts_per_step": 4, "completions_per_prompt": 8,
        "max_new_tokens": 8, "learning_rate": 0.005, "max_steps": 60, "seed": seed,
    }  # fmt: skip
    config = PolicyGradientConfig(**defaults | config)
    trainer = PolicyGradientTrainer(LSTMLanguageModel(8, 8, 24, 1), share, TRAINED_ON, config)
    options = {"every": 3, "completions_per_prompt": 2, "seed": seed} | (monitor or {})
    watching = OverOptimizationMonitor(trainer, gold, HELD_OUT, **options)
    trainer.attach("over_optimization", watching)
    return trainer, watching
