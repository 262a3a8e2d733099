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
    lists = {"reward_weights": [1.0, 0.5], "stop_strings": ["a"], "eos_token_id": [1, 2]}
    tuples = {name: tuple(entries) for name, entries in lists.items()}
    assert config_class(**lists) == config_class(**tuples)


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
        ("seed", 2**63, r"seed below 2 \*\* 63, got 9223372036854775808"),
        ("save_every", -1, "save_every a whole number >= 0, got -1"),
        ("epochs", 0, "epochs a whole number >= 1, got 0"),
        ("minibatches", 0, "minibatches a whole number >= 1, got 0"),
        ("micro_batch_tokens", 0, "micro_batch_tokens a whole number >= 1, got 0"),
        ("max_rows", 0, "max_rows a whole number >= 1, got 0"),
        ("max_prompt_tokens", 0, "max_prompt_tokens a whole number >= 1, got 0"),
        ("precision", "float16", "precision one of 'float32', 'bfloat16', got 'float16'"),
        ("kl_in", "advantage", "kl_in one of 'loss', 'reward', got 'advantage'"),
        ("kl_every", -1, "kl_every a whole number >= 0, got -1"),
        ("kl_horizon", 0, "kl_horizon a whole number >= 1, got 0"),
        ("kl_target", 0.1, "kl_coef > 0 with kl_target, which it is steered from, got 0.0"),
        ("entropy_target", 0.0, "entropy_target a number > 0, got 0.0"),
        ("entropy_rate", -1.0, "entropy_rate a number >= 0, got -1.0"),
        ("importance_cap", 0.0, "importance_cap a number > 0, got 0.0"),
        ("temperature_end", 0.0, "temperature_end a number > 0, got 0.0"),
        ("lr_schedule", "step", "lr_schedule one of 'constant', 'linear', 'cosine', got 'step'"),
        ("warmup_steps", -1, "warmup_steps a whole number >= 0, got -1"),
        ("reward_errors", "skip", "reward_errors one of 'raise', 'mask', got 'skip'"),
        ("reward_timeout", 0, "reward_timeout a number > 0, got 0"),
        ("mask_truncated", "no", "mask_truncated one of None, True, False, got 'no'"),
        ("dropout", 1, "dropout True or False, got 1"),
        ("gradient_checkpointing", None, "gradient_checkpointing True or False, got None"),
        ("eos_token_id", "eos", "eos_token_id \"auto\" or whole numbers >= 0, got 'eos'"),
        ("eos_token_id", (1, -1), "eos_token_id a whole number >= 0, got -1"),
        ("stop_strings", ("a", ""), "stop_strings texts that are not empty"),
    ],
)
def test_bad_values_are_errors(config_class, field, value, message):
    with pytest.raises(ValueError, match=f"^{config_class.__name__}: expected {message}"):
        config_class(**{field: value})


