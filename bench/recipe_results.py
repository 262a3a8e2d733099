"""What the recipes are worth: held-out rewards before and after, policy gradient and actor-critic.

    python -m bench.recipe_results --data ../shared/data --output runs/results
    python -m bench.recipe_results --recipes translation dialogue --seeds 0 1 2 --jobs 2 ...

For each recipe and seed the recipe's own algorithm runs first, with its supervised start; then
actor-critic from that same start. Runs that are finished are not repeated, those that were broken
off go on. --output gets a folder for each run, results.json with all figures, and results.md; with
--markdown the same table goes into that file, in the place of the one between its two marks.

Gains are paired, prompt by prompt: both evaluations sample from the same prompts with the same
random numbers. "Over prompts" is 1.96 standard errors of the prompts' gains, each the mean over
the seeds; "over seeds" is Student's 95 % interval of the seeds' mean gains.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.recipe_tables import markdown, samples, write_between_marks
from fastrl.cli.recipes.built_in import find_recipe
from fastrl.cli.recipes.parse import read_recipe
from fastrl.cli.recipes.schema import Recipe

RECIPES = ("translation", "summarisation", "dialogue", "continuation", "preference")
WHEN = ("before", "after")
LENGTH = "eval/completions/mean_length"
ENDS = (0, -1)  # of the monitor's evaluations
# Student's 97.5 % quantiles by degrees of freedom.
QUANTILES = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160,
    2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056,
    2.052, 2.048, 2.045, 2.042,
)  # fmt: skip


@dataclass(frozen=True)
class Job:
    """One run.

    Attributes:
        recipe: a name or a file.
        algorithm: what it trains with.
        start: the run whose start it takes; None: it trains its own.
    """

    recipe: str
    algorithm: str
    seed: int
    folder: Path
    start: Path | None
    sets: tuple[str, ...]

    @property
    def is_finished(self) -> bool:
        return "after" in _read(self.folder / "results.json")

    def command(self) -> list[str]:
        """After `fastrl`."""
        if (self.folder / "recipe.toml").is_file():
            return ["train", "--resume", str(self.folder)]
        seed = "preference.seed" if self.algorithm == "preference" else "train.seed"
        sets = [*self.sets, f"{seed}={self.seed}"]
        if self.start is not None:
            sets += [f"algorithm={self.algorithm}", f"model.start={self.start / 'start'}"]
        options = [option for text in sets for option in ("--set", text)]
        return ["train", self.recipe, *options, "--output", str(self.folder)]

    @property
    def seconds_file(self) -> Path:
        """Wall time of all its parts so far."""
        return self.folder.with_name(f"{self.folder.name}.seconds.json")


def main(argv: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(argv)
    sets = tuple(options.set) + (() if options.data is None else (f"data.folder={options.data}",))
    groups = [
        jobs_of(name, seed, options.output, sets, options.actor_critic)
        for seed in options.seeds
        for name in options.recipes
    ]
    threads = options.threads or max(1, (os.cpu_count() or 1) // options.jobs)
    if options.jobs == 1:
        finish_all(groups, threads, map)
    else:
        with ThreadPoolExecutor(options.jobs) as pool:
            finish_all(groups, threads, pool.map)
    results = collect([job for jobs in groups for job in jobs])
    options.output.mkdir(parents=True, exist_ok=True)
    document = {"threads": threads, "jobs": options.jobs, "results": results}
    text = json.dumps(document, indent=2, ensure_ascii=False)
    (options.output / "results.json").write_text(text + "\n", encoding="utf-8")
    table = markdown(results, threads) + _samples(groups)
    (options.output / "results.md").write_text(table, encoding="utf-8")
    if options.markdown is not None:
        write_between_marks(options.markdown, table)
    print(table)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.recipe_results",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--recipes", nargs="+", default=RECIPES, help="names or files")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="data.folder of the recipes")
    parser.add_argument("--actor-critic", default="a2c", metavar="ALGORITHM")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="[RECIPE:]KEY=VALUE",
        help="for all recipes, or for one",
    )
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--threads", type=int, help="of a run; default: cores / jobs")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="gets the table too")
    return parser


def jobs_of(
    name: str, seed: int, output: Path, sets: tuple[str, ...], actor_critic: str
) -> list[Job]:
    """The runs of one recipe and seed, in an order in which each has what it starts from."""
    sets = _of_recipe(Path(name).stem, sets)
    own = read_recipe(find_recipe(name), sets).algorithm
    place = output / Path(name).stem
    first = Job(name, own, seed, place / f"{own}-{seed}", None, sets)
    if own == "preference":
        return [first]
    second = place / f"{actor_critic}-{seed}"
    return [first, Job(name, actor_critic, seed, second, first.folder, sets)]


def _of_recipe(recipe: str, sets: tuple[str, ...]) -> tuple[str, ...]:
    """KEY=VALUE of those that are for all recipes, or for this one."""
    found = []
    for text in sets:
        name, colon, _ = text.partition("=")[0].partition(":")
        if not colon:
            found.append(text)
        elif name == recipe:
            found.append(text.partition(":")[2])
    return tuple(found)


def finish_all(groups: Sequence[Sequence[Job]], threads: int, each: Callable[..., Any]) -> None:
    """Each group's jobs, one after the other."""
    for _ in each(lambda jobs: [finish(job, threads) for job in jobs], groups):
        pass


