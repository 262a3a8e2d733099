"""What loggers show to people, with rich."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

HEADLINES = (  # what people watch: key, how it is called, how it is written
    ("reward", "reward", "+.3f"),
    ("eval/reward", "held-out", "+.3f"),
    ("kl", "KL", ".4f"),
    ("entropy", "entropy", ".2f"),
    ("completions/mean_length", "length", ".0f"),
    ("logprob_gap", "gap", ".0e"),
    ("tokens_per_second", "tokens/s", ",.0f"),
)


def headline(record: Mapping[str, Any]) -> str:
    """The figures that people watch, those that the record has."""
    shown = [(key, name, form) for key, name, form in HEADLINES if record.get(key) is not None]
    return ", ".join(f"{name} {record[key]:{form}}" for key, name, form in shown)


def sample_table(samples: list[dict[str, Any]], *, title: str | None = None) -> Any:
    """A rich table with a row for each sample; text columns take what room the numbers leave."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    names = list(dict.fromkeys(name for sample in samples for name in sample))
    for name in names:
        is_text = name in ("prompt", "completion")
        table.add_column(
            Text(name),
            justify="left" if is_text else "right",
            ratio=1 if is_text else None,
            max_width=None if is_text else 12,
            overflow="fold",
        )
    for sample in samples:
        table.add_row(*(Text(_cell(name, sample.get(name))) for name in names))
    return table


def make_console() -> "Console":
    """Raises an ImportError that says how to install rich."""
    try:
        from rich.console import Console
    except ImportError as error:
        raise ImportError(
            'Progress and sample tables need rich. Install it with: pip install "fastrl[train]"'
        ) from error
    return Console(highlight=False)


def progress_bar(console: "Console") -> Any:
    """A bar of rich, whose tasks have a field "note"."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    return Progress(
        TextColumn("{task.description:<16}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=console,
    )


def _cell(name: str, value: Any) -> str:
    if isinstance(value, float):
        return f"{value:+.3f}"
    if name == "prompt" and isinstance(value, list) and value and isinstance(value[-1], dict):
        value = value[-1].get("content", "")  # of a conversation, what is answered
    text = " ".join(str("–" if value is None else value).split())
    if len(text) <= 200:
        return text
    return "…" + text[-199:] if name == "prompt" else text[:199] + "…"
