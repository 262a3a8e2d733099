"""The algorithm's part of a run: training, evaluations, and what is logged of them."""

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from fastrl.cli.console import say
from fastrl.cli.recipes.build import MONITOR, Parts
from fastrl.cli.recipes.folder import RecipeFolder
from fastrl.cli.recipes.result import show_result
from fastrl.cli.training.interruption import StopRequest
from fastrl.trainers import checkpoint
from fastrl.trainers.loggers import JsonLines, ProgressBar, SampleTable, TensorBoard

BEFORE, AFTER = "before", "after"  # the entries of results.json
SAMPLES = 20  # held-out prompts in results.json with what was sampled from them
EVALUATION_SEED = 12345  # the same at every step, so that differences are paired


@dataclass
class Run:
    """A trainer that stands where the run stands, in a folder that is locked."""

    parts: Parts
    folder: RecipeFolder
    trainer: Any
    stop: StopRequest
    console: Console

    def __post_init__(self) -> None:
        self.recipe, self.workers = self.parts.recipe, self.parts.workers
        self.held_out: list[Any] | None = self.parts.data.held_out
        self.results = self.workers.on_first("the results", self._read_results)

    def _read_results(self) -> dict[str, Any]:
        exists = self.folder.results.exists()
        return self.folder.read_json(self.folder.results) if exists else {}

    def _write(self, path: Path, document: dict[str, Any]) -> None:
        if self.workers.is_first:
            self.folder.write_json(path, document)

    def go_on(self) -> int:
        """Train to the end; the exit status."""
        self._write(self.folder.trainer_config, self.trainer.config.to_dict())
        self._say(
            f"{self.recipe.algorithm}: {len(self.trainer.dataset)} prompts, "
            f"{len(self.held_out or ())} held out; run folder {self.folder.path}"
        )
        with ExitStack() as stack:
            self.stop.check()
            self._train(stack)
        if self.workers.is_first:
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
        if not self.workers.is_first:
            return []
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
            "samples": self._samples(result) if self.workers.is_first else [],
            **({"stopped": True} if stopped else {}),
        }
        self._write(self.folder.results, self.results)

    def _note_monitor(self) -> None:
        """Into results.json: the first of its evaluations is of no step."""
        monitor = self.trainer.attachments.get(MONITOR)
        if monitor is not None and self.results.get("monitor") != (found := monitor.evaluations):
            self.results["monitor"] = [dict(evaluation) for evaluation in found]
            self._write(self.folder.results, self.results)

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
