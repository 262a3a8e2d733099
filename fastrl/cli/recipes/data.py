"""The rows of a recipe: prompts from files, or what a builder makes of a data set."""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastrl.cli.recipes.imports import load_object, said
from fastrl.cli.recipes.prompts import is_split, load_prompts
from fastrl.cli.recipes.schema import Recipe
from fastrl.cli.recipes.tasks import BUILDERS
from fastrl.cli.recipes.tasks.files import split_off, without
from fastrl.cli.recipes.toml import RecipeError

VALIDATION_EVERY = 20  # of the supervised rows, where a builder gives no validation rows
# Of the pairs: the temperature is fitted to them, the weights are not. As many are held out where
# the recipe has no held-out pairs.
CALIBRATION = 0.1
LISTS = ("train", "held_out", "supervised", "validation", "texts")


@dataclass(frozen=True)
class TaskData:
    """The rows of a run.

    Attributes:
        train, held_out: entries for a trainer; held_out is None where the recipe has none.
        supervised, validation: dicts with texts "prompt" and "reference"; empty without
            [supervised].
        calibration: of "preference", pairs that are not in train.
        given_texts: what the builder says that the training texts are.
    """

    train: Any
    held_out: Any
    supervised: Sequence[dict[str, Any]]
    validation: Sequence[dict[str, Any]]
    calibration: Sequence[dict[str, Any]] = ()
    given_texts: Sequence[str] | None = None

    def texts(self) -> Sequence[str]:
        """The training texts: the builder's, or the prompts with their references."""
        if self.given_texts is not None:
            return self.given_texts
        return texts_of(self.supervised or self.train)


def load_data(recipe: Recipe) -> TaskData:
    """The rows that the recipe asks for.

    Raises:
        RecipeError: they cannot be loaded or built, or lack what is asked for.
    """
    data = recipe.data
    if data.pairs is not None:
        train = load_prompts(data.pairs, key="data.pairs", limit=data.limit)
        held_out = data.eval_pairs and load_prompts(
            data.eval_pairs, key="data.eval_pairs", limit=data.eval_limit
        )
        rows: dict[str, Any] = {"train": train, "held_out": held_out or None}
        where = "data.pairs"
    elif data.builder is None:
        train = _prompts(recipe)
        rows = {"train": train, "held_out": _held_out_prompts(recipe)}
        where = "data.prompts"
    else:
        rows = built_rows(recipe)
        if not recipe.is_preference:
            rows.setdefault("supervised", rows["train"])  # whole: the limit is of prompts
        rows["train"] = rows["train"][: data.limit]
        rows["held_out"] = rows.get("held_out", [])[: data.eval_limit] or None
        where = f"data.builder {data.builder}"
    if recipe.is_preference:
        _check_pairs(rows, where)
        rows = _split_pairs(rows, recipe.seed)
    supervised, validation = _supervised(recipe, rows, where)
    return TaskData(
        train=rows["train"],
        held_out=rows["held_out"],
        supervised=supervised,
        validation=validation,
        calibration=rows.get("calibration", ()),
        given_texts=rows.get("texts"),
    )


def built_rows(recipe: Recipe) -> dict[str, Any]:
    """What the recipe's builder gives, checked.

    Raises:
        RecipeError: there is no such builder, it takes other arguments, raised, or gave no rows.
    """
    data = recipe.data
    assert data.builder is not None, "the caller has looked"
    name = BUILDERS.get(data.builder, data.builder)
    if ":" not in name:
        raise RecipeError(
            f"train: expected data.builder one of {', '.join(BUILDERS)}, or file.py:function, got "
            f"{name}."
        )
    function = load_object(name, "data.builder")
    arguments = data.arguments or {}
    folder = None if data.folder is None else Path(data.folder)
    try:
        inspect.signature(function).bind(folder, recipe.seed, **arguments)
    except TypeError as error:
        known = ", ".join(list(inspect.signature(function).parameters)[2:]) or "none"
        raise RecipeError(
            f"train: expected data.arguments that {data.builder} has, got {error}. It has {known}."
        ) from error
    try:
        rows = function(folder, recipe.seed, **arguments)
    except RecipeError:
        raise
    except Exception as error:  # whatever the user's builder raises
        raise RecipeError(
            f"train: expected data.builder {data.builder} to make rows, got {said(error)}."
        ) from error
    return _checked(rows, data.builder)


