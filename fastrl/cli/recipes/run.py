"""One run of a recipe: its folder, its trainer and loggers, from wherever it stands."""

import shutil
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers.utils import logging as transformers_logging

from fastrl.cli.recipes.algorithm import Run
from fastrl.cli.recipes.build import Parts
from fastrl.cli.recipes.built_in import find_recipe
from fastrl.cli.recipes.contents import check_contents, contents_of
from fastrl.cli.recipes.folder import RecipeFolder
from fastrl.cli.recipes.parse import read_recipe
from fastrl.cli.recipes.preference import train_preference
from fastrl.cli.recipes.schema import Recipe
from fastrl.cli.recipes.start import prepare_start
from fastrl.cli.recipes.toml import RecipeError
from fastrl.cli.recipes.versions import FILE as VERSIONS
from fastrl.cli.recipes.versions import note_versions, read_starts
from fastrl.cli.training.interruption import Interrupted, StopRequest
from fastrl.cli.training.run_folder import RunFolderError, path_of_now
from fastrl.cli.training.workers import Workers
from fastrl.trainers import checkpoint
from fastrl.trainers._checkpoint_files import beside


def start(
    name: str, sets: Sequence[str], output: Path | None, stop: StopRequest, workers: Workers
) -> int:
    """A new run; nothing is written before its recipe, data and model are known to be good."""
    recipe = read_recipe(find_recipe(name), sets)
    folder = RecipeFolder(workers.on_first("the folder's name", lambda: output or path_of_now()))
    workers.on_first("the new folder", lambda: RecipeFolder.check_new(folder.path))
    with stop.at_once():
        parts, learner = _built(recipe, folder, workers)
    workers.on_first("the folder", lambda: RecipeFolder.create(folder.path))
    with workers.first_in(folder.lock()):
        workers.on_first("the recipe", lambda: _write(folder, recipe, parts))
        return _run(parts, learner, folder, stop)


def _write(folder: RecipeFolder, recipe: Recipe, parts: Parts) -> None:
    folder.write_recipe(recipe)
    note_versions(folder, 0, contents_of(recipe, parts.data))


def go_on(
    path: Path, name: str | None, sets: Sequence[str], stop: StopRequest, workers: Workers
) -> int:
    """A run that was begun, from its last checkpoint, or from its start where it has none.

    Args:
        path: its folder.
        name: a recipe, which has to be the run's own but for what a run may change; None: that.
        sets: as for `start`.
    """
    folder = RecipeFolder.open(path)
    with workers.first_in(folder.lock()):
        saved = read_recipe(folder.config)
        recipe = read_recipe(folder.config if name is None else find_recipe(name), sets)
        different = recipe.differences(saved)
        if different:
            raise RecipeError(
                f"train: expected the recipe of the run in {path}, got another "
                f"{', '.join(different)}. A run goes on with its own; start a new one for "
                "others."
            )
        with stop.at_once():
            parts, learner = _built(recipe, folder, workers)
            contents = contents_of(recipe, parts.data)
            last = (read_starts(folder) or [{}])[-1]
            changes = check_contents(path / VERSIONS, last, contents)
            if not recipe.is_preference:
                _resume(learner, folder, workers)
                _check_steps(recipe, saved, learner.step)

        def write() -> None:
            for change in changes:
                print(f"train: {change}.", file=sys.stderr)
            if recipe.to_dict() != saved.to_dict():
                folder.write_recipe(recipe)
            note_versions(folder, 0 if recipe.is_preference else learner.step, contents)

        workers.on_first("the recipe", write)
        return _run(parts, learner, folder, stop)


def _check_steps(recipe: Recipe, saved: Recipe, step: int) -> None:
    """Raise where a run shall end before the step at which it stands."""
    wanted = recipe.config().max_steps
    if wanted < step and recipe.train != saved.train:
        raise RecipeError(
            f"train: expected train.max_steps >= {step}, the steps that the run has, got {wanted}. "
            "Resume it without."
        )


def _built(recipe: Recipe, folder: RecipeFolder, workers: Workers) -> tuple[Parts, Any]:
    """What a run is made of, and a trainer at its start; for a preference model its policy."""
    if recipe.is_preference and workers.count > 1:
        raise RecipeError(
            f'train: expected one process for algorithm = "preference", got {workers.count}. '
            "Start it without torchrun."
        )
    parts = Parts.load(
        recipe, folder.path, tokenizer=folder.tokenizer, start=folder.start, workers=workers
    )
    if workers.count > 1:
        _check_rows(contents_of(recipe, parts.data)["rows"], workers)
    return parts, parts.policy() if recipe.is_preference else parts.trainer()


def _check_rows(rows: dict[str, str], workers: Workers) -> None:
    """Raise where a builder has given the processes different rows, or in another order."""
    first, *others = workers.told("the rows", rows)
    for other in others:
        for name in sorted(first.keys() | other.keys()):
            if first.get(name) != other.get(name):
                raise RecipeError(
                    f"train: expected the same {name} rows in all processes, got others. Let "
                    "data.builder depend on folder and seed alone, and on no order of a set."
                )


def _run(parts: Parts, learner: Any, folder: RecipeFolder, stop: StopRequest) -> int:
    """The supervised part and the algorithm's; the exit status.

    Args:
        learner: as `_built` gives it, or a trainer where the run stands.
    """
    transformers_logging.disable_progress_bar()  # of each checkpoint, across ours
    console = Console(highlight=False, quiet=not parts.workers.is_first)
    is_preference = parts.recipe.is_preference
    policy = learner if is_preference else learner.policy
    try:
        is_new = prepare_start(parts, policy, folder, stop, console)
    except Interrupted as error:
        return _interrupted(error, "in the supervised part", parts)
    if is_preference:
        try:
            train_preference(parts, folder, stop, console)
        except Interrupted as error:
            return _interrupted(error, "in training", parts, "This part begins again")
        return 0
    # What a trainer remembers of its start is the trained policy.
    trainer = parts.trainer() if is_new else learner
    run = Run(parts, folder, trainer, stop, console)
    try:
        return run.go_on()
    except Interrupted as error:
        trainer.save(folder.checkpoint)
        return _interrupted(error, f"after step {trainer.step}", parts)


def _interrupted(
    error: Interrupted, where: str, parts: Parts, saved: str = "Everything is saved"
) -> int:
    if parts.workers.is_first:
        print(
            f"\nStopped by {error} {where}. {saved}; "
            f"go on with: fastrl train --resume {parts.output}",
            file=sys.stderr,
        )
    return 0 if error.signal_number == signal.SIGTERM else 128 + error.signal_number


def _resume(trainer: Any, folder: RecipeFolder, workers: Workers) -> None:
    """From the last checkpoint; a run that was stopped before its first one begins again."""
    if not workers.on_first("the checkpoint", lambda: _has_checkpoint(folder)):
        return
    try:
        trainer.resume(folder.checkpoint)
    except ValueError as error:
        raise RunFolderError(
            f"{error} Or delete {folder.checkpoint} to begin again, and resume."
        ) from error


def _has_checkpoint(folder: RecipeFolder) -> bool:
    """Without one, what stands there of steps that are repeated is deleted."""
    if checkpoint.exists(folder.checkpoint):
        return True
    for place in (folder.best, beside(folder.best, "previous")):
        shutil.rmtree(place, ignore_errors=True)
    return False
