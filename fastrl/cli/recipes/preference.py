"""algorithm = "preference": a reward model from pairs of completions, one of them preferred.

The run's folder gets model/ (`fastrl.rewards.preference.PreferenceModel.load`), metrics.jsonl and
results.json: what the model is worth on the held-out pairs "before" and "after", "uncalibrated"
with the temperature that training leaves, "calibration", and "cross_validation", of all pairs that
are not held out, by the models in folds/0, folds/1, ..., each trained without those of its fold. A
[supervised] part without rows of its own reads the preferred completions of the pairs that are
trained on, so the folds' models have read those as texts.
"""

import math
from pathlib import Path
from typing import Any

from rich.console import Console

from fastrl.cli.console import say
from fastrl.cli.recipes.build import Parts
from fastrl.cli.recipes.folder import RecipeFolder
from fastrl.cli.recipes.schema import FOLDS
from fastrl.cli.recipes.start import write_whole
from fastrl.cli.recipes.toml import RecipeError
from fastrl.cli.training.interruption import StopRequest
from fastrl.trainers.loggers import JsonLines, ProgressBar


def train_preference(
    parts: Parts, folder: RecipeFolder, stop: StopRequest, console: Console
) -> None:
    """Train, calibrate, cross-validate and write what came of it.

    A run that is interrupted begins this part again when it goes on, to the same model.

    Raises:
        RecipeError: the pairs cannot be used.
        Interrupted: by a signal.
    """
    is_done = folder.results.exists() and (folder.path / "model").is_dir()
    if is_done:
        results = folder.read_json(folder.results)
    else:
        try:
            results = _trained(parts, folder, stop, console)
        except ValueError as error:
            raise RecipeError(f"train: in {parts.recipe.source}: {error}") from error
        folder.write_json(folder.results, results)
    _show(results, console)
    say(console, f"\nThe model is in {folder.path / 'model'}")


def _trained(
    parts: Parts, folder: RecipeFolder, stop: StopRequest, console: Console
) -> dict[str, Any]:
    """The documents of results.json; the model is in its place then."""
    from fastrl.rewards.preference import (
        PreferenceModel,
        calibrate,
        evaluate_preferences,
        train_preference_model,
    )

    recipe = parts.recipe
    config = recipe.config()
    data = parts.data
    fitted, chosen, held_out = data.train, data.calibration, data.held_out
    say(
        console,
        f"preference: {len(fitted)} pairs, {len(chosen)} to calibrate on, "
        f"{len(held_out)} held out; run folder {folder.path}",
    )
    folder.write_json(folder.trainer_config, config.to_dict())
    model = PreferenceModel(parts.policy(), parts.tokenizer)
    results = {"before": {"step": 0, **_figures(evaluate_preferences(model, held_out))}}
    steps = config.max_steps or config.epochs * math.ceil(len(fitted) / config.pairs_per_step)
    with (
        JsonLines(folder.metrics, step=0) as log,
        ProgressBar(steps, title="preference", console=console) as bar,
    ):

        def on_step(record: dict[str, float]) -> None:
            step = int(record["step"]) + 1
            others = {name: value for name, value in record.items() if name != "time"}
            log({**others, "step": step, "time/step": record["time"]})
            bar.update(step, f"loss {record['loss']:.3f}, accuracy {record['accuracy']:.2f}")
            stop.check()

        train_preference_model(model, fitted, config, on_step=on_step)
    results["uncalibrated"] = {"step": steps, **_figures(evaluate_preferences(model, held_out))}
    results["calibration"] = calibrate(model, chosen).to_dict()
    results["after"] = {"step": steps, **_figures(evaluate_preferences(model, held_out))}
    folds = recipe.preference.get(FOLDS, 0)
    if folds:
        with stop.at_once():
            results["cross_validation"] = _cross_validated(parts, folder, config, folds)
    write_whole(folder.path / "model", model.save)
    return results


def _cross_validated(parts: Parts, folder: RecipeFolder, config: Any, folds: int) -> dict[str, Any]:
    """Of each fold, and of all pairs by models that have not seen their prompts."""
    from fastrl.rewards.preference import cross_validate

    found = cross_validate(
        parts.policy,
        [*parts.data.train, *parts.data.calibration],
        config,
        folds=folds,
        seed=parts.recipe.seed,
        tokenizer=parts.tokenizer,
    )

    def write(place: Path) -> None:
        for number, model in enumerate(found.models):
            model.save(place / str(number))

    write_whole(folder.path / "folds", write)
    return {
        **_figures(found.evaluation),
        "folds": [_figures(evaluation) for evaluation in found.evaluations],
    }


def _figures(evaluation: dict[str, Any]) -> dict[str, Any]:
    """Numbers as "eval/<name>", as other runs have them."""
    return {
        f"eval/{name}" if isinstance(value, int | float) else name: value
        for name, value in evaluation.items()
    }


def _show(results: dict[str, Any], console: Console) -> None:
    for name in ("before", "uncalibrated", "after", "cross_validation"):
        if name in results:
            found = results[name]
            low, high = found["eval/accuracy_low"], found["eval/accuracy_high"]
            say(
                console,
                f"{name}: accuracy {found['eval/accuracy']:.3f} (95 % interval {low:.3f} to "
                f"{high:.3f}), log-loss {found['eval/log_loss']:.3f} nats, calibration error "
                f"{found['eval/ece']:.3f}",
            )
