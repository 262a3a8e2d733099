"""What a person sees while a run goes on: a bar in a terminal, plain lines elsewhere."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

PLAIN_SECONDS = 5.0  # between two plain lines


class StageProgress:
    """Progress of one stage; `update` after each step."""

    def __init__(self, console: Console, title: str, total: int, done: int) -> None:
        self._console, self._title, self._total = console, title, total
        self._last_line = time.monotonic()
        self._bar: Progress | None = None
        if console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description:<16}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
                console=console,
            )
            self._task = self._bar.add_task(title, total=total, completed=done, note="")

    def update(self, step: int, note: str) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=step, note=note)
            return
        now = time.monotonic()
        if step == self._total or now - self._last_line >= PLAIN_SECONDS:
            line = f"{self._title}: step {step}/{self._total}, {note}"
            self._console.print(line, soft_wrap=True)
            self._last_line = now

    @contextmanager
    def shown(self) -> Iterator["StageProgress"]:
        if self._bar is None:
            yield self
        else:
            with self._bar:
                yield self
