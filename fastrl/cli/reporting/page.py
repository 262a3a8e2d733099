"""The page as a whole: one file that needs nothing beside it, neither a network nor scripts."""

import base64
import hashlib
import shlex
from collections.abc import Sequence
from datetime import datetime

import fastrl
from fastrl.cli.reporting.chart import Chart, draw
from fastrl.cli.reporting.charts import all_charts
from fastrl.cli.reporting.comparison import comparison, key_of_run
from fastrl.cli.reporting.head import head
from fastrl.cli.reporting.numbers import escape, number
from fastrl.cli.reporting.run_data import RunData
from fastrl.cli.reporting.samples import held_out_table, training_table
from fastrl.cli.reporting.script import SCRIPT
from fastrl.cli.reporting.series import SHARE
from fastrl.cli.reporting.style import STYLE

FOLDED = "More"  # the group of charts that is folded away
# Charts that have several lines of a run, and a legend also where there are several runs.
OF_SEVERAL = ("chart-gold", "chart-evidence", "chart-supervised")


def page(runs: Sequence[RunData]) -> str:
    """HTML of one run, or of several beside each other."""
    is_one = len(runs) == 1
    title = runs[0].name if is_one else f"{len(runs)} runs"
    body = [head(runs[0]) if is_one else comparison(runs)]
    body.append(_charts(runs))
    body += [_samples(runs), _settings(runs)]
    made = f"Made by fastrl {fastrl.__version__} on {datetime.now():%Y-%m-%d %H:%M}."
    # Nothing is loaded, and no script runs but ours, whatever stands in a completion.
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src '{_digest(SCRIPT)}'"
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(title)} · fastrl report</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        f"<main>\n{''.join(part for part in body if part)}\n</main>\n<footer>{made}</footer>\n"
        f"<script>{SCRIPT}</script>\n</body>\n</html>\n"
    )


def _digest(script: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def _charts(runs: Sequence[RunData]) -> str:
    groups = all_charts(runs)
    if not groups:
        return (
            '<section><p class="note">No step is logged yet, so there are no charts.</p></section>'
        )
    is_averaged = any(
        line.window > 1 for charts in groups.values() for c in charts for line in c.lines
    )
    how = ""
    if is_averaged:
        how = (
            '<p class="note">Faint lines are single steps, strong ones a running mean over a '
            f"{SHARE}th of them.</p>"
        )
    keys = ""
    if len(runs) > 1:
        items = "".join(
            f"<li>{key_of_run(runs, i)} {escape(run.name)}</li>" for i, run in enumerate(runs)
        )
        keys = f'<ul class="keys" aria-label="Runs">{items}</ul>'
    sections = []
    for name, charts in groups.items():
        cards = "".join(_card(chart, len(runs) == 1) for chart in charts)
        identifier = f"group-{name.lower()}"
        if name == FOLDED:
            sections.append(
                f'<details><summary id="{identifier}">{len(charts)} more charts, of everything '
                f'else that was logged</summary><div class="grid">{cards}</div></details>'
            )
        else:
            sections.append(f'<h3 id="{identifier}">{name}</h3><div class="grid">{cards}</div>')
    return (
        f'<section aria-labelledby="curves"><h2 id="curves">Curves</h2>{keys}{how}'
        f"{''.join(sections)}</section>"
    )


def _card(chart: Chart, is_one: bool) -> str:
    """A chart with its title, what its lines are, and where it stands now."""
    main = chart.lines[0]
    now = ""
    if is_one and chart.is_by_step and sum(line.has_line for line in chart.lines) == 1:
        last = [(x, y) for x, y in zip(main.xs, main.ys, strict=True) if y is not None][-1]
        where = f"{escape(main.name)} at step {last[0]:g}"
        now = f'<span class="now" title="{where}">{number(last[1])}</span>'
    legend = ""
    if len(chart.lines) > 1 and (is_one or chart.id.startswith(OF_SEVERAL)):
        items = "".join(
            f'<li><svg viewBox="0 0 30 10" aria-hidden="true"><g class="c{line.color} '
            f'd{line.dash}">{_sample_of(line.has_line, line.has_marks)}</g></svg>'
            f"{escape(line.name)}</li>"
            for line in chart.lines
        )
        legend = f'<ul class="legend">{items}</ul>'
    caption = f'<p class="caption">{escape(chart.caption)}</p>' if chart.caption else ""
    return (
        f'<figure id="{chart.id}"><figcaption><div><h4 id="{chart.id}-title">'
        f'{escape(chart.title)}</h4><p class="unit">{escape(chart.unit)}</p></div>{now}'
        f'</figcaption><div class="plot">{draw(chart)}</div>{legend}{caption}</figure>'
    )


def _sample_of(has_line: bool, has_marks: bool) -> str:
    line = '<path class="line" d="M1,5H29"/>' if has_line else ""
    mark = '<path class="mark" d="M11.5,1.5h7v7h-7z"/>' if has_marks else ""
    return line + mark


def _samples(runs: Sequence[RunData]) -> str:
    tables = [held_out_table(run) + training_table(run) for run in runs]
    parts = [_folded(runs, index, table) for index, table in enumerate(tables) if table]
    return _section("samples", "Samples", parts)


def _settings(runs: Sequence[RunData]) -> str:
    parts = []
    for index, run in enumerate(runs):
        texts = "".join(
            f"<details><summary><code>{escape(name)}</code></summary>"
            f'<pre tabindex="0">{escape(text)}</pre></details>'
            for name, text in run.documents.items()
        )
        parts.append(_folded(runs, index, f"{texts}<h3>Commands</h3>{_commands(run)}"))
    return _section("settings", "Settings", parts)


def _section(identifier: str, title: str, parts: Sequence[str]) -> str:
    if not parts:
        return ""
    return (
        f'<section aria-labelledby="{identifier}"><h2 id="{identifier}">{title}</h2>'
        f"{''.join(parts)}</section>"
    )


def _folded(runs: Sequence[RunData], index: int, content: str) -> str:
    """As it is of one run; of several, a block for each that opens."""
    if len(runs) == 1:
        return content
    name = f"{key_of_run(runs, index)} {escape(runs[index].name)}"
    return f'<details class="run"><summary>{name}</summary>{content}</details>'


def _commands(run: RunData) -> str:
    folder = shlex.quote(str(run.folder))
    commands = {"go on with it": f"fastrl train --resume {folder}"}
    if not run.is_demo and run.kind != "preference":
        commands |= {
            "measure it again": f"fastrl eval {folder}",
            "sample from it": f"fastrl sample {folder} --prompt 'Once upon a time'",
        }
    commands["make this page again"] = f"fastrl report {folder}"
    lines = "\n".join(f"{text:<60}  # {what}" for what, text in commands.items())
    return f'<pre tabindex="0">{escape(lines)}</pre>'
