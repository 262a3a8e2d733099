"""The model that an algorithm starts from, in the run's folder: trained there, or another run's."""

import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from rich.console import Console

from fastrl.cli.console import say
from fastrl.cli.recipes import trained_on
from fastrl.cli.recipes.build import Parts
from fastrl.cli.recipes.folder import RecipeFolder
from fastrl.cli.recipes.models import load_tokenizer
from fastrl.cli.recipes.supervised import SupervisedTraining
from fastrl.cli.training.interruption import Interrupted, StopRequest
from fastrl.models.storage import save_model
from fastrl.trainers.loggers import JsonLines, ProgressBar


def prepare_start(
    parts: Parts, policy: Any, folder: RecipeFolder, stop: StopRequest, console: Console
) -> bool:
    """What comes before the algorithm; True where there is another policy to begin with then.

    Several processes do it together, and the first writes.

    A tokenizer that was trained is written to the folder first, then the supervised part runs, if
    the recipe has one, and what it gives is written as a whole. A run that was killed on the way
    goes on from the last validation.

    Args:
        policy: of parts.
    Raises:
        Interrupted: by a signal, with all saved.
    """
    workers = parts.workers
    if workers.on_first("the start", lambda: _is_prepared(parts, policy, folder)):
        return False
    _train(parts, policy, folder, stop, console)
    workers.on_first("the new start", lambda: _write_start(folder, policy, parts))
    parts.start = folder.start
    parts.tokenizer = load_tokenizer(str(folder.start))
    return True


def _is_prepared(parts: Parts, policy: Any, folder: RecipeFolder) -> bool:
    """Write what is known before any training; whether there is none to come."""
    is_trained = parts.recipe.model.tokenizer == "bpe" and parts.start is None
    if is_trained and not folder.tokenizer.is_dir():
        write_whole(folder.tokenizer, parts.tokenizer.save_pretrained)
    if folder.start.is_dir():
        folder.supervised_state.unlink(missing_ok=True)
        return True
    if parts.start is not None:  # another run's: one's own copy, as that run may be deleted
        _write_start(folder, policy, parts)
        return True
    return not parts.recipe.supervised.steps


def _train(
    parts: Parts, policy: Any, folder: RecipeFolder, stop: StopRequest, console: Console
) -> None:
    recipe, data, is_first = parts.recipe, parts.data, parts.workers.is_first
    settings = recipe.supervised
    training = SupervisedTraining(
        policy, parts.tokenizer, data.supervised, data.validation, settings, recipe.seed
    )
    if folder.supervised_state.exists():
        training.resume(folder.supervised_state)
    say(
        console,
        f"supervised: {len(data.supervised)} rows, {len(data.validation)} to validate on; "
        f"run folder {folder.path}",
    )
    step = training.step
    with ExitStack() as stack:
        log = stack.enter_context(JsonLines(folder.supervised, step=step)) if is_first else None
        bar = stack.enter_context(
            ProgressBar(settings.steps, title="supervised", done=step, console=console)
        )

        def save() -> None:
            if is_first:
                training.save(folder.supervised_state)

        def on_step(record: dict[str, float]) -> None:
            if log is not None:
                log(record)
            bar.update(int(record["step"]), f"loss {record['loss']:.3f}")
            if "validation_loss" in record:
                save()
            try:
                stop.check()
            except Interrupted:
                save()
                raise

        stop.check()
        training.train(on_step)


def _write_start(folder: RecipeFolder, policy: Any, parts: Parts) -> None:
    def write(place: Path) -> None:
        save_model(policy, place)
        parts.tokenizer.save_pretrained(place)
        if parts.start is None:
            trained_on.note_prompts(place, parts.data.supervised)
        elif (parts.start / trained_on.FILE).is_file():
            shutil.copy(parts.start / trained_on.FILE, place)

    write_whole(folder.start, write)
    folder.supervised_state.unlink(missing_ok=True)


def write_whole(place: Path, write: Any) -> None:
    """A folder that is there with all its files, or not at all."""
    partial = place.with_name(f".{place.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    write(partial)
    shutil.rmtree(place, ignore_errors=True)  # of a run that was killed right after this
    partial.rename(place)
