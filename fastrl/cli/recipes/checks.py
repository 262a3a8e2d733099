"""Values of a recipe that do not go together, or that cannot work."""

from collections.abc import Callable
from typing import Any

from fastrl.cli.recipes.prompts import is_dataset, is_split
from fastrl.cli.recipes.schema import Data, OverOptimization, Recipe
from fastrl.cli.recipes.toml import RecipeError
from fastrl.trainers import ActorCriticConfig

Where = Callable[[str], str]  # of a key: where its value was said
LEAST = {
    "model.vocab_size": 257,
    "data.limit": 1,
    "data.eval_limit": 1,
    "supervised.steps": 0,
    "supervised.tokens_per_step": 1,
    "supervised.warmup": 0,
    "supervised.weight_decay": 0,
    "supervised.prompt_weight": 0,
    "supervised.validate_every": 1,
    "log.samples_every": 0,
    "log.samples_shown": 0,
    "eval.every": 0,
    "eval.completions_per_prompt": 1,
    "eval.temperature": 0,
}


def check_values(recipe: Recipe, where: Where) -> None:
    """Raise a RecipeError that says where."""
    _check_model(recipe, where)
    _check_data(recipe, where)
    _check_algorithm(recipe, where)
    if not recipe.is_preference:
        _check_rewards(recipe, where)
    for key, low in LEAST.items():
        section, _, name = key.partition(".")
        value = getattr(getattr(recipe, section), name)
        if value is not None and not value >= low:
            raise wrong(where(key), f">= {low}", value)
    if not recipe.supervised.learning_rate > 0:
        raise wrong(where("supervised.learning_rate"), "> 0", recipe.supervised.learning_rate)


def _check_algorithm(recipe: Recipe, where: Where) -> None:
    """Raise where the recipe has what its algorithm would not look at."""
    of_policies = {
        "data.prompts": recipe.data.prompts,
        "data.eval": recipe.data.eval,
        "rewards.functions": recipe.rewards.functions,
        "over_optimization.gold": recipe.over_optimization.gold,
    }
    of_pairs = {
        "data.pairs": recipe.data.pairs,
        "data.eval_pairs": recipe.data.eval_pairs,
        "[preference]": recipe.preference,
    }
    for key, value in (of_policies if recipe.is_preference else of_pairs).items():
        if value:
            without = "without" if recipe.is_preference else "with"
            remedy = "Take it out, or choose another algorithm."
            raise wrong(where(key), f"{without} algorithm preference", recipe.algorithm, remedy)
    watching = recipe.over_optimization
    if watching.gold is None and watching != OverOptimization():
        key = "over_optimization.gold"
        remedy = 'It is the reward; "" watches nothing.'
        raise wrong(where(key), "with other keys of that table", "nothing", remedy)


def _check_model(recipe: Recipe, where: Where) -> None:
    model = recipe.model
    sources = [key for key in ("path", "random", "lstm") if getattr(model, key) is not None]
    if model.start is None:
        if len(sources) != 1:
            expected = "to have exactly one of path, random and lstm"
            got = " and ".join(sources) or "none"
            remedy = "It says which model to train."
            raise wrong(f"[model] in {recipe.source}", expected, got, remedy)
        if model.path is None and model.tokenizer is None:
            remedy = 'tokenizer = "bytes" needs no file.'
            raise wrong(where("model.tokenizer"), f"with model.{sources[0]}", "nothing", remedy)
    if model.lora is not None and model.lstm is not None:
        raise wrong(where("model.lora"), "with a model of transformers", "an LSTM")
    if model.lora is not None and (model.start is not None or recipe.supervised.steps):
        raise wrong(where("model.lora"), "without model.start and [supervised]", "both")
    if model.critic is not None and (
        recipe.is_preference or recipe.config_class is not ActorCriticConfig
    ):
        remedy = f"Actor-critic is {', '.join(ActorCriticConfig.ALGORITHMS)}."
        raise wrong(where("model.critic"), "with actor-critic", recipe.algorithm, remedy)
    if model.dtype not in ("float32", "bfloat16", "float16"):
        raise wrong(where("model.dtype"), "to be float32, bfloat16 or float16", model.dtype)


def _check_data(recipe: Recipe, where: Where) -> None:
    data = recipe.data
    if recipe.is_preference:
        if (data.pairs is None) == (data.builder is None):
            got = "neither" if data.pairs is None else "both"
            raise wrong(where("data.pairs"), "or else data.builder", got)
        return
    if data.builder is not None:
        for key in ("prompts", "eval"):
            if getattr(data, key) is not None:
                remedy = "The builder makes the rows."
                raise wrong(where(f"data.{key}"), "without data.builder", "both", remedy)
        return
    if not data.prompts:
        raise wrong(where("data.prompts"), "to name the prompts", "nothing")
    if data.eval_limit is not None and not data.eval:
        raise wrong(where("data.eval_limit"), "with data.eval", "none", "It is of those prompts.")
    for key in ("folder", "arguments"):
        if getattr(data, key) is not None:
            raise wrong(where(f"data.{key}"), "with data.builder", "none")
    if is_dataset(data.prompts):
        return
    if isinstance(data.prompts, str) and isinstance(data.eval, str) and is_split(data.eval):
        remedy = "Name a file of held-out prompts, or list them."
        raise wrong(where("data.eval"), "a split with a dataset by name alone", data.eval, remedy)
    for key in ("split", "subset"):
        if getattr(data, key) != getattr(Data, key):
            expected = "with data.prompts a dataset by name"
            raise wrong(where(f"data.{key}"), expected, "a file or a list")


def _check_rewards(recipe: Recipe, where: Where) -> None:
    rewards = recipe.rewards
    if not rewards.functions:
        expected, remedy = "to name at least one function", 'For example "rewards.py:correct".'
        raise wrong(where("rewards.functions"), expected, "none", remedy)
    if rewards.weights is not None and len(rewards.weights) != len(rewards.functions):
        expected = f"to have a weight for each of {len(rewards.functions)} functions"
        raise wrong(where("rewards.weights"), expected, rewards.weights)


def wrong(where: str, expected: str, got: Any, remedy: str = "") -> RecipeError:
    """The error of a value."""
    shown = got if isinstance(got, str) else repr(got)
    advice = remedy or "`fastrl train --help` says what it is."
    return RecipeError(f"train: expected {where} {expected}, got {shown}. {advice}")
