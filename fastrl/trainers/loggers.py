"""Loggers for `trainer.train(on_step=[...])`: JSON lines, TensorBoard, progress and samples.

A logger is anything that takes a step's record, a dict of floats under the names that
`fastrl.trainers.metrics` lists; the loggers rename nothing. For any other tracker that is:

    run = wandb.init(project="mine", config=trainer.config.to_dict())
    trainer.train(on_step=lambda record: run.log(record, step=int(record["step"])))
    run.finish()

Those here that write files take `step`, where a resumed run stands: what a log has of later steps
is dropped, since they are computed and logged again.
"""

import json
import math
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastrl.trainers._readable import headline, make_console, progress_bar, sample_table

if TYPE_CHECKING:
    from rich.console import Console

Record = Mapping[str, Any]
PathLike = str | Path

PLAIN_SECONDS = 5.0  # between two lines of progress where there is no terminal


class _Closing:
    """`with logger:` closes it."""

    def close(self) -> None:
        """Give back what is open."""

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class JsonLines(_Closing):
    """One JSON object a line, each in the file when its call returns; a killed run loses none.

    NaN and infinity, which JSON does not have, become null.

    Args:
        path: made if it is not there, its folder too; otherwise appended to. A last line that was
            cut short is removed.
        step: where the run stands; lines of later steps are removed. None: all stay.
    Raises:
        OSError: the file cannot be written, at once or later (a full disk).
    """

    def __init__(self, path: PathLike, *, step: int | None = None) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.is_file():  # not /dev/stdout
            os.truncate(self.path, _length_to_keep(self.path.read_bytes(), step))
        self._file = open(self.path, "ab", buffering=0)

    def __call__(self, record: Record) -> None:
        line = memoryview(json_line(record).encode(errors="backslashreplace"))
        while line:  # an unbuffered write may take a part
            line = line[self._file.write(line) :]

    def close(self) -> None:
        self._file.close()


class TensorBoard(_Closing):
    """A scalar for each of a record's numbers, under its own name.

    Args:
        folder: of the event files.
        step: where the run stands; TensorBoard then shows later steps once only.
    Raises:
        ImportError: tensorboard is not installed.
    """

    def __init__(self, folder: PathLike, *, step: int | None = None) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ImportError(
                'TensorBoard needs tensorboard. Install it with: pip install "fastrl[train]"'
            ) from error
        self._writer: Any = SummaryWriter(
            str(folder), purge_step=None if step is None else step + 1
        )

    def __call__(self, record: Record) -> None:
        for name, value in record.items():
            if name != "step" and isinstance(value, int | float):
                self._writer.add_scalar(name, value, int(record["step"]))
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class ProgressBar(_Closing):
    """A bar with the figures that people watch in a terminal; elsewhere a line now and then.

    Args:
        total: steps of the whole run.
        title: what stands in front.
        done: steps that were taken before.
        console: a rich console; None makes one.
        seconds: between two lines where there is no terminal.
    Raises:
        ImportError: rich is not installed.
    """

    def __init__(
        self,
        total: int,
        *,
        title: str = "training",
        done: int = 0,
        console: "Console | None" = None,
        seconds: float = PLAIN_SECONDS,
    ) -> None:
        self._console: Any = console or make_console()
        self._title, self._total, self._seconds = title, total, seconds
        self._last_line = time.monotonic()
        self._bar: Any = progress_bar(self._console) if self._console.is_terminal else None
        if self._bar is not None:
            self._task = self._bar.add_task(title, total=total, completed=done, note="")
            self._bar.start()

    def __call__(self, record: Record) -> None:
        self.update(int(record["step"]), headline(record))

    def update(self, step: int, note: str) -> None:
        """Show that `step` is done, with a note of one's own."""
        if self._bar is not None:
            self._bar.update(self._task, completed=step, note=note)
            return
        now = time.monotonic()
        if step == self._total or now - self._last_line >= self._seconds:
            line = f"{self._title}: step {step}/{self._total}, {note}"
            self._console.print(line, markup=False, soft_wrap=True)
            self._last_line = now

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()


class SampleTable(_Closing):
    """Every so many steps a table of completions with their rewards, and all of them in a file.

    Args:
        samples: `trainer.samples`: a list of dicts with "prompt", "completion" and numbers.
        path: of JSON lines, each a sample with its "step"; None: no file.
        every: steps between two tables.
        rows: completions in a table; 0: no table.
        console: a rich console; None makes one.
        step: as for `JsonLines`.
    Raises:
        ImportError: rich is not installed.
    """

    def __init__(
        self,
        samples: Callable[[], list[dict[str, Any]]],
        path: PathLike | None = None,
        *,
        every: int = 20,
        rows: int = 4,
        console: "Console | None" = None,
        step: int | None = None,
    ) -> None:
        self._samples, self._every, self._rows = samples, every, rows
        self._lines = None if path is None else JsonLines(path, step=step)
        self._console: Any = console or (make_console() if rows else None)

    def __call__(self, record: Record) -> None:
        step = int(record["step"])
        if step % self._every:
            return
        samples = self._samples()
        if self._lines is not None:
            for sample in samples:
                self._lines({"step": step, **sample})
        if self._rows and samples:
            # Evenly from all of them: the first ones share a prompt.
            count = min(self._rows, len(samples))
            chosen = [samples[i * len(samples) // count] for i in range(count)]
            self._console.print(sample_table(chosen, title=f"step {step}"))

    def close(self) -> None:
        if self._lines is not None:
            self._lines.close()


def json_line(record: Any) -> str:
    """A line of JSON, with null for numbers that are not finite."""
    return json.dumps(finite(record), ensure_ascii=False, allow_nan=False) + "\n"


def finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: None stands for both."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [finite(entry) for entry in value]
    return value


def _length_to_keep(content: bytes, step: int | None) -> int:
    """Bytes up to the first line of a later step, or up to a last line that is cut short."""
    length = 0
    for line in content.splitlines(keepends=True):
        if not line.endswith(b"\n"):
            break
        if step is not None and _step_of(line) > step:
            break
        length += len(line)
    return length


def _step_of(line: bytes) -> float:
    """-1 for a line that names no step."""
    try:
        step = json.loads(line).get("step")
    except (ValueError, AttributeError):
        return -1
    return step if isinstance(step, int | float) else -1
