"""Where a recipe's run keeps what it writes."""

from pathlib import Path
from typing import ClassVar

from fastrl.cli.recipes.schema import Recipe
from fastrl.cli.recipes.toml import write_toml
from fastrl.cli.training.run_folder import RunFolder, write_atomically


class RecipeFolder(RunFolder):
    """The folder of a run that a recipe describes.

    recipe.toml  config.json  metrics.jsonl  samples.jsonl  tensorboard/  results.json  checkpoint/
    versions.json              what it is made with, and digests of its rows and its own code
    tokenizer/                 of a tokenizer that is trained
    supervised.jsonl  start/   of [supervised]: its steps, and the model that it gives
    best/                      of [over_optimization]: the checkpoint with the most gold; "monitor"
                               of results.json has all its evaluations
    model/                     of a preference model, which has no checkpoint/ and no samples.jsonl

    The recipe has what was asked for, config.json each field of the trainer's config, defaults too.
    """

    FIRST: ClassVar[str] = "recipe.toml"

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.trainer_config = path / "config.json"
        self.samples = path / "samples.jsonl"
        self.tensorboard = path / "tensorboard"
        self.checkpoint = path / "checkpoint"
        self.tokenizer = path / "tokenizer"
        self.supervised = path / "supervised.jsonl"
        self.supervised_state = path / "supervised.safetensors"
        self.start = path / "start"
        self.best = path / "best"

    def write_recipe(self, recipe: Recipe) -> None:
        write_atomically(self.config, write_toml(recipe.to_dict()).encode())