def _checked(rows: Any, builder: str) -> dict[str, Any]:
    where = f"train: expected data.builder {builder} to give"
    if not isinstance(rows, Mapping) or not rows.keys() <= set(LISTS) or not rows.get("train"):
        got = ", ".join(rows) if isinstance(rows, Mapping) else type(rows).__name__
        raise RecipeError(f"{where} a dict of {', '.join(LISTS)} with train rows, got {got}.")
    for name, entries in rows.items():
        for index, row in enumerate(entries):
            if name != "texts" and not (isinstance(row, Mapping) and "prompt" in row):
                raise RecipeError(f'{where} {name} with "prompt", got row {index} {row!r}.')
    known = {
        str(row["prompt"])
        for name in ("train", "supervised", "validation")
        for row in rows.get(name, ())
    }
    for row in rows.get("held_out", ()):
        if str(row["prompt"]) in known:
            raise RecipeError(
                f"{where} held_out prompts that training does not have, got {row['prompt']!r} in "
                "both. Leave it out of one of them."
            )
    return dict(rows)


def _supervised(
    recipe: Recipe, rows: dict[str, Any], where: str
) -> tuple[Sequence[dict[str, Any]], Sequence[dict[str, Any]]]:
    """The rows of the supervised part, and those that it is validated on."""
    if not recipe.supervised.steps:
        return [], []
    train = rows.get("supervised")
    train = [rows["train"][i] for i in range(len(rows["train"]))] if train is None else train
    validation = rows.get("validation")
    if validation is None:
        validation = train[::VALIDATION_EVERY]
        train = without(train, validation)
    for name, entries in (("train", train), ("validate", validation)):
        if not entries:
            raise RecipeError(f"train: expected rows of {where} to {name} [supervised] on, got 0.")
        for row in entries:
            if not (isinstance(row["prompt"], str) and isinstance(row.get("reference"), str)):
                raise RecipeError(
                    f'train: expected rows of {where} with texts "prompt" and "reference" for '
                    f"[supervised], got {row!r}."
                )
    return train, validation


def texts_of(rows: Any) -> list[str]:
    """What rows have of text: the prompt, and what is to follow it."""
    texts = []
    for index in range(len(rows)):
        row = rows[index]
        parts = (row["prompt"], row.get("reference", row.get("chosen", "")))
        texts.append("".join(part for part in parts if isinstance(part, str)))
    return texts


def _check_pairs(rows: dict[str, Any], where: str) -> None:
    for name in ("train", "held_out"):
        for row in rows[name] or ():
            missing = [column for column in ("chosen", "rejected") if column not in row]
            if missing:
                raise RecipeError(
                    f'train: expected pairs of {where} with "prompt", "chosen" and "rejected", got '
                    f'no "{missing[0]}" in {row!r}.'
                )


def _split_pairs(rows: dict[str, Any], seed: int) -> dict[str, Any]:
    """The rows with "calibration", with "held_out" where they have none, and with "supervised".

    What is preferred is what to imitate, but for the pairs that something is measured on.
    """
    train, calibration = split_off(list(rows["train"]), CALIBRATION, seed)
    train, held_out = without(train, calibration), rows["held_out"]
    if held_out is None:
        train, held_out = split_off(train, CALIBRATION, seed + 1)
        train = without(train, held_out)
    supervised = [{**row, "reference": row["chosen"]} for row in train]
    own = {"train": train, "calibration": calibration, "held_out": held_out}
    return {"supervised": supervised, **rows, **own}


def _prompts(recipe: Recipe) -> Any:
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


def _held_out_prompts(recipe: Recipe) -> Any:
    """None where the recipe has none."""
    data = recipe.data
    if data.eval is None:
        return None
    source, split = data.eval, data.split
    if isinstance(source, str) and isinstance(data.prompts, str) and is_split(source):
        source, split = data.prompts, source
    return load_prompts(
        source,
        key="data.eval",
        column=data.column,
        limit=data.eval_limit,
        split=split,
        subset=data.subset,
    )
