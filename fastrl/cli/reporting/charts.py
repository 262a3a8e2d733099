"""Which charts a report has: those whose keys the runs' records have."""

import math
from collections.abc import Sequence
from typing import Any

from fastrl.cli.reporting.chart import Chart
from fastrl.cli.reporting.evaluations import reward_intervals
from fastrl.cli.reporting.numbers import is_number
from fastrl.cli.reporting.run_data import RunData
from fastrl.cli.reporting.series import Line, values_of

COLORS = 8  # of the page, see style.py
DASHES = 4
SUPERVISED = "Training on references, before the reinforcement; steps are its own."
# key -> title, unit, group.
KNOWN: dict[str, tuple[str, str, str]] = {
    "reward": ("Reward", "mean of a completion", "Reward"),
    "entropy": ("Entropy", "nats per token", "Policy"),
    "kl": ("KL divergence from the start", "nats per token", "Policy"),
    "completions/mean_length": ("Completion length", "tokens, mean", "Policy"),
    "loss": ("Loss", "mean of a step", "Optimisation"),
    "grad_norm": ("Gradient norm", "before clipping", "Optimisation"),
    "value_error": ("Error of the critic", "mean square", "Optimisation"),
    "explained_variance": ("Explained variance", "of the returns, by the critic", "Optimisation"),
    "accuracy": ("Accuracy", "share of pairs in the right order", "Optimisation"),
    "time/step": ("Time per step", "seconds", "Time"),
    "tokens_per_second": ("Throughput", "tokens per second", "Time"),
}
GROUPS = ("Reward", "Over-optimisation", "Policy", "Optimisation", "Time", "More")
# Counters, and what the other charts show.
NOT_CHARTED = {"step", "epoch", "num_tokens", "gold/gold", "gold/proxy", "gold/alarm"}
NOT_CHARTED |= {"gold/p_value", "gold/threshold"}
MORE_UNITS = {
    "gold/kl": "nats per completion",
    "gold/entropy": "nats per token",
    "gold/length": "tokens",
    "learning_rate": "per step",
    "time/rollout": "seconds",
    "time/reward": "seconds",
    "time/update": "seconds",
}


def all_charts(runs: Sequence[RunData]) -> dict[str, list[Chart]]:
    """Group -> charts; groups without any are left out."""
    found: dict[str, list[Chart | None]] = {group: [] for group in GROUPS}
    for key, (title, unit, group) in KNOWN.items():
        found[group].append(_by_step(runs, key, title, unit))
        if key == "reward":
            found[group] += [
                _by_step(runs, part, f"Reward {part.split('/', 1)[1][:-5]}", "mean of a completion")
                for part in _keys(runs)
                if part.startswith("rewards/") and part.endswith("/mean")
            ]
    found["Over-optimisation"] = [_gold_by_kl(runs), _gold_by_step(runs), _evidence(runs)]
    found["Optimisation"].append(_supervised(runs))
    charted = KNOWN.keys() | NOT_CHARTED | {k for k in _keys(runs) if k.endswith("_stderr")}
    found["More"] = [
        _by_step(runs, key, key, MORE_UNITS.get(key, "as logged"))
        for key in _keys(runs)
        if key not in charted and not _is_part(key) and _varies(runs, key)
    ]
    present = {group: [c for c in charts if c is not None] for group, charts in found.items()}
    return {group: charts for group, charts in present.items() if charts}


