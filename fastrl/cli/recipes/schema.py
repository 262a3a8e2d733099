"""A recipe says in TOML what a run is made of. Every key has a default but those marked (!).

algorithm = "grpo"              (!) any of PolicyGradientConfig and ActorCriticConfig; or
                                "preference", which trains a reward model on pairs

[model]                         (!) one of path, random, lstm and start
path = "Qwen/Qwen3-0.6B"        a name or folder for AutoModelForCausalLM
random = {model_type = "llama", hidden_size = 64, ...}    a config of transformers, random weights
lstm = {embed_dim = 64, hidden_dim = 128}                 our own LSTM, random weights
start = "RUN/start"             model and tokenizer that another run's [supervised] has trained, in
                                the place of a [supervised] of one's own; goes before the others;
                                held-out prompts that it was trained on are an error
tokenizer = "bytes"             a name, a folder, tokenizer.json, "bytes", or "bpe": byte-level BPE
                                trained on the training texts; default: that of path
vocab_size = 2048               of "bpe", with its 256 bytes and the end of a text
dtype = "float32"               of the weights: float32, bfloat16 or float16
device = "auto"                 cpu, cuda, cuda:1; auto takes a GPU where there is one
lora = {r = 16, lora_alpha = 32}                          arguments of peft.LoraConfig
critic = "same"                 a critic of its own: "same" source as the model, a name or a folder;
                                default: a value head on the policy's own trunk

[data]                          (!) prompts, builder or pairs
prompts = "prompts.jsonl"       .jsonl, .json, .txt (a prompt a line), a name for
                                datasets.load_dataset, or a list of texts
column = "prompt"               the column that holds the prompt; reward functions get the others
split = "train"                 of a dataset by name
subset = "main"                 the configuration of a dataset by name
limit = 1000                    the first so many prompts alone; likewise eval_limit
eval = "held_out.jsonl"         held-out prompts: like prompts, or another split of that dataset
eval_limit = 200
builder = "wikitext_headings"   makes all rows from the files in folder: wikitext_continuation,
                                wikitext_headings, shakespeare_dialogue, multi30k_translation,
                                multi30k_pairs, or "file.py:function"; see below
folder = "../data"              the builder's files, there or in the data set's own folder in it
arguments = {max_words = 16}    of the builder
pairs = "pairs.jsonl"           of "preference": objects with prompt, chosen and rejected, and
                                perhaps tie (true) and margin (a number)
eval_pairs = "held_out.jsonl"   likewise, held out

[rewards]
functions = [                   (!) TRL's signature
  "rewards.py:correct",         a function, or a class that is called without arguments
  {use = "ChrF", reference = "reference"},    a class or factory, with keyword arguments
]
weights = [1.0, 0.1]            default: 1 each

A name alone is one of fastrl.rewards, others are "package.module:name" or "file.py:name". A class
or factory that has a parameter tokenizer, token_bytes (the bytes of each token id) or texts (the
training texts) gets it from the recipe. A table among the arguments that has `use` is built too.

[supervised]                    maximum likelihood on prompt and reference, before the algorithm;
steps = 500                     0, the default: none
tokens_per_step = 4096          most tokens in a step; packed, without padding
learning_rate = 3e-3            of AdamW, falling to a tenth of it along a cosine
warmup = 20                     steps in which the learning rate rises from 0
weight_decay = 0.01
prompt_weight = 0.0             of a prompt's token in the loss; a reference's has 1
validate_every = 50             steps; the weights that are best on the validation rows are kept

[train]                         fields of PolicyGradientConfig or ActorCriticConfig
max_steps = 500
save_every = 50                 steps between two checkpoints
[train.a2c]                     fields for that algorithm alone, in the place of those above;
learning_rate = 1e-4            --set train.learning_rate=... goes before both

[log]
tensorboard = true              event files in the run's folder
samples_every = 20              steps between two sample tables; 0: none
samples_shown = 4               completions in a table

[eval]                          of the held-out prompts: at the start, at the end, and
every = 50                      after so many steps; 0: at no other time
completions_per_prompt = 1
temperature = 1.0               default: that of training

[over_optimization]             watches a run by a second reward on the held-out prompts
gold = {use = "ROUGE"}          that reward, like one of rewards.functions; default, and "": nothing
every = 10                      is watched. The others are OverOptimizationMonitor's: steps between
completions_per_prompt = 1      two looks,
proxy = {use = "ChrF"}          what is trained on, where the rewards are normalised or follow a
                                schedule, so that they cannot be compared; default: these
alpha = 0.05                    the level of its test,
action = "warn"                 what an alarm does,
kl_budget = 20.0                nats per completion from the start; default: any

[preference]                    fields of PreferenceConfig, and
folds = 5                       of a cross-validation, whose models go to RUN/folds/0, 1, ..., for
                                over_optimization.gold; 0, the default: none. A run that is
                                interrupted here keeps its [supervised] part, and trains and
                                cross-validates from the start again, to the same model

A builder is called as f(folder, seed, **arguments), folder a Path or None, seed the run's. It
gives a dict of lists of rows, each a dict with "prompt" and further columns: "train";
"held_out", none of which is in another list; "supervised" (default: train), with the text
"reference" too; "validation" of the supervised part (default: every 20th of its rows, which are
then not trained on); and "texts", on which a tokenizer is trained (default: the prompts and
references of the supervised rows). For "preference": "train" and "held_out", rows as in pairs.

Paths are relative to the recipe's folder; those in --set to the current one. Among the arguments
of a function a text with a / in it is a path where there is such a file or folder, as in
{use = "PreferenceReward", model = "RUN/model"}.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from fastrl.cli.recipes.toml import RecipeError, flattened
from fastrl.trainers import ActorCriticConfig, PolicyGradientConfig

CONFIGS: tuple[Any, ...] = (PolicyGradientConfig, ActorCriticConfig)
# Of [train], but said elsewhere: by the key or option that follows.
SAID_ELSEWHERE = {
    "algorithm": "algorithm, above the tables",
    "output_dir": "the option --output",
    "reward_weights": "rewards.weights",
}
PREFERENCE = "preference"  # the algorithm that is none of the trainers'
FOLDS = "folds"  # of [preference], beside PreferenceConfig's fields
# What a resumed run may have other than the run that it goes on with.
FREE = (
    "log.", "eval.", "model.device", "data.eval", "data.eval_limit", "data.folder",
    "train.max_steps", "train.max_bad_steps", "train.save_every", "train.learning_rate",
    "train.micro_batch_tokens", "train.max_rows", "train.gradient_checkpointing",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Model:
    path: str | None = None
    random: dict[str, Any] | None = None
    lstm: dict[str, Any] | None = None
    start: str | None = None
    tokenizer: str | None = None
    vocab_size: int = 2048
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
    builder: str | None = None
    folder: str | None = None
    arguments: dict[str, Any] | None = None
    pairs: str | None = None
    eval_pairs: str | None = None


@dataclass(frozen=True, kw_only=True)
class Rewards:
    functions: list[str | dict[str, Any]] = field(default_factory=list)
    weights: list[float] | None = None


@dataclass(frozen=True, kw_only=True)
class Supervised:
    steps: int = 0
    tokens_per_step: int = 4096
    learning_rate: float = 3e-3
    warmup: int = 20
    weight_decay: float = 0.01
    prompt_weight: float = 0.0
    validate_every: int = 50


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
class OverOptimization:
    gold: str | dict[str, Any] | None = None
    proxy: str | dict[str, Any] | None = None
    every: int = 10
    completions_per_prompt: int = 1
    alpha: float = 0.05
    action: str = "warn"
    kl_budget: float | None = None


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A recipe whose keys and types are right; see the module.

    Attributes:
        source: the file, for messages.
        train: fields of `config_class`, those of the algorithm's own table among them.
        preference: fields of PreferenceConfig, and folds.
    """

    source: str
    algorithm: str
    model: Model
    data: Data
    rewards: Rewards
    supervised: Supervised
    train: dict[str, Any]
    log: Log
    eval: Eval
    over_optimization: OverOptimization
    preference: dict[str, Any]

    @property
    def config_class(self) -> Any:
        """PolicyGradientConfig, ActorCriticConfig or PreferenceConfig, by the algorithm."""
        if self.is_preference:
            from fastrl.rewards.preference import PreferenceConfig

            return PreferenceConfig
        return next(c for c in CONFIGS if self.algorithm in c.ALGORITHMS)

    @property
    def is_preference(self) -> bool:
        return self.algorithm == PREFERENCE

    @property
    def seed(self) -> int:
        """The run's, of whatever kind it is."""
        return int(self.config().seed)

    def config(self, **defaults: Any) -> Any:
        """The trainer's config, or that of the preference model's training.

        Args:
            defaults: fields for which the recipe has no value of its own.
        Raises:
            RecipeError: the config refuses a value.
        """
        if self.is_preference:
            section = PREFERENCE
            fields = {k: v for k, v in self.preference.items() if k != FOLDS}
        else:
            section, weights = "train", self.rewards.weights
            fields = {k: tuple(v) if isinstance(v, list) else v for k, v in self.train.items()}
            fields["algorithm"] = self.algorithm
            fields["reward_weights"] = None if weights is None else tuple(weights)
        try:
            return self.config_class(**{**defaults, **fields})
        except (TypeError, ValueError) as error:
            raise RecipeError(f"train: in [{section}] of {self.source}: {error}") from error

    def to_dict(self) -> dict[str, Any]:
        """The document of TOML that gives the same recipe."""
        document = dataclasses.asdict(self)
        del document["source"]
        return document

    def differences(self, other: "Recipe") -> list[str]:
        """Keys that make this another run than `other`."""
        mine, theirs = (flattened(recipe.to_dict()) for recipe in (self, other))
        return [
            key
            for key in sorted(mine.keys() | theirs.keys())
            if mine.get(key) != theirs.get(key) and not key.startswith(FREE)
        ]


SECTIONS = {
    "model": Model,
    "data": Data,
    "rewards": Rewards,
    "supervised": Supervised,
    "log": Log,
    "eval": Eval,
    "over_optimization": OverOptimization,
}
