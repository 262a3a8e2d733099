"""What a run shows at its end: how it began, how it ended, and what it is worth held out."""

import json
import math
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fastrl.cli.console import say
from fastrl.cli.intervals import INTERVAL_NOTE, gain_interval, mean_interval
from fastrl.cli.recipes.schema import Recipe

SHOWN = (
    "reward", "reward_std", "kl", "entropy", "value_error", "explained_variance",
    "completions/mean_length", "completions/clipped_ratio", "logprob_gap",
    "tokens_per_second", "time/step",
)  # fmt: skip
HELD_OUT = ("kl", "entropy", "completions/mean_length", "completions/clipped_ratio")
WINDOW = 10  # steps that are averaged, at most


def show_result(console: Console, metrics: Path, results: dict[str, Any], recipe: Recipe) -> None:
    """Print tables of a finished run."""
    lines = metrics.read_text(encoding="utf-8").split("\n")  # splitlines would cut at U+2028 too
    records = [json.loads(line) for line in lines if line]
    if records:
        console.print(_training(records, recipe))
    if results.get("after", {}).get("prompt_rewards"):
        console.print(_held_out(results))
        say(console, INTERVAL_NOTE)


def _training(records: list[dict[str, Any]], recipe: Recipe) -> Table:
    count = min(WINDOW, max(1, len(records) // 2))
    first, last = records[:count], records[-count:]
    steps = "step" if count == 1 else f"{count} steps"
    table = Table(
        title=f"{recipe.algorithm}, {records[-1]['step']} steps",
        title_justify="left",
        box=box.SIMPLE_HEAD,
    )
    for name in ("mean of", f"first {steps}", f"last {steps}"):
        table.add_column(name, justify="left" if name == "mean of" else "right", no_wrap=True)
    own = [key for key in records[-1] if key.startswith("rewards/") and key.endswith("/mean")]
    for key in ("reward", *own, *SHOWN[1:]):
        if key in records[-1]:
            table.add_row(Text(key), *(_mean(part, key) for part in (first, last)))
    return table


def _held_out(results: dict[str, Any]) -> Table:
    after, before = results["after"], results.get("before", {})
    prompts = after["prompt_rewards"]
    table = Table(
        title=f"Held out, {len(prompts)} prompts", title_justify="left", box=box.SIMPLE_HEAD
    )
    for name in ("", "before", "after", "gain"):
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    earlier = before.get("prompt_rewards") or []
    is_paired = len(earlier) == len(prompts)
    table.add_row(
        "reward",
        _interval(mean_interval(earlier)) if is_paired else "",
        _interval(mean_interval(prompts)),
        _interval(gain_interval(earlier, prompts), "+") if is_paired else "",
    )
    for key in after:
        name = key.removeprefix("eval/")
        if name != key and (name in HELD_OUT or name.endswith("/mean")):
            table.add_row(Text(name), *(_number(part.get(key)) for part in (before, after)), "")
    return table


def _mean(records: list[dict[str, Any]], key: str) -> str:
    values = [r[key] for r in records if isinstance(r.get(key), int | float)]
    return _number(math.fsum(values) / len(values) if values else None)


def _number(value: float | None) -> str:
    if value is None or not math.isfinite(value):
        return "–"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _interval(mean_and_half: tuple[float, float], sign: str = "") -> str:
    mean, half = mean_and_half
    if math.isnan(half):  # of one prompt, or of none that has a reward
        return _number(mean)
    return f"{mean:{sign}.3f} ± {half:.3f}"
