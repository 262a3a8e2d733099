"""Several runs beside each other: how they ended, and what their settings differ in."""

from collections.abc import Sequence

from fastrl.cli.intervals import INTERVAL_NOTE
from fastrl.cli.recipes.toml import flattened
from fastrl.cli.reporting.charts import letter, style
from fastrl.cli.reporting.evaluations import gain_of
from fastrl.cli.reporting.facts import interval, model_of, steps_of, time_of
from fastrl.cli.reporting.head import problems
from fastrl.cli.reporting.numbers import duration, escape, number
from fastrl.cli.reporting.run_data import RunData

_NUMERIC = ' class="number"'


def comparison(runs: Sequence[RunData]) -> str:
    """Of several runs: a table with a row for each, and what their recipes differ in."""
    rows = "".join(_comparison_row(runs, index) for index in range(len(runs)))
    heads = ["Run", "Algorithm and model", "Reward before", "Reward after", "Gain"]
    heads += ["KL", "Length", "Steps", "Time", "Alarms"]
    cells = "".join(
        f'<th scope="col"{"" if i < 2 else _NUMERIC}>{name}</th>' for i, name in enumerate(heads)
    )
    return (
        f'<header><p class="kicker">fastrl run report</p><h1>{len(runs)} runs compared</h1>'
        f"</header>{problems(runs)}"
        '<section aria-labelledby="comparison"><h2 id="comparison">Comparison</h2>'
        f'<div class="wide" tabindex="0" role="region" aria-labelledby="comparison"><table>'
        f"<thead><tr>{cells}</tr></thead><tbody>{rows}</tbody></table></div>"
        '<p class="note">Reward, KL (nats per token) and length (tokens) of held-out prompts; time '
        f"in steps, those of a supervised start too. {INTERVAL_NOTE}</p>"
        f"{_differences(runs)}</section>"
    )


def key_of_run(runs: Sequence[RunData], index: int) -> str:
    """A run's letter in its colour, with a piece of its line."""
    color, dash = style(index)
    return (
        f'<span class="key"><svg viewBox="0 0 30 10" aria-hidden="true"><g class="c{color} '
        f'd{dash}"><path class="line" d="M1,5H29"/></g></svg>'
        f'<b class="t{color}">{letter(runs, index)}</b></span>'
    )


def _comparison_row(runs: Sequence[RunData], index: int) -> str:
    run, gain = runs[index], gain_of(runs[index])
    rewards = ["–"] * 3
    if gain is not None:
        rewards = [interval(gain.before), interval(gain.after), interval(gain.gain, "+")]
    figures = [number(run.after.get(f"eval/{k}")) for k in ("kl", "completions/mean_length")]
    alarms = ", ".join(f"step {record['step']:g}" for record in run.alarms) or "none"
    cells = [*rewards, *figures, steps_of(run), duration(time_of(run)), alarms]
    return (
        f'<tr><th scope="row">{key_of_run(runs, index)} {escape(run.name)}</th>'
        f"<td>{escape(run.kind)}<br><small>{escape(model_of(run))}</small></td>"
        + "".join(f"<td{_NUMERIC}>{cell}</td>" for cell in cells)
        + "</tr>"
    )


def _differences(runs: Sequence[RunData]) -> str:
    """The recipes' keys that not all runs have alike."""
    flat = [flattened(run.recipe or run.config) for run in runs]
    keys = dict.fromkeys(key for document in flat for key in document)
    different = [key for key in keys if any(d.get(key) != flat[0].get(key) for d in flat)]
    if not different:
        return '<p class="note">Their settings are the same.</p>'
    heads = "".join(f'<th scope="col">{key_of_run(runs, index)}</th>' for index in range(len(runs)))
    rows = "".join(
        f'<tr><th scope="row"><code>{escape(key)}</code></th>'
        + "".join(f"<td>{escape(document.get(key, '–'))}</td>" for document in flat)
        + "</tr>"
        for key in different
    )
    return (
        '<h3 id="differences">What differs in their settings</h3>'
        '<div class="wide" tabindex="0" role="region" aria-labelledby="differences"><table>'
        f'<thead><tr><th scope="col">Setting</th>{heads}</tr></thead><tbody>{rows}</tbody>'
        "</table></div>"
    )
