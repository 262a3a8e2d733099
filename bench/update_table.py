"""The table of `bench.grpo_update`, from what it keeps as JSON: torch may be missing here."""

import statistics
from typing import Any

PACKED = "fastrl, packed"


def lines(record: dict[str, Any]) -> list[str]:
    """The table, of what `--json` keeps."""
    o, runs = record["options"], record["runs"]
    lengths = "up to " if o["ragged"] else ""
    copies = f", {o['copies']} padded rows at once" if o["copies"] else ""
    found = [
        f"GRPO update of a Llama of {o['layers']} layers, hidden {o['hidden']}, V {o['vocab']}, "
        f"{o['dtype']}: {o['prompts']} prompts x {o['completions']} completions, {lengths}"
        f"{o['prompt_tokens']} + {o['tokens']} tokens{copies}",
        f"{record['where']}, {record['threads']} threads, torch {record['torch']}, transformers "
        f"{record['transformers']}; median of {len(runs[PACKED]['seconds'])} rounds, in turns",
        "",
        f"{'':32}{'s':>9}{'/ packed':>10}{'peak MiB':>10}{'/ packed':>10}{'loss':>12}{'grad':>9}",
    ]
    return [
        *(found + [_line(name, run, runs[PACKED]) for name, run in runs.items()]), "",
        "grad: largest difference of a parameter's gradient from the packed one, relative",
    ]  # fmt: skip


def _line(name: str, run: dict[str, Any], ours: dict[str, Any]) -> str:
    if run["reason"]:
        return f"{name:32}  {run['reason']}"
    cells = [f"{name:32}"]
    for figure, form in ((_seconds_of, "9.3f"), (_peak_of, "10.0f")):
        own, of_packed = figure(run), figure(ours)
        cells.append(f"{'?':>{form.partition('.')[0]}}" if own is None else f"{own:{form}}")
        cells.append(f"{own / max(of_packed, 1e-9):9.2f}x" if own and of_packed else f"{'?':>10}")
    for figure, form in (("loss", "12.7f"), ("grad_difference", "9.1e")):
        own = run[figure]
        cells.append(f"{'?':>{form.partition('.')[0]}}" if own is None else f"{own:{form}}")
    return "".join(cells)


def _seconds_of(run: dict[str, Any]) -> float | None:
    return statistics.median(run["seconds"]) if run["seconds"] else None


def _peak_of(run: dict[str, Any]) -> float | None:
    return run["peak_mib"]
