"""The results as text: one table of all cases, with rich where it is installed, else plain."""

import importlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from bench.compare import Change, unlike
from bench.results import CaseResult, Entry, Results

HEADER = (
    "implementation", "p50", "p20 to p80", "GB/s", "TFLOP/s", "of ceiling", "extra MiB", "error",
    "time / ours", "target",
)  # fmt: skip
_PLAIN, _LOST, _FAILED, _FAINT = "", "yellow", "red", "dim"
_WIDTH = 180


@dataclass
class Row:
    """Cells under HEADER; a row of one cell runs over the whole width."""

    cells: tuple[str, ...]
    style: str = _PLAIN


@dataclass
class Section:
    title: str
    note: str
    rows: list[Row]


def show(results: Results) -> None:
    """Print the table of a run, and what to remember of it."""
    _print(HEADER, list(sections(results)), list(closing_lines(results)))


def show_changes(changes: list[Change], threshold: float) -> None:
    by_case: dict[str, list[Row]] = {}
    for c in changes:
        verdict = "worse" if c.is_worse else ""
        cells = (c.figure, f"{c.old:.4g}", f"{c.new:.4g}", f"{c.change:+.1%}", verdict)
        style = _FAILED if c.is_worse else _PLAIN if c.is_verdict else _FAINT
        by_case.setdefault(c.case, []).append(Row(cells, style))
    worse = sum(c.is_worse for c in changes)
    closing = [
        f"{len(by_case)} cases in both files; {worse} figures worse by more than {threshold:.0%}.",
        "+ is worse. The change of `time, us` is the median over those listed above it, which are "
        "relative to what ran beside us.",
    ]
    if other := unlike(changes, threshold):
        closing.append(
            f"{len(other)} of the cases found the machine in another state (copy bandwidth off by "
            f"more than {threshold:.0%}): their ratios say less."
        )
    header = ("figure", "old", "new", "change", "")
    _print(header, [Section(case, "", rows) for case, rows in by_case.items()], closing)


def sections(results: Results) -> Iterator[Section]:
    for case in results.cases:
        rows = [_entry_row(entry) for entry in case.entries]
        if case.wrong is not None:
            rows = [Row((f"WRONG, not timed: {case.wrong}",), _FAILED)]
        rows += [
            Row((f"{m['name']} {m['version']}".strip() + f": not run, {m['reason']}",), _FAINT)
            for m in case.missing
        ]
        yield Section(case.name, f"{case.reason}; {_counted(case)}", rows)


def _counted(case: CaseResult) -> str:
    text = f"{amount(case.counted_bytes)} counted"
    if case.counted_flops:
        text += f", {case.counted_flops / 1e9:.3g} GFLOP; ceiling: {case.ceiling}"
    if case.eager_error is not None:
        text += f"; error of eager {case.eager_error:.0e}"
    return text


def _entry_row(entry: Entry) -> Row:
    t = entry.time_us
    targets = ", ".join(
        f"{goal['text']}: {'reached' if goal['reached'] else 'MISSED'}" for goal in entry.targets
    )
    memory = "?" if entry.extra_memory_mib is None else f"{entry.extra_memory_mib:.1f}"
    ratio = "" if entry.name == "fastrl" or entry.ratio is None else f"{entry.ratio:.2f}x"
    lost = is_faster_peer(entry)
    style = _FAILED if "MISSED" in targets else _LOST if lost else _PLAIN
    cells = (
        f"{entry.name} {entry.version}",
        duration(t["p50"]),
        f"{duration(t['p20'])} to {duration(t['p80'])}",
        f"{entry.gb_s:.3g}",
        "" if entry.tflop_s is None else f"{entry.tflop_s:.3g}",
        f"{entry.share_of_ceiling:.0%}",
        memory,
        f"{entry.error:.0e}",
        ratio + (" (faster)" if lost else ""),
        targets,
    )
    return Row(cells, style)


def is_faster_peer(entry: Entry) -> bool:
    ours = entry.name == "fastrl" or entry.name.startswith("fastrl ")
    return not ours and entry.ratio is not None and entry.ratio < 1


