"""A small task that both trainers can solve, and a way to build either."""

import pytest
import torch

from fastrl.models import ActorCritic, LSTMLanguageModel
from fastrl.trainers import (
    ActorCriticConfig,
    ActorCriticTrainer,
    PolicyGradientConfig,
    PolicyGradientTrainer,
)

VOCAB_SIZE = 8
EOS = 7
PROMPTS = [torch.tensor([1, 2, 3]), torch.tensor([4]), torch.tensor([2, 5])]


def target_token(prompt, position):
    return (prompt[-1] + position) % 5


def hits(prompts, completion_ids, **_):
    """1 for each token that is the one wanted there: a reward known token by token."""
    return [
        [float(token == target_token(prompt, position)) for position, token in enumerate(ids)]
        for prompt, ids in zip(prompts, completion_ids, strict=True)
    ]


def make_model(kind, seed=0, hidden_dim=24):
    torch.manual_seed(seed)
    model = LSTMLanguageModel(VOCAB_SIZE, 8, hidden_dim, 1)
    return ActorCritic(model) if kind == "actor_critic" else model


@pytest.fixture
def make_trainer():
    """make_trainer(kind, reward_functions=hits, *, model, dataset, **arguments, **config)."""

    def make(kind="policy_gradient", reward_functions=hits, **options):
        model = options.pop("model", None) or make_model(kind)
        dataset = options.pop("dataset", PROMPTS)
        names = ("tokenizer", "ops", "rollout_function", "environment")
        arguments = {name: options.pop(name) for name in names if name in options}
        defaults = {"max_new_tokens": 4, "prompts_per_step": 3, "completions_per_prompt": 4}
        is_critic = kind == "actor_critic"
        config = (ActorCriticConfig if is_critic else PolicyGradientConfig)(**defaults | options)
        trainer = ActorCriticTrainer if is_critic else PolicyGradientTrainer
        return trainer(model, reward_functions, dataset, config, **arguments)

    return make
