"""How completions of a model are sampled: as in its training, where options say nothing else."""

import argparse
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from torch import Tensor

from fastrl.cli.recipes.loading import CHECKPOINT, RECIPE
from fastrl.cli.recipes.parse import read_recipe
from fastrl.cli.recipes.toml import RecipeError
from fastrl.trainers import _tree
from fastrl.trainers._checkpoint_files import DESCRIPTION, read_json, standing, unreadable
from fastrl.trainers.schedules import temperature

DEFAULTS: dict[str, Any] = {
    "max_new_tokens": 128,
    "temperature": 1.0,
    "eos_token_id": "auto",
    "stop_strings": (),
    "chat_template_kwargs": None,
    "precision": "float32",
}
COLUMN = "prompt"
OF_RUN = (CHECKPOINT, "best", "start")  # folders of a run with a model


def trained_with(name: str) -> dict[str, Any]:
    """The fields of the config that the model at `name` was trained with.

    Those in a checkpoint's trainer.json, with the temperature that the run has come to; of a run's
    start/, which has none, those of the run's recipe; {} of what no run has made.

    Args:
        name: as `fastrl.cli.recipes.loading.open_model` takes it.
    Raises:
        ValueError: trainer.json is damaged.  RecipeError: the recipe is.
    """
    folder = Path(name)
    for place in (standing(folder / CHECKPOINT), standing(folder)):
        if (place / DESCRIPTION).is_file():
            return _of_checkpoint(place / DESCRIPTION)
    beside = folder.absolute().parent / RECIPE
    if folder.is_dir() and beside.is_file():
        recipe = read_recipe(beside)
        return {} if recipe.is_preference else recipe.config().to_dict()
    return {}


def column_of(name: str) -> str:
    """The column that is the prompt: that of the run which `name` is, or is a model of."""
    folder = Path(name).absolute()
    run = folder.parent if folder.name in OF_RUN else folder
    return read_recipe(run / RECIPE).data.column if (run / RECIPE).is_file() else COLUMN


def _of_checkpoint(path: Path) -> dict[str, Any]:
    document = read_json(path)
    no_tensors: dict[str, Tensor] = {}
    try:
        config = _tree.unflatten(document["config"], no_tensors.__getitem__)
        reached = temperature(SimpleNamespace(**config), document["step"])  # type: ignore[arg-type]
    except (KeyError, TypeError, AttributeError) as error:
        raise unreadable(path, f"{type(error).__name__}: {error}") from error
    return {**config, "temperature": reached}


def add_sampling(result: argparse.ArgumentParser) -> None:
    """The options that `fastrl sample` and `fastrl eval` share."""
    result.add_argument("--max-new-tokens", type=int, help="default: of training, or else 128")
    result.add_argument(
        "--temperature", type=float, help="0: the likeliest tokens; default: of training, or else 1"
    )
    result.add_argument(
        "--stop", action="append", metavar="TEXT",
        help='a completion ends with it; repeatable; "": none; default: of training, or else none',
    )  # fmt: skip
    result.add_argument(
        "--eos", action="append", metavar="ID",
        help="a token that ends a completion; repeatable; none: none does; auto: the model's; "
        "default: of training, or else auto",
    )  # fmt: skip
    result.add_argument("--seed", type=int, default=0, help="the same seed, the same completions")
    result.add_argument("--tokenizer", help='in place of the model\'s own; "bytes" for bytes')
    result.add_argument(
        "--precision", choices=("float32", "bfloat16"),
        help="of the layers, by autocast; default: of training, or else float32",
    )  # fmt: skip
    result.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    result.add_argument("--device", default="auto", help="auto, cpu or cuda")


def said(options: argparse.Namespace) -> dict[str, Any]:
    """Those of `DEFAULTS` that the options of `add_sampling` give a value.

    Raises:
        RecipeError: --eos is none.
    """
    found: dict[str, Any] = {
        "max_new_tokens": options.max_new_tokens,
        "temperature": options.temperature,
        "precision": options.precision,
        "stop_strings": None if options.stop is None else tuple(filter(None, options.stop)),
    }
    found = {name: value for name, value in found.items() if value is not None}
    return found if options.eos is None else {**found, "eos_token_id": _eos(options.eos)}


def _eos(words: list[str]) -> str | tuple[int, ...] | None:
    if words == ["auto"]:
        return "auto"
    if words == ["none"]:
        return None
    if not all(word.isascii() and word.isdigit() for word in words):
        raise RecipeError(
            f"train: expected --eos whole numbers, or auto or none alone, got {', '.join(words)}. "
            "Leave it out for the model's own."
        )
    return tuple(map(int, words))
