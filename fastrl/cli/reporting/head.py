"""The top of a report: what was run, what it gained, and what went wrong."""

import math
from collections.abc import Sequence
from typing import Any

from fastrl.cli.intervals import INTERVAL_NOTE
from fastrl.cli.reporting.charts import letter
from fastrl.cli.reporting.evaluations import Gain, figure_rows, gain_of
from fastrl.cli.reporting.facts import (
    cross_validation_of,
    data_of,
    interval,
    model_of,
    steps_of,
    time_of,
    versions_of,
)
from fastrl.cli.reporting.numbers import duration, escape, fixed, is_number, number
from fastrl.cli.reporting.run_data import RunData


def head(run: RunData) -> str:
    """Of one run."""
    facts = "".join(
        f"<div><dt>{name}</dt><dd>{escape(value)}</dd></div>" for name, value in _facts(run)
    )
    return (
        f'<header><p class="kicker">fastrl run report</p><h1>{escape(run.name)}</h1>'
        f'<dl class="facts">{facts}</dl></header>{problems([run])}{_result(run)}'
    )


def problems(runs: Sequence[RunData]) -> str:
    """Alarms, and what is missing or was cut short."""
    said = []
    for index, run in enumerate(runs):
        who = f"Run {letter(runs, index)}: " if len(runs) > 1 else ""
        for record in run.alarms:
            said.append(f'<li class="warn">{_sign()}<span>{who}{_alarm(record)}</span></li>')
        said += [f"<li>{_sign()}<span>{who}{text}</span></li>" for text in _warnings(run)]
        if run.alarms and _best(run):
            said.append(f"<li>{_sign('i')}<span>{who}{_best(run)}</span></li>")
        if run.after.get("stopped"):
            stopped = f"<strong>Stopped</strong> by its monitor after step {run.step:,}"
            of = "" if run.total is None else f" of {run.total:,}"
            said.append(f"<li>{_sign('i')}<span>{who}{stopped}{of}.</span></li>")
        if not run.is_finished:
            said.append(f"<li>{_sign('i')}<span>{who}{_unfinished(run)}</span></li>")
        if index == 0 or run.folder != runs[index - 1].folder:
            said += [f"<li>{_sign('i')}<span>{who}{escape(n)}</span></li>" for n in run.notes]
    demos = sum(run.is_demo for run in runs)
    if demos:
        said.append(
            f"<li>{_sign('i')}<span>A run of the demo, <code>fastrl train</code> without a recipe: "
            "each of its two trainers is shown as a run of its own, from the same warmed-up "
            "model.</span></li>"
        )
    return f'<ul class="problems" aria-label="Notes">{"".join(said)}</ul>' if said else ""


def _sign(mark: str = "!") -> str:
    return f'<b class="sign" aria-hidden="true">{mark}</b>'


def _warnings(run: RunData) -> list[str]:
    """Weaker findings of the over-optimisation monitor, at the step of the first."""
    found = []
    for key, text in (
        ("falling", "gold falls, though the proxy is not shown to rise"),
        ("stalled", "the proxy rises, and gold has not since the middle of the run"),
    ):
        steps = [r["step"] for r in run.records if r.get(f"gold/{key}") and r not in run.alarms]
        if steps:
            found.append(f"<strong>Warning at step {steps[0]:g}</strong>: {text}.")
    return found


def _alarm(record: dict[str, Any]) -> str:
    parts = []
    if record.get("gold/alarm"):
        test = ""
        if is_number(record.get("gold/p_value")) and is_number(record.get("gold/threshold")):
            test = (
                f" (p = {number(record['gold/p_value'])}, level {number(record['gold/threshold'])})"
            )
        parts.append(f"gold falls while the proxy rises{test}")
    if record.get("gold/over_budget"):
        parts.append(f"KL is above its budget, {number(record.get('gold/kl'))} nats per completion")
    gold, proxy = (number(record.get(f"gold/{name}")) for name in ("gold", "proxy"))
    return (
        f"<strong>Alarm at step {record['step']:g}</strong>: {', and '.join(parts)}. "
        f"There gold was {gold} and the proxy {proxy}."
    )


def _best(run: RunData) -> str:
    """Which checkpoint has the most gold."""
    if not (run.folder / "best").is_dir():
        return ""
    golds = {r["step"]: r["gold/gold"] for r in run.evaluations if is_number(r.get("gold/gold"))}
    if not golds:
        return ""
    step = max(golds, key=golds.__getitem__)  # the first of equals, as the monitor keeps it
    return (
        f"The checkpoint with the most gold, {number(golds[step])} at step {step:g}, is in best/."
    )


