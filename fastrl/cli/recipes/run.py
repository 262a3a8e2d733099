"""One run of a recipe: its folder, its trainer and loggers, from wherever it stands."""

import shutil
import signal
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers.utils import logging as transformers_logging

from fastrl.cli.console import say
from fastrl.cli.recipes.build import MONITOR, Parts
from fastrl.cli.recipes.built_in import find_recipe
from fastrl.cli.recipes.contents import check_contents, contents_of
from fastrl.cli.recipes.folder import RecipeFolder
from fastrl.cli.recipes.parse import read_recipe
from fastrl.cli.recipes.preference import train_preference
from fastrl.cli.recipes.result import show_result
from fastrl.cli.recipes.schema import Recipe
from fastrl.cli.recipes.start import prepare_start
from fastrl.cli.recipes.toml import RecipeError
from fastrl.cli.recipes.versions import FILE as VERSIONS
from fastrl.cli.recipes.versions import note_versions, read_starts
from fastrl.cli.training.interruption import Interrupted, StopRequest
from fastrl.cli.training.run_folder import RunFolderError, path_of_now
from fastrl.trainers import checkpoint
from fastrl.trainers._checkpoint_files import beside
from fastrl.trainers.loggers import JsonLines, ProgressBar, SampleTable, TensorBoard

BEFORE, AFTER = "before", "after"  # the entries of results.json
SAMPLES = 20  # held-out prompts in results.json with what was sampled from them
EVALUATION_SEED = 12345  # the same at every step, so that differences are paired


def start(name: str, sets: Sequence[str], output: Path | None, stop: StopRequest) -> int:
    """A new run; nothing is written before its recipe, data and model are known to be good."""
    recipe = read_recipe(find_recipe(name), sets)
    path = output or path_of_now()
    RecipeFolder.check_new(path)
    with stop.at_once():
        parts, learner = _built(recipe, RecipeFolder(path))
    folder = RecipeFolder.create(path)
    with folder.lock():
        folder.write_recipe(recipe)
        note_versions(folder, 0, contents_of(recipe, parts.data))
        return _run(parts, learner, folder, stop)


def go_on(path: Path, name: str | None, sets: Sequence[str], stop: StopRequest) -> int:
    """A run that was begun, from its last checkpoint, or from its start where it has none.

    Args:
        path: its folder.
        name: a recipe, which has to be the run's own but for what a run may change; None: that.
        sets: as for `start`.
    """
    folder = RecipeFolder.open(path)
    with folder.lock():
        saved = read_recipe(folder.config)
        recipe = read_recipe(folder.config if name is None else find_recipe(name), sets)
        different = recipe.differences(saved)
        if different:
            raise RecipeError(
                f"train: expected the recipe of the run in {path}, got another "
                f"{', '.join(different)}. A run goes on with its own; start a new one for others."
            )
        with stop.at_once():
            parts, learner = _built(recipe, folder)
            contents = contents_of(recipe, parts.data)
            last = (read_starts(folder) or [{}])[-1]
            changes = check_contents(path / VERSIONS, last, contents)
            if not recipe.is_preference:
                _resume(learner, folder)
                _check_steps(recipe, saved, learner.step)
        for change in changes:
            print(f"train: {change}.", file=sys.stderr)
        if recipe.to_dict() != saved.to_dict():
            folder.write_recipe(recipe)
        note_versions(folder, 0 if recipe.is_preference else learner.step, contents)
        return _run(parts, learner, folder, stop)


def _check_steps(recipe: Recipe, saved: Recipe, step: int) -> None:
    """Raise where a run shall end before the step at which it stands."""
    wanted = recipe.config().max_steps
    if wanted < step and recipe.train != saved.train:
        raise RecipeError(
            f"train: expected train.max_steps >= {step}, the steps that the run has, got {wanted}. "
            "Resume it without."
        )


def _built(recipe: Recipe, folder: RecipeFolder) -> tuple[Parts, Any]:
    """What a run is made of, and a trainer at its start; for a preference model its policy."""
    parts = Parts.load(recipe, folder.path, tokenizer=folder.tokenizer, start=folder.start)
    return parts, parts.policy() if recipe.is_preference else parts.trainer()


def _run(parts: Parts, learner: Any, folder: RecipeFolder, stop: StopRequest) -> int:
    """The supervised part and the algorithm's; the exit status.

    Args:
        learner: as `_built` gives it, or a trainer where the run stands.
    """
    transformers_logging.disable_progress_bar()  # of each checkpoint, across ours
    console = Console(highlight=False)
    is_preference = parts.recipe.is_preference
    policy = learner if is_preference else learner.policy
    try:
        is_new = prepare_start(parts, policy, folder, stop, console)
    except Interrupted as error:
        return _interrupted(error, "in the supervised part", folder)
    if is_preference:
        try:
            train_preference(parts, folder, stop, console)
        except Interrupted as error:
            return _interrupted(error, "in training", folder, "This part begins again")
        return 0
    # What a trainer remembers of its start is the trained policy.
    trainer = parts.trainer() if is_new else learner
    run = Run(parts.recipe, folder, trainer, parts.data.held_out, stop, console)
    try:
        return run.go_on()
    except Interrupted as error:
        trainer.save(folder.checkpoint)
        return _interrupted(error, f"after step {trainer.step}", folder)


def _interrupted(
    error: Interrupted, where: str, folder: RecipeFolder, saved: str = "Everything is saved"
) -> int:
    print(
        f"\nStopped by {error} {where}. {saved}; go on with: fastrl train --resume {folder.path}",
        file=sys.stderr,
    )
    return 0 if error.signal_number == signal.SIGTERM else 128 + error.signal_number