@pytest.mark.parametrize(
    "config_class, fields, message",
    [
        (PolicyGradientConfig, {"algorithm": "ppo"}, "one of 'reinforce', .*'cispo', got 'ppo'"),
        (ActorCriticConfig, {"algorithm": "grpo"}, "one of 'a2c', 'ppo', 'vtrace', got 'grpo'"),
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
        (PolicyGradientConfig, {"advantage": "gae"}, "'returns', 'grpo', .*'max_at_k', got 'gae'"),
        (PolicyGradientConfig, {"advantage": "max_at_k"}, "advantage_k with .*, got None"),
        (
            PolicyGradientConfig,
            {"algorithm": "grpo", "advantage_k": 2},
            "advantage_k with .* got 2",
        ),
        (
            PolicyGradientConfig,
            {"reduction": "mean"},
            "reduction one of 'token_mean', .* got 'mean'",
        ),
        (PolicyGradientConfig, {"clip_low": 1.1}, r"clip_low a number in \[0, 1\], got 1.1"),
        (PolicyGradientConfig, {"clip_high": -0.1}, "clip_high a number >= 0, got -0.1"),
        (PolicyGradientConfig, {"dual_clip": 1.0}, "dual_clip a number > 1, got 1.0"),
        (
            PolicyGradientConfig,
            {"algorithm": "grpo", "completions_per_prompt": 1},
            "completions_per_prompt >= 2 with 'grpo', got 1",
        ),
        (
            PolicyGradientConfig,
            {"advantage": "max_at_k", "advantage_k": 9, "completions_per_prompt": 8},
            "advantage_k <= completions_per_prompt = 8, got 9",
        ),
        (
            PolicyGradientConfig,
            {"algorithm": "grpo", "baseline": "rloo"},
            "baseline \"none\" with advantage 'grpo', got 'rloo'",
        ),
        (PolicyGradientConfig, {"algorithm": "cispo", "dual_clip": 3.0}, "no dual_clip with .*isp"),
        (PolicyGradientConfig, {"dual_clip": 3.0}, "no dual_clip with algorithm 'reinforce'"),
        (ActorCriticConfig, {"algorithm": "ppo", "dual_clip": 1.0}, "dual_clip a number > 1"),
        (ActorCriticConfig, {"dual_clip": 3.0}, "no dual_clip with algorithm 'a2c', got 3.0"),
        (PolicyGradientConfig, {"epochs": 2}, r"epochs = minibatches = 1 .*'reinforce'.* \(2, 1\)"),
        (ActorCriticConfig, {"minibatches": 2}, r"epochs = minibatches = 1 .*'a2c'.* \(1, 2\)"),
        (
            ActorCriticConfig,
            {"algorithm": "ppo", "minibatches": 3, "prompts_per_step": 2},
            "minibatches <= prompts_per_step = 2, got 3",
        ),
        (ActorCriticConfig, {"algorithm": "vtrace", "advantage": "gae"}, "'vtrace', got 'gae'"),
        (ActorCriticConfig, {"algorithm": "vtrace", "epochs": 2}, "epochs = minibatches = 1"),
        (ActorCriticConfig, {"value_clip": 0.0}, "value_clip a number > 0, got 0.0"),
        (ActorCriticConfig, {"replay_size": 1}, 'replay_size 0 without algorithm "vtrace", got 1'),
        (ActorCriticConfig, {"replay_per_step": 0}, "replay_per_step a whole number >= 1, got 0"),
        (ActorCriticConfig, {"rho_clip": -1.0}, "rho_clip a number >= 0, got -1.0"),
    ],
)
def test_bad_values_of_one_trainer_are_errors(config_class, fields, message):
    with pytest.raises(ValueError, match=message):
        config_class(**fields)


@pytest.mark.parametrize(
    "config_class, fields, expected",
    [
        (PolicyGradientConfig, {"clip_low": 0.1}, "clip_low 0.2 with algorithm 'reinforce'"),
        (PolicyGradientConfig, {"clip_high": 0.3}, "clip_high 0.2 with algorithm 'reinforce'"),
        (PolicyGradientConfig, {"algorithm": "grpo", "gamma": 0.9}, "gamma 1.0 with .* 'grpo'"),
        (PolicyGradientConfig, {"advantage": "rloo", "gamma": 0.0}, "gamma 1.0 with .* 'rloo'"),
        (PolicyGradientConfig, {"baseline_decay": 0.5}, "baseline_decay 0.9 without baseline"),
        (
            PolicyGradientConfig,
            {"baseline": "rloo", "baseline_decay": 0.5},
            'baseline_decay 0.9 without baseline "running_mean"',
        ),
        (PolicyGradientConfig, {"kl_horizon": 9}, "kl_horizon 10000 without kl_target"),
        (ActorCriticConfig, {"entropy_rate": 0.1}, "entropy_rate 0.01 without entropy_target"),
        (ActorCriticConfig, {"gae_lambda": 0.9}, 'gae_lambda 0.95 with advantage "returns"'),
        (ActorCriticConfig, {"clip_low": 0.1}, 'clip_low 0.2 without algorithm "ppo"'),
        (ActorCriticConfig, {"value_clip": 0.2}, 'value_clip None without algorithm "ppo"'),
        (ActorCriticConfig, {"algorithm": "vtrace", "clip_high": 0.1}, "clip_high 0.2 without"),
        (ActorCriticConfig, {"rho_clip": 2.0}, 'rho_clip 1.0 without algorithm "vtrace"'),
        (ActorCriticConfig, {"algorithm": "ppo", "c_clip": 2.0}, "c_clip 1.0 without algorithm"),
        (
            ActorCriticConfig,
            {"algorithm": "vtrace", "replay_per_step": 2},
            "replay_per_step 1 with replay_size 0",
        ),
    ],
)
def test_what_nothing_would_read_is_an_error(config_class, fields, expected):
    *_, (name, value) = fields.items()
    with pytest.raises(ValueError, match=f"expected {expected}.*, got {value}"):
        config_class(**fields)
    default = config_class(**{k: v for k, v in fields.items() if k != name})
    assert config_class(**default.to_dict()) == default