def _unfinished(run: RunData) -> str:
    of = "" if run.total is None else f" of {run.total:,}"
    command = f"fastrl train --resume {run.folder}"
    return (
        f"<strong>Not finished</strong>: step {run.step:,}{of}. It is running, or goes on with "
        f"<code>{escape(command)}</code>."
    )


def _facts(run: RunData) -> list[tuple[str, str]]:
    facts = [
        ("Algorithm", run.kind),
        ("Model", model_of(run)),
        ("Data", data_of(run)),
        ("Steps", steps_of(run)),
        ("Time in steps", duration(time_of(run))),
        ("Began", f"{run.began:%Y-%m-%d %H:%M}"),
        ("Last step", f"{run.written:%Y-%m-%d %H:%M}"),
        ("Folder", str(run.folder)),
    ]
    if run.recipe.get("seed") is not None or run.config.get("seed") is not None:
        facts.insert(5, ("Seed", str(run.recipe.get("seed", run.config.get("seed")))))
    if cross_validation_of(run):
        facts.append(("Cross-validation", cross_validation_of(run)))
    if run.versions:
        facts.append(("Made with", versions_of(run)))
    return facts


def _result(run: RunData) -> str:
    """What was gained on held-out prompts, in a sentence, a picture and a table."""
    gain, rows = gain_of(run), figure_rows(run)
    if gain is None and not rows:
        return ""
    parts = ['<section aria-labelledby="held-out"><h2 id="held-out">Held out</h2>']
    if gain is not None:
        parts.append(_gain(gain))
    if rows:
        cells = "".join(_tile(*row) for row in rows)
        parts.append(f'<dl class="tiles">{cells}</dl>')
    if gain is not None:
        parts.append(f'<p class="note">{INTERVAL_NOTE}</p>')
    return "".join(parts) + "</section>"


def _gain(gain: Gain) -> str:
    (before, _), (after, _), (mean, half) = gain.before, gain.after, gain.gain
    over = "1 prompt, so without an interval" if gain.prompts == 1 else f"{gain.prompts:,} prompts"
    if gain.prompts == 1 or abs(mean) <= half:
        verdict = f"is not shown to have changed: {interval(gain.gain, '+')}"
    else:
        verdict = f"{'rose' if mean > 0 else 'fell'} by {interval((abs(mean), half))}"
    return (
        f'<div class="hero"><p class="big"><span class="label">Reward</span> '
        f'<span class="from">{fixed(before)}</span> <span class="to">→ {fixed(after)}</span></p>'
        f'<p class="sentence">The held-out reward {verdict}, from {interval(gain.before)} '
        f"to {interval(gain.after)} over {over}.</p>{_dumbbell(gain)}</div>"
    )


def _dumbbell(gain: Gain) -> str:
    """Both means with their intervals on one axis; said in words beside it."""
    pairs = [(m, 0.0 if math.isnan(half) else half) for m, half in (gain.before, gain.after)]
    low = min(mean - half for mean, half in pairs)
    high = max(mean + half for mean, half in pairs)
    room = 0.05 * (high - low) or 0.5
    low, span = low - room, high - low + 2 * room

    def at(value: float) -> float:
        return round(70 + 300 * (value - low) / span, 2)

    rows = []
    for y, name, color, (mean, half) in zip(
        (14, 38), ("before", "after"), (7, 0), pairs, strict=True
    ):
        rows.append(
            f'<g class="c{color}"><path class="track" d="M70,{y}H370"/>'
            f'<path class="bar" d="M{at(mean - half):g},{y}H{at(mean + half):g}"/>'
            f'<circle class="dot" cx="{at(mean):g}" cy="{y}" r="5"/></g>'
            f'<text class="tick" x="0" y="{y + 4}">{name}</text>'
        )
    return f'<svg class="dumbbell" viewBox="0 0 380 52" aria-hidden="true">{"".join(rows)}</svg>'


def _tile(title: str, unit: str, before: Any, after: Any) -> str:
    return (
        f'<div><dt>{escape(title)}</dt><dd><span class="from">{number(before)}</span> → '
        f"{number(after)} <small>{escape(unit)}</small></dd></div>"
    )