def letter(runs: Sequence[RunData], index: int) -> str:
    """What a run is called in charts: A, B, ... and nothing where there is one only."""
    if len(runs) == 1:
        return ""
    return (chr(64 + index // 26) if index >= 26 else "") + chr(65 + index % 26)


def style(index: int) -> tuple[int, int]:
    """Colour and dash of a run, or of a line where there is one run."""
    return index % COLORS, (index + index // COLORS) % DASHES


def _by_step(runs: Sequence[RunData], key: str, title: str, unit: str) -> Chart | None:
    lines = []
    for index, run in enumerate(runs):
        xs, ys = values_of(run.records, key)
        lines += _with_points(_run_line(runs, index, xs, ys, title))
        if key == "reward":
            lines += _held_out(runs, index)
    caption = ""
    if key == "reward" and any(line.has_marks for line in lines):
        caption = "Squares: held-out prompts, with 95 % intervals where they are known."
    plain = (c if c.isalnum() and c.isascii() else f"_{ord(c):x}_" for c in key)
    return _chart(runs, "curve-" + "".join(plain), title, unit, lines, caption=caption)


def _run_line(
    runs: Sequence[RunData], index: int, xs: list[float], ys: list[float | None], title: str
) -> Line:
    color, dash = style(index)
    name = title if len(runs) == 1 else f"{letter(runs, index)} {runs[index].name}"
    return Line(name=name, xs=xs, ys=ys, color=color, dash=dash, label=letter(runs, index))


def _held_out(runs: Sequence[RunData], index: int) -> list[Line]:
    """The held-out reward: of results.json with intervals, and of evaluations on the way."""
    run = runs[index]
    found = dict(zip(*values_of(run.records, "eval/reward"), strict=True))
    points = {x: (y, 0.0) for x, y in found.items() if y is not None}
    for entry, step in ((run.before, 0), (run.after, run.step)):
        interval = reward_intervals(entry)
        if interval is not None:
            mean, half = interval
            points[float(entry.get("step", step))] = mean, 0.0 if math.isnan(half) else half
    xs = sorted(points)
    color = style(index)[0] if len(runs) > 1 else 1
    line = Line(
        name=f"{letter(runs, index)} held out".strip(),
        xs=xs,
        ys=[points[x][0] for x in xs],
        half_widths=[points[x][1] for x in xs],
        color=color,
        is_smooth=False,
        has_marks=True,
        has_line=False,
    )
    return _with_points(line)


def _gold_by_step(runs: Sequence[RunData]) -> Chart | None:
    lines = [line for index in range(len(runs)) for line in _gold_lines(runs, index, "step")]
    caption = "On held-out prompts, with 95 % intervals over them where they are known."
    title = "Gold and proxy reward"
    return _chart(runs, "chart-gold", title, "mean of a completion", lines, caption=caption)


def _gold_by_kl(runs: Sequence[RunData]) -> Chart | None:
    lines = [line for index in range(len(runs)) for line in _gold_lines(runs, index, "sqrt_kl")]
    caption = (
        "Each point an evaluation on held-out prompts: what the proxy gains as the policy moves "
        "away from its start, and what is gained of what counts (Gao et al. 2023, "
        "arXiv:2210.10760)."
    )
    return _chart(
        runs,
        "chart-gold-kl",
        "Gold and proxy against √KL",
        "mean of a completion",
        lines,
        x_title="√KL from the start (√nats per completion)",
        caption=caption,
    )


def _gold_lines(runs: Sequence[RunData], index: int, x: str) -> list[Line]:
    records = [
        {**r, "sqrt_kl": math.sqrt(max(0.0, r["gold/kl"]))}
        for r in runs[index].evaluations
        if is_number(r.get("gold/kl"))
    ]
    lines = []
    for number, name in enumerate(("gold", "proxy")):
        xs, ys = values_of(records, f"gold/{name}", x)
        halves = values_of(records, f"gold/{name}_stderr")[1]
        if len(halves) != len(xs) or x != "step":
            halves = []
        lines += _with_points(
            Line(
                name=f"{letter(runs, index)} {name}".strip(),
                xs=xs,
                ys=ys,
                half_widths=[1.96 * (half or 0.0) for half in halves],
                color=1 - number if len(runs) == 1 else style(index)[0],
                dash=number,
                label=letter(runs, index) or name,
                is_smooth=False,
                has_marks=x != "step",
            )
        )
    return lines


def _evidence(runs: Sequence[RunData]) -> Chart | None:
    """The monitor's test on a scale on which more is worse."""
    lines = []
    for index, run in enumerate(runs):
        for number, (key, name) in enumerate((("p_value", "test"), ("threshold", "level"))):
            xs, values = values_of(run.records, f"gold/{key}")
            # A level of 0 stands where nothing can be tested yet; a p-value of 0 is a rounded one.
            lowest = 1e-12 if number == 0 else 0.0
            ys = [max(lowest, v) if v is not None else None for v in values]
            line = Line(
                name=f"{letter(runs, index)} {name}".strip(),
                xs=xs,
                ys=[-math.log10(y) if y else None for y in ys],
                color=number if len(runs) == 1 else style(index)[0],
                dash=number,
                label=letter(runs, index) if number == 0 else "",
                is_smooth=False,
            )
            lines += _with_points(line)
    caption = "That gold falls while the proxy rises: an alarm where the test reaches its level."
    title = "Evidence of over-optimisation"
    return _chart(runs, "chart-evidence", title, "−log₁₀ of the p-value", lines, caption=caption)


def _supervised(runs: Sequence[RunData]) -> Chart | None:
    lines = []
    for index, run in enumerate(runs):
        for number, (key, name) in enumerate(
            (("loss", "training"), ("validation_loss", "validation"))
        ):
            xs, ys = values_of(run.supervised, key)
            lines += _with_points(
                Line(
                    name=f"{letter(runs, index)} {name}".strip(),
                    xs=xs,
                    ys=ys,
                    color=number if len(runs) == 1 else style(index)[0],
                    dash=number,
                    label=letter(runs, index) if number == 0 else "",
                    is_smooth=number == 0,
                    has_marks=number == 1,
                )
            )
    return _chart(
        [], "chart-supervised", "Supervised start", "nats per token", lines, caption=SUPERVISED
    )


def _chart(
    runs: Sequence[RunData],
    identifier: str,
    title: str,
    unit: str,
    lines: list[Line],
    **more: Any,
) -> Chart | None:
    """None where there is nothing to draw; `runs`: whose alarms are marked."""
    if not lines:
        return None
    at: dict[float, list[str]] = {}
    for index, run in enumerate(runs if "x_title" not in more else ()):
        for record in run.alarms:
            at.setdefault(float(record["step"]), []).append(letter(runs, index))
    alarms = [(step, " ".join(letters)) for step, letters in at.items()]
    return Chart(id=identifier, title=title, unit=unit, lines=lines, alarms=alarms, **more)


def _with_points(line: Line) -> list[Line]:
    return [line] if any(y is not None for y in line.ys) else []


def _keys(runs: Sequence[RunData]) -> list[str]:
    """Of all records, in the order in which they come up."""
    return list(dict.fromkeys(key for run in runs for record in run.records for key in record))


def _is_part(key: str) -> bool:
    """Whether a chart of its own shows it, or a held-out mark."""
    return (key.startswith("rewards/") and key.endswith("/mean")) or key == "eval/reward"


def _varies(runs: Sequence[RunData], key: str) -> bool:
    values = {record[key] for run in runs for record in run.records if is_number(record.get(key))}
    return len(values) > 1
