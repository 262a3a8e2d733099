"""The trainer that a recipe describes."""

from pathlib import Path
from typing import Any

from fastrl.cli.recipes.models import build_model, load_tokenizer, need
from fastrl.cli.recipes.prompts import load_prompts
from fastrl.cli.recipes.rewards import load_reward_functions
from fastrl.cli.recipes.schema import Recipe
from fastrl.cli.recipes.toml import RecipeError
from fastrl.trainers import ActorCriticConfig, ActorCriticTrainer, PolicyGradientTrainer
from fastrl.trainers.prompts import PromptDataset

CHECKED_PROMPTS = 1000  # of which a prompt without tokens is found before the run begins


def build_trainer(recipe: Recipe, output: Path) -> Any:
    """A trainer at its start; nothing is written.

    What is quick to find wrong comes first.

    Args:
        output: the run's folder.
    Raises:
        RecipeError: something that the recipe names cannot be loaded.
    """
    if recipe.log.tensorboard:
        need("tensorboard", "train")
    functions = load_reward_functions(recipe.rewards.functions)
    prompts = training_prompts(recipe)
    model = recipe.model
    source = model.tokenizer or model.path
    assert source is not None, "the parser has looked"
    tokenizer = load_tokenizer(source)
    policy = build_model(recipe, tokenizer, int(recipe.config().seed))
    config = recipe.config(output_dir=str(output))
    is_critic = recipe.config_class is ActorCriticConfig
    kind: Any = ActorCriticTrainer if is_critic else PolicyGradientTrainer
    try:
        trainer = kind(policy, functions, prompts, config, tokenizer=tokenizer)
    except (TypeError, ValueError) as error:
        raise RecipeError(f"train: in {recipe.source}: {error}") from error
    check_prompts(trainer.dataset, "data.prompts")
    return trainer


def training_prompts(recipe: Recipe) -> Any:
    """The prompts of data.prompts.

    Raises:
        RecipeError: they cannot be loaded.
    """
    data = recipe.data
    assert data.prompts is not None, "the parser has looked"
    return load_prompts(
        data.prompts,
        key="data.prompts",
        column=data.column,
        limit=data.limit,
        split=data.split,
        subset=data.subset,
    )


def held_out_prompts(recipe: Recipe) -> Any:
    """The prompts of data.eval; None where the recipe has none.

    Raises:
        RecipeError: they cannot be loaded.
    """
    data = recipe.data
    if data.eval is None:
        return None
    source, split = data.eval, data.split
    if isinstance(source, str) and isinstance(data.prompts, str) and _is_split(source):
        source, split = data.prompts, source
    return load_prompts(
        source,
        key="data.eval",
        column=data.column,
        limit=data.eval_limit,
        split=split,
        subset=data.subset,
    )


def _is_split(text: str) -> bool:
    """Names of splits have neither a folder nor a suffix: "test", "train[90%:]"."""
    return "/" not in text and "." not in text


def check_prompts(dataset: PromptDataset, key: str) -> None:
    """Raise a RecipeError where one of the first prompts has no tokens, or too high ones."""
    try:
        for index in range(min(len(dataset), CHECKED_PROMPTS)):
            dataset[index]
    except (ValueError, TypeError) as error:
        raise RecipeError(f"train: in {key}: {error}") from error