def _resume(trainer: Any, folder: RecipeFolder) -> None:
    """From the last checkpoint; a run that was stopped before its first one begins again."""
    if not checkpoint.exists(folder.checkpoint):
        for place in (folder.best, beside(folder.best, "previous")):  # of steps that are repeated
            shutil.rmtree(place, ignore_errors=True)
        return
    try:
        trainer.resume(folder.checkpoint)
    except ValueError as error:
        raise RunFolderError(
            f"{error} Or delete {folder.checkpoint} to begin again, and resume."
        ) from error


@dataclass
class Run:
    """A trainer that stands where the run stands, in a folder that is locked."""

    recipe: Recipe
    folder: RecipeFolder
    trainer: Any
    held_out: list[Any] | None
    stop: StopRequest
    console: Console

    def __post_init__(self) -> None:
        exists = self.folder.results.exists()
        self.results = self.folder.read_json(self.folder.results) if exists else {}

    def go_on(self) -> int:
        """Train to the end; the exit status."""
        self.folder.write_json(self.folder.trainer_config, self.trainer.config.to_dict())
        self._say(
            f"{self.recipe.algorithm}: {len(self.trainer.dataset)} prompts, "
            f"{len(self.held_out or ())} held out; run folder {self.folder.path}"
        )
        with ExitStack() as stack:
            self.stop.check()
            self._train(stack)
        show_result(self.console, self.folder.metrics, self.results, self.recipe)
        if self.results[AFTER].get("stopped"):
            self._say(f"\nStopped by [over_optimization] after step {self.trainer.step}.")
        has_one = checkpoint.exists(self.folder.checkpoint)  # none of 0 steps
        what = "The run and its checkpoint are" if has_one else "The run is"
        self._say(f"\n{what} in {self.folder.path}")
        return 0

    def _train(self, stack: ExitStack) -> None:
        trainer, step = self.trainer, self.trainer.step
        # The bar comes last, so that it is the first to go when something fails.
        loggers = [stack.enter_context(logger) for logger in self._loggers(step)]
        if step == 0 and BEFORE not in self.results:
            self._evaluate(BEFORE)
        every, last = self.recipe.eval.every, trainer.config.max_steps

        def on_step(record: dict[str, float]) -> None:
            figures: dict[str, float] = {}
            try:
                if every and trainer.step % every == 0 and trainer.step < last:
                    figures = _figures(self._evaluation())
            finally:  # a step that was taken is logged, whatever becomes of its evaluation
                for logger in loggers:
                    logger({**record, **figures})
            self._note_monitor()
            self.stop.check()

        if not self.results.get(AFTER, {}).get("stopped"):
            trainer.train(on_step=on_step)
            self._note_monitor()
        if self.results.get(AFTER, {}).get("step") != trainer.step:
            self._evaluate(AFTER, stopped=trainer.step < last)

    def _loggers(self, step: int) -> list[Any]:
        log, folder, trainer = self.recipe.log, self.folder, self.trainer
        loggers: list[Any] = [JsonLines(folder.metrics, step=step)]
        if log.tensorboard:
            loggers.append(TensorBoard(folder.tensorboard, step=step))
        if log.samples_every:
            loggers.append(
                SampleTable(
                    trainer.samples,
                    folder.samples,
                    every=log.samples_every,
                    rows=log.samples_shown,
                    console=self.console,
                    step=step,
                )
            )
        total = trainer.config.max_steps
        loggers.append(
            ProgressBar(total, title=self.recipe.algorithm, done=step, console=self.console)
        )
        return loggers

    def _evaluate(self, entry: str, *, stopped: bool = False) -> None:
        """Put an evaluation of the held-out prompts into results.json.

        Args:
            stopped: the monitor has ended the run before its last step.
        """
        result = self._evaluation()
        self.results[entry] = {
            "step": self.trainer.step,
            **_figures(result),
            "prompt_rewards": result.get("prompt_rewards", []),
            "samples": self._samples(result),
            **({"stopped": True} if stopped else {}),
        }
        self.folder.write_json(self.folder.results, self.results)

    def _note_monitor(self) -> None:
        """Into results.json: the first of its evaluations is of no step."""
        monitor = self.trainer.attachments.get(MONITOR)
        if monitor is not None and self.results.get("monitor") != (found := monitor.evaluations):
            self.results["monitor"] = [dict(evaluation) for evaluation in found]
            self.folder.write_json(self.folder.results, self.results)

    def _evaluation(self) -> dict[str, Any]:
        """What `Trainer.evaluate` gives; a signal ends it at once."""
        if not self.held_out:
            return {}
        settings = self.recipe.eval
        with self.stop.at_once():
            return self.trainer.evaluate(
                self.held_out,
                completions_per_prompt=settings.completions_per_prompt,
                temperature=settings.temperature,
                seed=EVALUATION_SEED,
            )

    def _samples(self, result: dict[str, Any]) -> list[dict[str, Any]]:
        """The first completion of some held-out prompts, as `fastrl report` shows them."""
        samples = []
        if self.held_out:
            totals, is_used = self.trainer.scorer.last.totals, self.trainer.scorer.last.is_used
            for index in range(min(SAMPLES, len(self.held_out))):
                row, at = self.held_out[index], index * self.recipe.eval.completions_per_prompt
                samples.append(
                    {
                        "prompt": row["prompt"],
                        "completion": result["completions"][index][0],
                        "reward": float(totals[at]) if is_used[at] else None,
                        "reference": row.get("reference"),
                    }
                )
        return samples

    def _say(self, text: str) -> None:
        say(self.console, text)


def _figures(result: dict[str, Any]) -> dict[str, float]:
    """The numbers of an evaluation as "eval/<name>"."""
    return {f"eval/{k}": v for k, v in result.items() if isinstance(v, int | float)}
