"""What a recipe describes: its rows, tokenizer, reward functions, and the trainer of them all."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastrl._sampling import check_lengths
from fastrl.cli.recipes.data import TaskData, load_data
from fastrl.cli.recipes.device import find_device
from fastrl.cli.recipes.measure import keep_scores
from fastrl.cli.recipes.models import (
    build_model,
    load_tokenizer,
    need,
    token_bytes_of,
    train_tokenizer,
)
from fastrl.cli.recipes.rewards import Provided, load_reward_functions
from fastrl.cli.recipes.schema import Recipe
from fastrl.cli.recipes.toml import RecipeError
from fastrl.cli.recipes.trained_on import check_held_out
from fastrl.cli.training.workers import Workers
from fastrl.rewards._calling import distinct_names, required_by
from fastrl.rewards.composition._composition import Composition
from fastrl.trainers import ActorCriticConfig, ActorCriticTrainer, PolicyGradientTrainer
from fastrl.trainers._reward_arguments import GIVEN, check_columns
from fastrl.trainers.prompts import PromptDataset

MONITOR = "over_optimization"  # what it is attached as
CHECKED_PROMPTS = 1000  # of which a prompt without tokens is found before the run begins


@dataclass
class Parts:
    """What a trainer is built from; nothing is written.

    Attributes:
        output: the run's folder.
        start: the folder of the policy that the algorithm starts from; None: as the recipe has it.
        functions: reward functions.
        gold, proxy: the monitor's; None without one.
        workers: the processes of the run, each of which has parts of its own.
    """

    recipe: Recipe
    output: Path
    start: Path | None
    data: TaskData
    tokenizer: Any
    functions: list[Any]
    gold: Any
    proxy: Any
    workers: Workers

    @classmethod
    def load(
        cls, recipe: Recipe, output: Path, *, tokenizer: Path, start: Path, workers: Workers
    ) -> "Parts":
        """What is quick to find wrong comes first.

        Args:
            tokenizer, start: folders of the run itself; where they are there, they are taken.
        Raises:
            RecipeError: something that the recipe names cannot be loaded.
        """
        if recipe.log.tensorboard:
            need("tensorboard", "train")
        find_device(recipe.model.device, "model.device", workers.local_rank)  # of rewards as well
        data = load_data(recipe)
        if data.held_out is None and recipe.eval.every:
            is_built = recipe.data.builder is not None
            place = "Let data.builder give held_out rows" if is_built else "Name them in data.eval"
            raise RecipeError(
                f"train: expected held-out prompts with eval.every = {recipe.eval.every}, got "
                f"none. {place}, or leave eval.every out."
            )
        model = recipe.model
        if not start.is_dir() and model.start is not None:
            start = Path(model.start)
            if not start.is_dir():
                raise RecipeError(
                    f"train: expected model.start a folder like RUN/start, got {start}, which is "
                    "not there. A run with [supervised] writes it."
                )
            check_held_out(start, data.held_out)
        has_start = start.is_dir()
        if has_start:
            found = load_tokenizer(str(start))
        elif tokenizer.is_dir():
            found = load_tokenizer(str(tokenizer))
        else:
            found = tokenizer_of(recipe, data)
        given = provided(found, data)
        watching = {
            name: load_reward_functions([entry], given, f"over_optimization.{name}")[0]
            for name in ("gold", "proxy")
            if (entry := getattr(recipe.over_optimization, name))
        }
        return cls(
            recipe=recipe,
            output=output,
            start=start if has_start else None,
            data=data,
            tokenizer=found,
            functions=load_reward_functions(recipe.rewards.functions, given),
            gold=watching.get("gold"),
            proxy=watching.get("proxy"),
            workers=workers,
        )

    def policy(self) -> Any:
        """The model, as the algorithm trains it.

        Raises:
            RecipeError: it cannot be built.
        """
        return build_model(
            self.recipe,
            self.tokenizer,
            self.recipe.seed,
            self.start,
            local_rank=self.workers.local_rank,
        )

    def trainer(self) -> Any:
        """A trainer at its start.

        Raises:
            RecipeError: the model cannot be built, or the prompts not be used.
        """
        recipe = self.recipe
        policy = self.policy()
        config = recipe.config(output_dir=str(self.output))
        is_critic = recipe.config_class is ActorCriticConfig
        kind: Any = ActorCriticTrainer if is_critic else PolicyGradientTrainer
        try:
            trainer = kind(
                policy, self.functions, self.data.train, config, tokenizer=self.tokenizer
            )
            keep_scores(trainer, self.functions)
            self._attach_monitor(trainer)
        except RecipeError:
            raise
        except (TypeError, ValueError) as error:
            raise RecipeError(f"train: in {recipe.source}: {error}") from error
        is_built = recipe.data.builder is not None
        check_prompts(trainer, trainer.dataset, "data.builder" if is_built else "data.prompts")
        check_parameters(self.functions, trainer.dataset)
        if self.data.held_out is not None:
            held_out = trainer.prompts(self.data.held_out)
            check_prompts(trainer, held_out, "data.builder" if is_built else "data.eval")
            check_parameters([f for f in (self.gold, self.proxy) if f is not None], held_out)
        return trainer

    def _attach_monitor(self, trainer: Any) -> None:
        """What [over_optimization] asks for."""
        if self.gold is None:
            return
        if not self.data.held_out:
            raise RecipeError(
                "train: expected held-out prompts with over_optimization.gold, got none. "
                "Name them in data.eval."
            )
        from fastrl.trainers.over_optimization import OverOptimizationMonitor

        settings = self.recipe.over_optimization
        monitor = OverOptimizationMonitor(
            trainer,
            self.gold,
            self.data.held_out,
            proxy=self.proxy,
            every=settings.every,
            completions_per_prompt=settings.completions_per_prompt,
            alpha=settings.alpha,
            action=settings.action,
            kl_budget=settings.kl_budget,
            seed=self.recipe.seed,
        )
        trainer.attach(MONITOR, monitor)


def tokenizer_of(recipe: Recipe, data: TaskData) -> Any:
    """The tokenizer that the recipe names; "bpe" is trained.

    Raises:
        RecipeError: it cannot be loaded.
    """
    model = recipe.model
    if model.tokenizer == "bpe":
        return train_tokenizer(data.texts(), model.vocab_size)
    source = model.tokenizer or model.path
    assert source is not None, "the parser has looked"
    return load_tokenizer(source)


def provided(tokenizer: Any, data: TaskData | None) -> Provided:
    """What classes of reward functions are given for parameters of these names."""
    given = {"tokenizer": lambda: tokenizer, "token_bytes": lambda: token_bytes_of(tokenizer)}
    return given if data is None else {**given, "texts": data.texts}


def check_parameters(functions: Sequence[Any], dataset: PromptDataset) -> None:
    """Raise a RecipeError where a function, or one in a composition, needs a column that the first
    prompt does not have."""
    columns = list(dataset[0].columns)
    for function, name in _called(functions):
        for parameter in required_by(function):
            if parameter not in {*GIVEN, *columns}:
                raise RecipeError(
                    f"train: expected prompts with the column {parameter!r}, which reward function "
                    f"{name} needs, got columns {columns}. Add it, or give the parameter a default."
                )


def _called(functions: Sequence[Any]) -> Iterator[tuple[Any, str]]:
    """The functions by name; of a composition those that it is made of."""
    for function, name in zip(functions, distinct_names(functions), strict=True):
        if isinstance(function, Composition):
            yield from ((leaf, f"{name}/{own}") for own, leaf in function.leaves())
        else:
            yield function, name


def check_prompts(trainer: Any, dataset: PromptDataset, key: str) -> None:
    """Raise a RecipeError where one of the first prompts cannot be sampled from and rewarded.

    It has no tokens, too high or too many ones, or a column of a name that is taken.
    """
    try:
        examples = [dataset[index] for index in range(min(len(dataset), CHECKED_PROMPTS))]
        check_columns(examples)
        num_positions = getattr(trainer.policy, "num_positions", None)
        prompts = [example.token_ids for example in examples]
        check_lengths(prompts, trainer.config.max_new_tokens, num_positions)
    except (ValueError, TypeError) as error:
        raise RecipeError(f"train: in {key}: {error}") from error