def test_what_something_reads_stands():
    algorithms = PolicyGradientConfig.ALGORITHMS
    for algorithm in (name for name in algorithms if name != "reinforce"):
        config = PolicyGradientConfig(algorithm=algorithm, advantage="returns", gamma=0.5)
        assert config.gamma == 0.5
    for options in (
        {"algorithm": "ppo", "clip_low": 0.1, "clip_high": 0.3, "value_clip": 0.2},
        {"algorithm": "ppo", "gae_lambda": 0.5},
        {"advantage": "gae", "gae_lambda": 0.5},
        {"algorithm": "vtrace", "rho_clip": 2.0, "c_clip": 0.5, "gae_lambda": 0.5},
        {"algorithm": "vtrace", "replay_size": 2, "replay_per_step": 2},
        {"kl_coef": 0.1, "kl_target": 0.1, "kl_horizon": 9},
        {"entropy_target": 1.0, "entropy_rate": 0.1},
    ):
        config = ActorCriticConfig(gamma=0.5, **options)
        assert {name: getattr(config, name) for name in options} == options


@pytest.mark.parametrize(
    "algorithm, advantage, reduction, low, high, mask_truncated",
    [
        ("reinforce", "returns", "token_mean", 0.2, 0.2, False),
        ("rloo", "rloo", "sequence_mean_token_sum", 0.2, 0.2, False),
        ("grpo", "grpo", "sequence_mean", 0.2, 0.2, False),
        ("dr_grpo", "dr_grpo", "token_sum", 0.2, 0.2, False),
        ("dapo", "grpo", "token_mean", 0.2, 0.28, True),
        ("gspo", "grpo", "sequence_mean", 3e-4, 4e-4, False),
        ("cispo", "grpo", "token_mean", 1.0, 4.0, False),
    ],
)
def test_an_algorithm_fills_in_what_is_left_out(
    algorithm, advantage, reduction, low, high, mask_truncated
):
    """The papers' own numbers; what is given stands."""
    config = PolicyGradientConfig(algorithm=algorithm)
    assert (config.advantage, config.reduction) == (advantage, reduction)
    assert (config.clip_low, config.clip_high) == (low, high)
    assert config.mask_truncated is mask_truncated
    own = {"advantage": "rloo", "reduction": "token_sum"}
    own |= {"clip_low": 0.1, "clip_high": 0.3} if algorithm != "reinforce" else {}
    config = PolicyGradientConfig(algorithm=algorithm, mask_truncated=True, **own)
    assert {name: getattr(config, name) for name in own} == own and config.mask_truncated


def test_an_actor_critic_fills_in_what_is_left_out():
    a2c, ppo, vtrace = (ActorCriticConfig(algorithm=name) for name in ("a2c", "ppo", "vtrace"))
    assert [c.advantage for c in (a2c, ppo, vtrace)] == ["returns", "gae", "vtrace"]
    assert [c.whiten_advantages for c in (a2c, ppo, vtrace)] == [False, True, False]
    given = ActorCriticConfig(algorithm="ppo", advantage="returns", whiten_advantages=False)
    assert given.advantage == "returns" and given.whiten_advantages is False


def test_k1_is_a_penalty_in_the_reward_alone():
    assert PolicyGradientConfig(kl_in="reward").kl_estimator == "k1"
    assert PolicyGradientConfig(kl_in="reward", kl_estimator="k3").kl_estimator == "k3"
    assert PolicyGradientConfig().kl_estimator == "k2"
