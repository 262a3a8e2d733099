"""Configs: every field has a default, and a value that cannot work is an error that names it."""

import dataclasses
import json
import math

import pytest

from fastrl.trainers import ActorCriticConfig, PolicyGradientConfig

BOTH = [PolicyGradientConfig, ActorCriticConfig]


@pytest.mark.parametrize("config_class", BOTH)
def test_defaults_are_valid_and_json(config_class):
    config = config_class()
    assert config_class(**json.loads(json.dumps(config.to_dict()))) == config
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.gamma = 0.5


@pytest.mark.parametrize("config_class", BOTH)
@pytest.mark.parametrize(
    "field, value, message",
    [
        ("gamma", 1.01, r"gamma a number in \[0, 1\], got 1.01"),
        ("gamma", -0.1, r"gamma a number in \[0, 1\], got -0.1"),
        ("gamma", math.nan, "gamma .*got nan"),
        ("gamma", "1", "gamma .*got '1'"),
        ("prompts_per_step", 0, "prompts_per_step a whole number >= 1, got 0"),
        ("completions_per_prompt", 1.5, "completions_per_prompt a whole number >= 1, got 1.5"),
        ("max_new_tokens", 0, "max_new_tokens a whole number >= 1, got 0"),
        ("max_new_tokens", True, "max_new_tokens .*got True"),
        ("temperature", 0.0, "temperature a number > 0, got 0.0"),
        ("temperature", math.inf, "temperature .*got inf"),
        ("eos_token_id", -1, "eos_token_id a whole number >= 0, got -1"),
        ("reward_weights", (1.0, math.nan), "reward_weights a number finite, got nan"),
        ("kl_coef", -1.0, "kl_coef a number >= 0, got -1.0"),
        ("kl_estimator", "k1", "kl_estimator one of 'k2', 'k3', got 'k1'"),
        ("entropy_coef", -0.1, "entropy_coef a number >= 0, got -0.1"),
        ("learning_rate", 0, "learning_rate a number > 0, got 0"),
        ("weight_decay", -0.1, "weight_decay a number >= 0, got -0.1"),
        ("max_grad_norm", 0.0, "max_grad_norm a number > 0, got 0.0"),
        ("max_steps", -1, "max_steps a whole number >= 0, got -1"),
        ("max_bad_steps", 0, "max_bad_steps a whole number >= 1, got 0"),
        ("seed", -1, "seed a whole number >= 0, got -1"),
        ("save_every", -1, "save_every a whole number >= 0, got -1"),
    ],
)
def test_bad_values_are_errors(config_class, field, value, message):
    with pytest.raises(ValueError, match=f"^{config_class.__name__}: expected {message}"):
        config_class(**{field: value})


@pytest.mark.parametrize(
    "config_class, fields, message",
    [
        (PolicyGradientConfig, {"algorithm": "grpo"}, "one of 'reinforce', got 'grpo'"),
        (ActorCriticConfig, {"algorithm": "ppo"}, "one of 'a2c', got 'ppo'"),
        (PolicyGradientConfig, {"baseline": "mean"}, "'none', 'running_mean', 'rloo', got 'mean'"),
        (PolicyGradientConfig, {"baseline_decay": 2.0}, r"baseline_decay .*in \[0, 1\], got 2.0"),
        (
            PolicyGradientConfig,
            {"baseline": "rloo", "completions_per_prompt": 1},
            'completions_per_prompt >= 2 with baseline "rloo", got 1',
        ),
        (ActorCriticConfig, {"advantage": "td"}, "advantage one of 'returns', 'gae', got 'td'"),
        (ActorCriticConfig, {"gae_lambda": 1.1}, r"gae_lambda a number in \[0, 1\], got 1.1"),
        (ActorCriticConfig, {"critic_coef": -1.0}, "critic_coef a number >= 0, got -1.0"),
        (ActorCriticConfig, {"whiten_advantages": 1}, "whiten_advantages True or False, got 1"),
    ],
)
def test_bad_values_of_one_trainer_are_errors(config_class, fields, message):
    with pytest.raises(ValueError, match=message):
        config_class(**fields)