def closing_lines(results: Results) -> Iterator[str]:
    e = results.environment
    simd = f" ({e['simd']})" if e.get("simd") else ""
    yield (
        f"{e['gpu'] or e['cpu']}, {e['threads']} threads on {e['cores']} cores{simd}; torch "
        f"{e['torch']}, Python {e['python']}; commit {e['commit']}; {e['date']}"
    )
    peers = ", ".join(f"{name} {version}" for name, version in e["peers"].items())
    yield f"Peers: {peers}"
    if results.copy_gb_s is not None:
        yield f"Copy bandwidth: {results.copy_gb_s:.1f} GB/s, read and written, median of all cases"
    for dtype, rate in results.product_tflop_s.items():
        yield f"Matrix products in {dtype}: {rate:.3g} TFLOP/s, median of the cases that count them"
    entries = [entry for case in results.cases for entry in case.entries]
    if left_out := sum(entry.disturbed for entry in entries):
        turns = left_out + sum(entry.rounds for entry in entries)
        yield f"Left out: {left_out} of {turns} turns, in which a probe found the machine disturbed"
    if e["load_1min"] > 0.5:
        yield (
            f"The load was {e['load_1min']:.1f} before the run: other work takes its share of "
            "these figures."
        )
    lost = [
        f"{peer.name} at {case.name} ({peer.ratio:.2f}x)"
        for case in results.cases for peer in case.entries if is_faster_peer(peer)
    ]  # fmt: skip
    yield "Faster than we: " + ("; ".join(lost) or "none of these peers")
    goals = [goal for case in results.cases for entry in case.entries for goal in entry.targets]
    if goals:
        yield f"Targets reached: {sum(goal['reached'] for goal in goals)} of {len(goals)}"
    if results.wrong:
        yield f"WRONG results: {', '.join(case.name for case in results.wrong)}"


def duration(us: float) -> str:
    for unit, size in (("s", 1e6), ("ms", 1e3)):
        if us >= size:
            return f"{us / size:.3g} {unit}"
    return f"{us:.3g} us"


def amount(count: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count} B"


def _print(header: tuple[str, ...], found: list[Section], closing: list[str]) -> None:
    rich = _rich()
    if rich is None:
        print("\n".join([*plain_lines(header, found), "", *closing]))
        return
    console = rich["console"].Console(file=sys.stdout, highlight=False)
    if not console.is_terminal:
        console = rich["console"].Console(file=sys.stdout, highlight=False, width=_WIDTH)
    console.print(_rich_table(rich, header, found, console.width))
    console.print()
    for line in closing:
        console.print(line, markup=False)


def _rich() -> dict[str, Any] | None:
    try:
        return {
            name: importlib.import_module(f"rich.{name}") for name in ("console", "table", "text")
        }
    except ImportError:
        return None


def _rich_table(rich: dict[str, Any], header: tuple[str, ...], found: list[Section], room: int):
    """Titles and reasons run over the columns, which rich's tables cannot: so one table a case,
    all of the same widths, the first column giving way where the terminal is narrow."""
    text = rich["text"].Text
    widths = _widths(header, found)
    widths[0] = max(24, min(widths[0], room - sum(widths[1:]) - 2 * len(widths)))

    def table_of(rows: list[Row]) -> Any:
        table = rich["table"].Table(box=None, pad_edge=False, show_header=False)
        for i, width in enumerate(widths):
            justify = "left" if i in (0, len(header) - 1) else "right"
            table.add_column(justify=justify, width=width)
        for row in rows:
            table.add_row(*map(text, row.cells), style=row.style)
        return table

    parts: list[Any] = [table_of([Row(header, "bold")])]
    for section in found:
        parts.append(text(f"\n{section.title}", style="bold"))
        if section.note:
            parts.append(text(f"  {section.note}", style=_FAINT))
        full = [Row(_indented(r), r.style) for r in section.rows if len(r.cells) > 1]
        parts.append(table_of(full))
        parts += [text(f"  {r.cells[0]}", style=r.style) for r in section.rows if len(r.cells) == 1]
    return rich["console"].Group(*parts)


def _indented(row: Row) -> tuple[str, ...]:
    return (f"  {row.cells[0]}", *row.cells[1:])


def _widths(header: tuple[str, ...], found: list[Section]) -> list[int]:
    rows = [row.cells for section in found for row in section.rows if len(row.cells) > 1]
    return [
        max([len(header[i]), *(len(cells[i]) + (2 if i == 0 else 0) for cells in rows)])
        for i in range(len(header))
    ]


def plain_lines(header: tuple[str, ...], found: list[Section]) -> list[str]:
    widths = _widths(header, found)
    last = len(header) - 1

    def line(cells: tuple[str, ...]) -> str:
        padded = [
            c.ljust(w) if i in (0, last) else c.rjust(w)
            for i, (c, w) in enumerate(zip(cells, widths, strict=True))
        ]
        return "  ".join(padded).rstrip()

    lines = [line(header)]
    for section in found:
        lines += ["", section.title] + ([f"  {section.note}"] if section.note else [])
        for row in section.rows:
            cells = _indented(row)
            lines.append(line(cells) if len(cells) > 1 else cells[0])
    return lines
