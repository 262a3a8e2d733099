"""The folder of a run: what it holds is written whole or not at all, and never overwritten blind.

config.json         settings and fingerprint of the text    tokenizer.json
metrics.jsonl       one record a step                       results.json  evaluations so far
warm_up/  policy_gradient/  actor_critic/                   checkpoints
learning_curve.png
"""

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from fastrl._disk import sync
from fastrl.trainers.loggers import finite, json_line

Folder = TypeVar("Folder", bound="RunFolder")


class RunFolderError(ValueError):
    """The folder cannot be used as asked; the message says why and what to do."""


def path_of_now() -> Path:
    """Where a run goes that is not told where."""
    return Path("runs") / datetime.now().strftime("%Y-%m-%d_%H-%M-%S")


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file that is either the old one or the new one, whatever happens.

    What a link leads to is replaced, not the link; a pipe or a device is written to.
    """
    if path.exists() and not path.is_file():
        path.write_bytes(content)
        return
    path = path.resolve()
    partial = path.with_name(f".{path.name}.partial")
    with open(partial, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    sync(path.parent)  # the rename itself


class RunFolder:
    """Paths and documents of a run.

    Args:
        path: the folder; `create` or `open` gives one that is ready.
    """

    FIRST: ClassVar[str] = "config.json"  # the document that makes a folder that of a run

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / self.FIRST
        self.tokenizer = path / "tokenizer.json"
        self.metrics = path / "metrics.jsonl"
        self.results = path / "results.json"
        self.curve = path / "learning_curve.png"

    @classmethod
    def create(cls: type[Folder], path: Path) -> Folder:
        """Make a new folder, or take an empty one.

        Raises:
            RunFolderError: it holds a run or anything else, or cannot be made.
        """
        cls.check_new(path)
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _cannot_be_made(path, error) from error
        return cls(path)

    @classmethod
    def check_new(cls, path: Path) -> None:
        """Raise a RunFolderError where `create` would for what stands there; writes nothing."""
        if cls(path).config.exists():
            raise RunFolderError(
                f"train: expected --output a new folder, got {path}, which already holds a run. "
                f"Go on with it: fastrl train --resume {path}, or choose another folder."
            )
        try:
            holds_files = path.exists() and any(path.iterdir())
        except OSError as error:
            raise _cannot_be_made(path, error) from error
        if holds_files:
            raise RunFolderError(
                f"train: expected --output a new or empty folder, got {path} with files in it. "
                "Choose another folder."
            )

    @classmethod
    def open(cls: type[Folder], path: Path) -> Folder:
        """The folder of a run that was begun.

        Raises:
            RunFolderError: there is no run in it.
        """
        folder = cls(path)
        if not folder.config.is_file():
            raise RunFolderError(
                f"train: expected --resume the folder of a run, got {path} without a {cls.FIRST}. "
                "Pass the folder that `fastrl train` named when it started."
            )
        return folder

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keep other processes out of the run; the lock goes with the process, even killed."""
        with open(self.path / ".lock", "w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise RunFolderError(
                    f"train: expected {self.path} not to be in use, got another fastrl train "
                    "running in it. Wait for it, or stop it first."
                ) from error
            yield

    def write_json(self, path: Path, document: dict[str, Any]) -> None:
        text = json.dumps(finite(document), indent=2, ensure_ascii=False, allow_nan=False)
        write_atomically(path, (text + "\n").encode())

    def read_json(self, path: Path) -> dict[str, Any]:
        """A document of the run.

        Raises:
            RunFolderError: it is missing or damaged.
        """
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise RunFolderError(
                f"train: expected {path} as this run wrote it, got {error}. Restore the file, or "
                "start a new run with another --output."
            ) from error
        if not isinstance(document, dict):
            raise RunFolderError(
                f"train: expected {path} as this run wrote it, got a {type(document).__name__}. "
                "Restore the file, or start a new run with another --output."
            )
        return document


def _cannot_be_made(path: Path, error: OSError) -> RunFolderError:
    return RunFolderError(
        f"train: expected --output a folder that can be made, got {path}: "
        f"{error.strerror}. Choose another folder."
    )


class MetricsLog:
    """metrics.jsonl: one JSON object a line, with "stage" and a "step" that rises within it.

    Args:
        path: the file; made if it is not there. A line cut short is dropped.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.records = list(_read_lines(path))
        self._rewrite()

    def begin_stage(self, stage: str, step: int) -> None:
        """Drop what was logged of a stage after the step that its checkpoint stands at.

        It will be computed again.
        """
        kept = [r for r in self.records if r["stage"] != stage or r["step"] <= step]
        if len(kept) < len(self.records):
            self.records = kept
            self._rewrite()

    def add(self, stage: str, record: dict[str, Any]) -> None:
        """Append a record; it is in the file when this returns."""
        record = finite({"stage": stage, **record})
        self.records.append(record)
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json_line(record))

    def of_stage(self, stage: str) -> list[dict[str, Any]]:
        return [record for record in self.records if record["stage"] == stage]

    def _rewrite(self) -> None:
        write_atomically(self.path, "".join(map(json_line, self.records)).encode())


def _read_lines(path: Path) -> Iterator[dict[str, Any]]:
    if not path.exists():
        return
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue  # cut short by an interruption
        if isinstance(record, dict) and isinstance(record.get("step"), int) and "stage" in record:
            yield record
