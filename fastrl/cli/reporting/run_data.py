"""What the folder of a run holds, read back: of any run, finished, unfinished or killed."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from fastrl.cli.recipes.toml import read_toml
from fastrl.cli.recipes.versions import read_starts
from fastrl.cli.training.run_folder import RunFolder, RunFolderError

Record = dict[str, Any]
# Stages of the demo (`fastrl train` without a recipe), which has two trained models in one folder.
DEMO_START = "warm_up"
DEMO_STAGES = {"policy_gradient": "policy gradient", "actor_critic": "actor-critic"}


@dataclass(kw_only=True)
class RunData:
    """One trained model's run.

    Attributes:
        folder: as it was named to us.
        name: short, for legends and tables.
        kind: the algorithm, or what the demo's stage is called.
        recipe: the document of recipe.toml; empty for the demo.
        documents: title -> text, the settings as they stand in the folder.
        config: of the trainer, or the demo's settings; empty where it is not written yet.
        records: of metrics.jsonl, in the file's order.
        supervised: records of the supervised start.
        samples: of samples.jsonl.
        monitor: evaluations of the over-optimisation monitor, that before the first step too.
        versions: of versions.json: what the run was made with, from which step.
        cross_validation: of a preference model; empty without one.
        before, after: evaluations of held-out prompts; empty before they were made.
        total: planned steps; None: unknown.
        written: when a step was last logged, or else when the run began.
        began: when its settings were written.
        notes: what was wrong with its files, in sentences.
    """

    folder: Path
    name: str
    kind: str
    recipe: dict[str, Any] = field(default_factory=dict)
    documents: dict[str, str] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    records: list[Record] = field(default_factory=list)
    supervised: list[Record] = field(default_factory=list)
    samples: list[Record] = field(default_factory=list)
    monitor: list[Record] = field(default_factory=list)
    versions: list[Record] = field(default_factory=list)
    cross_validation: Record = field(default_factory=dict)
    before: Record = field(default_factory=dict)
    after: Record = field(default_factory=dict)
    total: int | None = None
    began: datetime
    written: datetime
    notes: list[str] = field(default_factory=list)

    @property
    def is_demo(self) -> bool:
        return not self.recipe

    @property
    def step(self) -> int:
        """The last one that is logged; 0 before the first."""
        return int(self.records[-1]["step"]) if self.records else 0

    @property
    def is_finished(self) -> bool:
        return bool(self.after) and self.after.get("step", self.step) >= self.step

    @property
    def evaluations(self) -> list[Record]:
        """Of the monitor, by step: what was logged, and what it found before the first step."""
        found = {r["step"]: r for r in self.monitor if r["step"] <= self.step}
        found |= {r["step"]: r for r in self.records if "gold/kl" in r}
        return [found[step] for step in sorted(found)]

    @property
    def alarms(self) -> list[Record]:
        """Records of the steps at which the over-optimisation monitor gave an alarm."""
        return [
            r for r in self.records if any(r.get(f"gold/{n}") for n in ("alarm", "over_budget"))
        ]


def read_runs(paths: Sequence[Path]) -> list[RunData]:
    """The runs in some folders; of the demo, one for each of its two trainers.

    Raises:
        RunFolderError: a folder holds no run, or a document in it is damaged.
        RecipeError: a recipe is damaged.
    """
    runs = [run for path in paths for run in _read(path)]
    names = [run.name for run in runs]
    for run in runs:
        if names.count(run.name) > 1:  # folders of the same name in different places
            run.name = f"{run.folder}, {run.kind}" if run.is_demo else str(run.folder)
    return runs


def _read(path: Path) -> list[RunData]:
    folder = RunFolder(path)
    if (path / "recipe.toml").is_file():
        return [_recipe_run(folder)]
    if folder.config.is_file() and "settings" in (config := folder.read_json(folder.config)):
        return _demo_runs(folder, config)
    found = "no such folder" if not path.is_dir() else "a folder without a recipe.toml"
    raise RunFolderError(
        f"report: expected RUN the folder of a run, got {path}, {found}. "
        "Pass the folder that `fastrl train` named when it started."
    )


def _recipe_run(folder: RunFolder) -> RunData:
    path, notes = folder.path, list[str]()
    recipe = read_toml(path / "recipe.toml")
    documents = {"recipe.toml": (path / "recipe.toml").read_text(encoding="utf-8")}
    config: dict[str, Any] = {}
    if folder.config.is_file():
        config = folder.read_json(folder.config)
        documents["config.json"] = folder.config.read_text(encoding="utf-8")
    results = folder.read_json(folder.results) if folder.results.is_file() else {}
    began, written = _times(path / "recipe.toml", folder.metrics)
    return RunData(
        folder=path,
        name=path.resolve().name,
        kind=str(recipe.get("algorithm", "unknown")),
        recipe=recipe,
        documents=documents,
        config=config,
        records=_with_step(read_lines(folder.metrics, notes)),
        supervised=_with_step(read_lines(path / "supervised.jsonl", notes)),
        samples=_with_step(read_lines(path / "samples.jsonl", notes)),
        monitor=_with_step(results.get("monitor", ())),
        versions=_with_step(read_starts(folder)),
        cross_validation=results.get("cross_validation", {}),
        before=results.get("before", {}),
        after=results.get("after", {}),
        total=config.get("max_steps"),
        began=began,
        written=written,
        notes=notes,
    )


def _demo_runs(folder: RunFolder, config: dict[str, Any]) -> list[RunData]:
    notes: list[str] = []
    records = _with_step(read_lines(folder.metrics, notes))
    results = folder.read_json(folder.results) if folder.results.is_file() else {}
    began, written = _times(folder.config, folder.metrics)
    evaluations = {k: _demo_evaluation(v) for k, v in results.items() if "prompt_rewards" in v}
    text = folder.config.read_text(encoding="utf-8")
    return [
        RunData(
            folder=folder.path,
            name=f"{folder.path.resolve().name}, {title}",
            kind=title,
            documents={"config.json": text},
            config=config["settings"],
            records=[r for r in records if r.get("stage") == stage],
            supervised=_demo_start(records) if index == 0 else [],
            before=evaluations.get(DEMO_START, {}),
            after=evaluations.get(stage, {}),
            total=config["settings"].get("steps"),
            began=began,
            written=written,
            notes=notes,
        )
        for index, (stage, title) in enumerate(DEMO_STAGES.items())
    ]


def _demo_start(records: Sequence[Record]) -> list[Record]:
    """The warm-up, that both trainers begin from, with the names of a supervised start."""
    return [
        {**r, "validation_loss": math.log(r["validation_perplexity"])}
        if "validation_perplexity" in r
        else r
        for r in records
        if r.get("stage") == DEMO_START
    ]


def _demo_evaluation(result: Record) -> Record:
    """An evaluation of the demo in the form of a recipe's.

    It has no prompts; its samples are each held-out prompt's first completion, in order.
    """
    names = {"completion_length": "completions/mean_length"}
    figures = {
        f"eval/{names.get(k, k)}": v for k, v in result.items() if isinstance(v, int | float)
    }
    samples = [
        {"prompt": f"held-out prompt {index + 1}", "completion": text}
        for index, text in enumerate(result.get("samples", ()))
    ]
    return {**figures, "prompt_rewards": result["prompt_rewards"], "samples": samples}


def read_lines(path: Path, notes: list[str]) -> list[Record]:
    """The objects of a file of JSON lines; none where it is not there.

    Args:
        notes: gets a sentence where a line cannot be read, as the last one of a killed run.
    """
    if not path.is_file():
        return []
    found, bad = [], []
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError:
            bad.append(number)
            continue
        if isinstance(record, dict):
            found.append(record)
        else:
            bad.append(number)
    if bad == [len(lines)]:
        notes.append(
            f"The last line of {path.name} was cut short, as when a run is killed, and left out."
        )
    elif bad:
        shown = ", ".join(map(str, bad[:5])) + (" …" if len(bad) > 5 else "")
        notes.append(f"Lines of {path.name} that cannot be read were left out: {shown}.")
    return found


def _with_step(records: Sequence[Record]) -> list[Record]:
    return [r for r in records if isinstance(r.get("step"), int | float)]


def _times(first: Path, metrics: Path) -> tuple[datetime, datetime]:
    """When a run's first document and its last step were written, by the files' own times."""
    began = first.stat().st_mtime
    written = metrics.stat().st_mtime if metrics.is_file() else began
    # A resume with another recipe writes that anew.
    return datetime.fromtimestamp(min(began, written)), datetime.fromtimestamp(written)