def finish(job: Job, threads: int) -> None:
    """Run a job, or the rest of it.

    Raises:
        RuntimeError: it failed; what it said stands in its .log file.
    """
    if job.is_finished:
        return
    job.folder.parent.mkdir(parents=True, exist_ok=True)
    print(f"{job.folder.name} of {job.recipe}: fastrl {' '.join(job.command())}", flush=True)
    began = time.perf_counter()
    log = job.folder.with_name(f"{job.folder.name}.log")
    try:
        status = call(job.command(), log, threads)
    finally:
        seconds = _read(job.seconds_file).get("seconds", 0.0) + time.perf_counter() - began
        job.seconds_file.write_text(json.dumps({"seconds": seconds}) + "\n")
    if status != 0 or not job.is_finished:
        raise RuntimeError(
            f"recipe_results: expected {job.folder} to finish, got exit status {status}. See {log}."
        )


def call(command: list[str], log: Path, threads: int) -> int:
    """`fastrl` with these arguments; the exit status."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    with open(log, "a", encoding="utf-8") as file:
        arguments = [sys.executable, "-m", "fastrl", *command]
        return subprocess.run(arguments, stdout=file, stderr=file, env=environment).returncode


def collect(jobs: Sequence[Job]) -> list[dict[str, Any]]:
    """For each recipe and algorithm the figures over all seeds, in the order of the jobs."""
    grouped: dict[tuple[str, str], list[Job]] = {}
    for job in jobs:
        grouped.setdefault((job.recipe, job.algorithm), []).append(job)
    return [_summary(name, algorithm, of) for (name, algorithm), of in grouped.items()]


def _summary(name: str, algorithm: str, jobs: Sequence[Job]) -> dict[str, Any]:
    runs = [_read(job.folder / "results.json") for job in jobs]
    key = "eval/accuracy" if algorithm == "preference" else "eval/reward"
    gains = [run["after"][key] - run["before"][key] for run in runs]
    recipe = read_recipe(jobs[0].folder / "recipe.toml")
    return {
        "recipe": Path(name).stem,
        "algorithm": algorithm,
        "seeds": [job.seed for job in jobs],
        "metric": "accuracy" if algorithm == "preference" else _metric(recipe),
        "before": [run["before"][key] for run in runs],
        "after": [run["after"][key] for run in runs],
        "gain": statistics.fmean(gains),
        "gain_over_prompts": _over_prompts(runs),
        "gain_over_seeds": over_seeds(gains),
        "parts": {
            part: [[run[when][part] for run in runs] for when in WHEN]
            for part in runs[0]["after"]
            if part.startswith("eval/rewards/") and part.endswith("/mean")
        },
        "lengths": [[run[when].get(LENGTH) for run in runs] for when in WHEN],
        "gold": [
            [run["monitor"][i]["gold/gold"] for run in runs if "monitor" in run] for i in ENDS
        ],
        "alarms": sum(point["gold/alarm"] for run in runs for point in run.get("monitor", ())),
        "seconds": [_read(job.seconds_file).get("seconds") for job in jobs],
        "command": _command(jobs[0]),
    }


def _metric(recipe: Recipe) -> str:
    """The functions as the recipe has them, with their weights."""
    weights = recipe.rewards.weights or [1.0] * len(recipe.rewards.functions)
    names = [f if isinstance(f, str) else str(f["use"]) for f in recipe.rewards.functions]
    short = [name.rpartition(":")[2] for name in names]
    return " + ".join(n if w == 1 else f"{w:g} {n}" for n, w in zip(short, weights, strict=True))


def _command(job: Job) -> str:
    """What to type for the same without this program."""
    algorithm = "" if job.start is None else f" --set algorithm={job.algorithm}"
    return f"fastrl train {job.recipe}{algorithm} --set data.folder=FOLDER"


def _over_prompts(runs: Sequence[dict[str, Any]]) -> float | None:
    """1.96 standard errors of the prompts' mean gains; of accuracy: Wilson's half interval."""
    if "prompt_rewards" not in runs[0]["after"]:
        widths = [r["after"]["eval/accuracy_high"] - r["after"]["eval/accuracy_low"] for r in runs]
        return statistics.fmean(widths) / 2
    columns = [zip(*(run[w]["prompt_rewards"] for w in WHEN), strict=True) for run in runs]
    prompts = [of for of in zip(*columns, strict=True) if not any(None in pair for pair in of)]
    gains = [statistics.fmean(after - before for before, after in of) for of in prompts]
    return 1.96 * statistics.stdev(gains) / math.sqrt(len(gains)) if len(gains) > 1 else None


def over_seeds(gains: Sequence[float]) -> float | None:
    """Half of Student's 95 % interval of the mean; None of one seed."""
    if len(gains) < 2:
        return None
    quantile = QUANTILES[min(len(gains) - 1, len(QUANTILES)) - 1]
    return quantile * statistics.stdev(gains) / math.sqrt(len(gains))


def _samples(groups: Sequence[Sequence[Job]]) -> str:
    """Of each recipe's first seed."""
    firsts: dict[str, Sequence[Job]] = {}
    for jobs in groups:
        firsts.setdefault(jobs[0].recipe, jobs)
    return "".join(
        samples(
            f"{Path(name).stem}, seed {jobs[0].seed}",
            {job.algorithm: _read(job.folder / "results.json") for job in jobs},
        )
        for name, jobs in firsts.items()
        if jobs[0].algorithm != "preference"
    )


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


if __name__ == "__main__":
    sys.exit(main())
