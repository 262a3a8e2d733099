"""A recipe says in TOML what a run is made of. Every key has a default but those marked (!).

algorithm = "grpo"              (!) any of PolicyGradientConfig and ActorCriticConfig

[model]                         (!) one of path, random and lstm
path = "Qwen/Qwen3-0.6B"        a name or folder for AutoModelForCausalLM
random = {model_type = "llama", hidden_size = 64, ...}    a config of transformers, random weights
lstm = {embed_dim = 64, hidden_dim = 128}                 our own LSTM, random weights
tokenizer = "bytes"             a name, a folder, tokenizer.json or "bytes"; default: that of path
dtype = "float32"               of the weights: float32, bfloat16 or float16
device = "auto"                 cpu, cuda, cuda:1; auto takes a GPU where there is one
lora = {r = 16, lora_alpha = 32}                          arguments of peft.LoraConfig
critic = "same"                 a critic of its own: "same" source as the model, a name or a folder;
                                default: a value head on the policy's own trunk

[data]
prompts = "prompts.jsonl"       (!) .jsonl, .json, .txt (a prompt a line), a name for
                                datasets.load_dataset, or a list of texts
column = "prompt"               the column that holds the prompt; reward functions get the others
split = "train"                 of a dataset by name
subset = "main"                 the configuration of a dataset by name
limit = 1000                    the first so many prompts alone; likewise eval_limit
eval = "held_out.jsonl"         held-out prompts: like prompts, or another split of that dataset
eval_limit = 200

[rewards]
functions = ["rewards.py:correct", "package.module:brevity"]    (!) TRL's signature
weights = [1.0, 0.1]            default: 1 each

[train]                         fields of PolicyGradientConfig or ActorCriticConfig
max_steps = 500
save_every = 50                 steps between two checkpoints

[log]
tensorboard = true              event files in the run's folder
samples_every = 20              steps between two sample tables; 0: none
samples_shown = 4               completions in a table

[eval]                          of data.eval: at the start, at the end, and
every = 50                      after so many steps; 0: at no other time
completions_per_prompt = 1
temperature = 1.0               default: that of training

Paths are relative to the recipe's folder; those in --set to the current one.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastrl.cli.recipes.toml import RecipeError
from fastrl.trainers import ActorCriticConfig, PolicyGradientConfig

CONFIGS: tuple[Any, ...] = (PolicyGradientConfig, ActorCriticConfig)
# Of [train], but said elsewhere: by the key or option that follows.
SAID_ELSEWHERE = {
    "algorithm": "algorithm, above the tables",
    "output_dir": "the option --output",
    "reward_weights": "rewards.weights",
}
# What a resumed run may have other than the run that it goes on with.
FREE = ("log.", "eval.", "model.device", "data.eval", "data.eval_limit", "train.max_steps") + (
    "train.max_bad_steps",
    "train.save_every",
    "train.learning_rate",
    "train.micro_batch_tokens",
    "train.max_rows",
    "train.gradient_checkpointing",
)
BUILT_IN = Path(__file__).parent


@dataclass(frozen=True, kw_only=True)
class Model:
    path: str | None = None
    random: dict[str, Any] | None = None
    lstm: dict[str, Any] | None = None
    tokenizer: str | None = None
    dtype: str = "float32"
    device: str = "auto"
    lora: dict[str, Any] | None = None
    critic: str | None = None


@dataclass(frozen=True, kw_only=True)
class Data:
    prompts: str | list[str] | None = None
    column: str = "prompt"
    split: str = "train"
    subset: str | None = None
    limit: int | None = None
    eval: str | list[str] | None = None
    eval_limit: int | None = None


@dataclass(frozen=True, kw_only=True)
class Rewards:
    functions: list[str] = field(default_factory=list)
    weights: list[float] | None = None


@dataclass(frozen=True, kw_only=True)
class Log:
    tensorboard: bool = True
    samples_every: int = 20
    samples_shown: int = 4


@dataclass(frozen=True, kw_only=True)
class Eval:
    every: int = 0
    completions_per_prompt: int = 1
    temperature: float | None = None


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A recipe whose keys and types are right; see the module.

    Attributes:
        source: the file, for messages.
        train: fields of `config_class`.
    """

    source: str
    algorithm: str
    model: Model
    data: Data
    rewards: Rewards
    train: dict[str, Any]
    log: Log
    eval: Eval

    @property
    def config_class(self) -> Any:
        """PolicyGradientConfig or ActorCriticConfig, by the algorithm."""
        return next(c for c in CONFIGS if self.algorithm in c.ALGORITHMS)

    def config(self, **defaults: Any) -> Any:
        """The trainer's config.

        Args:
            defaults: fields for which the recipe has no value of its own.
        Raises:
            RecipeError: the config refuses a value.
        """
        fields = {k: tuple(v) if isinstance(v, list) else v for k, v in self.train.items()}
        weights = self.rewards.weights
        try:
            return self.config_class(
                algorithm=self.algorithm,
                reward_weights=None if weights is None else tuple(weights),
                **{**defaults, **fields},
            )
        except (TypeError, ValueError) as error:
            raise RecipeError(f"train: in [train] of {self.source}: {error}") from error

    def to_dict(self) -> dict[str, Any]:
        """The document of TOML that gives the same recipe."""
        document = dataclasses.asdict(self)
        del document["source"]
        return document

    def differences(self, other: "Recipe") -> list[str]:
        """Keys that make this another run than `other`."""
        mine, theirs = (dict(_flat(recipe.to_dict())) for recipe in (self, other))
        return [
            key
            for key in sorted(mine.keys() | theirs.keys())
            if mine.get(key) != theirs.get(key) and not key.startswith(FREE)
        ]


SECTIONS = {"model": Model, "data": Data, "rewards": Rewards, "log": Log, "eval": Eval}


def find_recipe(name: str) -> Path:
    """The file: a path, or the name of a recipe that comes with fastrl.

    Raises:
        RecipeError: neither.
    """
    path, built_in = Path(name), BUILT_IN / f"{name}.toml"
    if path.is_file() or path.suffix == ".toml" or "/" in name:
        return path
    if built_in.is_file():
        return built_in
    known = ", ".join(sorted(p.stem for p in BUILT_IN.glob("*.toml")))
    raise RecipeError(
        f"train: expected a recipe: a .toml file, or one of {known}, got {name}. "
        "Options start with --."
    )


def _flat(document: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in document.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, list(value) if isinstance(value, tuple) else value
