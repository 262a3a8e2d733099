"""The trainer that a recipe describes."""

from pathlib import Path
from typing import Any

from fastrl.cli.recipes.models import build_model, end_ids, load_tokenizer, need
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
    data, model = recipe.data, recipe.model
    assert data.prompts is not None, "the parser has looked"
    prompts = load_prompts(
        data.prompts,
        key="data.prompts",
        column=data.column,
        limit=data.limit,
        split=data.split,
        subset=data.subset,
    )
    source = model.tokenizer or model.path
    assert source is not None, "the parser has looked"
    tokenizer = load_tokenizer(source)
    policy = build_model(recipe, tokenizer, int(recipe.config().seed))
    ends = end_ids(getattr(policy, "language_model", policy), tokenizer)
    config = recipe.config(
        eos_token_id=ends[0] if len(ends) == 1 else (tuple(ends) or None), output_dir=str(output)
    )
    is_critic = recipe.config_class is ActorCriticConfig
    kind: Any = ActorCriticTrainer if is_critic else PolicyGradientTrainer
    trainer = kind(policy, functions, prompts, config, tokenizer=tokenizer)
    _check_prompts(trainer.dataset, "data.prompts")
    return trainer


def held_out_prompts(recipe: Recipe, trainer: Any) -> Any:
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
    entries = load_prompts(
        source,
        key="data.eval",
        column=data.column,
        limit=data.eval_limit,
        split=split,
        subset=data.subset,
    )
    _check_prompts(
        PromptDataset(entries, trainer.policy.vocab_size, trainer.tokenizer), "data.eval"
    )
    return entries


def _is_split(text: str) -> bool:
    """Names of splits have neither a folder nor a suffix: "test", "train[90%:]"."""
    return "/" not in text and "." not in text


def _check_prompts(dataset: PromptDataset, key: str) -> None:
    try:
        for index in range(min(len(dataset), CHECKED_PROMPTS)):
            dataset[index]
    except (ValueError, TypeError) as error:
        raise RecipeError(f"train: in {key}: {error}") from error
