"""The page of `bench.recipe_results`: a table in Markdown, and samples."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"
SAMPLES = 3  # held-out prompts that are shown of each recipe


def markdown(results: Sequence[dict[str, Any]], threads: int) -> str:
    """The table."""
    lines = [
        "| recipe | algorithm | held-out metric | before | after | gain | over prompts | over "
        "seeds | gold | tokens | minutes a seed | command |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in results:
        minutes = [s / 60 for s in row["seconds"] if s is not None]
        cells = [
            row["recipe"],
            row["algorithm"],
            row["metric"],
            f"{statistics.fmean(row['before']):.3f}",
            f"{statistics.fmean(row['after']):.3f}",
            f"{row['gain']:+.3f}",
            _half(row["gain_over_prompts"]),
            _half(row["gain_over_seeds"]),
            _from_to(row["gold"], 3),
            _from_to(row["lengths"], 1),
            f"{statistics.fmean(minutes):.1f}" if minutes else "–",
            f"`{row['command']}`",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    alarms = round(sum(row["alarms"] for row in results))
    seeds = ", ".join(map(str, results[0]["seeds"])) if results else ""
    return "\n".join(
        [
            *lines,
            "",
            f"Means over the seeds {seeds}; 95 % intervals of the gain, paired by prompt. For "
            "preference models the prompts are pairs, and the interval is that of the accuracy. "
            f"Threads of a run: {threads}. Actor-critic begins from the start that the run above "
            "it has trained; its minutes are without that. Gold: the reward that the recipe's "
            "monitor watches and nothing learns from, at its first and its last evaluation; "
            f"{alarms} alarms. Tokens: the mean length of a completion.",
            "",
        ]
    )


def samples(title: str, runs: Mapping[str, dict[str, Any]]) -> str:
    """Some held-out prompts with their references, and what was sampled from them.

    Args:
        runs: by algorithm the results.json of runs that share a start.
    """
    documents = list(runs.values())
    tables = {"start": documents[0]["before"], **{k: run["after"] for k, run in runs.items()}}
    lines = ["", f"{title}:", ""]
    for index, first in enumerate(documents[0]["before"]["samples"][:SAMPLES]):
        lines.append(f"- {_quoted(first['prompt'])} → {_quoted(first['reference'])}")
        for name, table in tables.items():
            lines.append(f"  - {name}: {_quoted(table['samples'][index]['completion'])}")
    return "\n".join([*lines, ""])


def _quoted(text: Any) -> str:
    """On one line of Markdown, as code."""
    return "`" + str(text).replace("\n", "↵").replace("`", "'") + "`"


def _half(width: float | None) -> str:
    return "–" if width is None else f"± {width:.3f}"


def _from_to(ends: Sequence[Sequence[float | None]], digits: int) -> str:
    """Means over the seeds, before and after."""
    if not all(ends) or any(number is None for end in ends for number in end):
        return "–"
    means = (statistics.fmean(number for number in end if number is not None) for end in ends)
    return " → ".join(f"{mean:.{digits}f}" for mean in means)


def write_between_marks(path: Path, table: str) -> None:
    """Put the table between the marks of a file; a file without them gets both at its end."""
    text = path.read_text(encoding="utf-8") if path.exists() else "# Results of the recipes\n"
    if BEGIN not in text:
        text = f"{text.rstrip()}\n\n{BEGIN}\n{END}\n"
    head, _, rest = text.partition(BEGIN)
    _, _, tail = rest.partition(END)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{head}{BEGIN}\n{table}{END}{tail}", encoding="utf-8")
