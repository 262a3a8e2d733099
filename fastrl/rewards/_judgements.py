"""JSON lines that people and programs write one at a time: judgements, ratings, requests for them.

    {"id": "9f3a…", "annotator": "ada", "choice": "a" | "b" | "tie" | "skip", "time": "2026-…"}
    {"id": "9f3a…", "annotator": "ada", "rating": 4 or null where it was skipped, "time": "2026-…"}
    {"id": "9f3a…", "annotator": "ada", "retracted": true, "time": "2026-…"}

A line is written when its newline is; what stands behind the last newline was cut short by a kill.
Nothing is ever rewritten: of two lines of one annotator on one item the later one stands.
"""

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from datetime import datetime, timezone
from pathlib import Path
from types import TracebackType
from typing import Any

Record = dict[str, Any]
CHOICES = ("a", "b", "tie", "skip")


def content_id(*parts: Any) -> str:
    """16 hexadecimal digits that are the same for the same content."""
    text = json.dumps(parts, ensure_ascii=True, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def now() -> str:
    """The time, UTC, to the second."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


class RecordFile:
    """A file of JSON lines that is appended to; each line is on the disk when `append` returns.

    A last line that was cut short is dropped when the file is opened; one that lacks nothing but
    its newline gets it.

    Args:
        path: made if it is not there, its folder too.
        exclusive: keep every other writer out as long as this one is open; False: only while a
            line is written.
    Raises:
        ValueError: another process holds the file, or it holds something other than JSON objects.
        OSError: it cannot be written, at once or later (a full disk).
    """

    def __init__(self, path: str | Path, *, exclusive: bool = False) -> None:
        self.path, self._is_exclusive = Path(path), exclusive
        self.path.parent.mkdir(parents=True, exist_ok=True)
        is_new = not self.path.exists()
        self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            if is_new:
                _sync_folder(self.path.parent)
            self._lock(wait=not exclusive)
            read_records(self.path)  # nothing is cut from a file of another kind
            self._repair()
            if not exclusive:
                self._unlock()
        except BaseException:
            self.close()
            raise

    def append(self, *records: Mapping[str, Any]) -> None:
        """Write the records, a line each, and wait until the disk has them."""
        lines = [json.dumps(record, ensure_ascii=False, allow_nan=False) for record in records]
        text = "".join(f"{line}\n" for line in lines)
        content = memoryview(text.encode(errors="backslashreplace"))  # JSON's escape of surrogates
        if not self._is_exclusive:
            self._lock(wait=True)
        try:
            self._repair()  # after another writer's death, or a full disk
            while content:  # a write may take a part
                content = content[os.write(self._descriptor, content) :]
            os.fsync(self._descriptor)
        finally:
            if not self._is_exclusive:
                self._unlock()

    def close(self) -> None:
        """Give the file back, and with it the lock."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> "RecordFile":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _lock(self, *, wait: bool) -> None:
        lock(self._descriptor, self.path, wait=wait)

    def _unlock(self) -> None:
        import fcntl

        fcntl.flock(self._descriptor, fcntl.LOCK_UN)

    def _repair(self) -> None:
        """Under the lock, nobody is writing: what stands behind the last newline is a dead's."""
        size = os.fstat(self._descriptor).st_size
        if size == 0 or os.pread(self._descriptor, 1, size - 1) == b"\n":
            return
        content = self.path.read_bytes()
        length = content.rfind(b"\n") + 1
        tail = content[length:]
        if not tail.startswith(b"{"):
            raise _not_records(self.path, content.count(b"\n") + 1, tail[:40])
        try:
            json.loads(tail)  # no object is a beginning of a longer one
        except ValueError:
            os.ftruncate(self._descriptor, length)
        else:
            os.write(self._descriptor, b"\n")
        os.fsync(self._descriptor)


class Tail:
    """Reads what has been added to a file of JSON lines since the last look.

    Args:
        path: need not be there yet.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._offset = self._line = 0

    def __call__(self) -> list[Record]:
        """The records whose lines are complete now and were not before.

        Raises:
            ValueError: a line is no JSON object, or the file became shorter.
        """
        try:
            file = open(self.path, "rb")
        except FileNotFoundError:
            return []
        with file:
            if os.fstat(file.fileno()).st_size < self._offset:
                raise ValueError(
                    f"judgements: expected {self.path} only to grow, got one that became shorter. "
                    "Start again with the file that is there now."
                )
            file.seek(self._offset)
            content = file.read()
        *lines, rest = content.split(b"\n")
        records = _all_parsed(lines, self.path, self._line + 1)
        self._offset += len(content) - len(rest)
        self._line += len(lines)
        return records


class Answers:
    """What stands of judgements or ratings: the last of each annotator on each item.

    Attributes:
        by_item: by the item's id, each annotator's record.
        by_annotator: by the annotator, their records by id, the latest last.
    """

    def __init__(self) -> None:
        self.by_item: dict[str, dict[str, Record]] = {}
        self.by_annotator: dict[str, dict[str, Record]] = {}
        self._kind: str | None = None

    def add(self, record: Record) -> None:
        """Take a line into account.

        Raises:
            ValueError: it is neither a judgement, nor a rating, nor a retraction; or it is of
                another kind than those before.
        """
        kind = _kind_of(record)
        self.check_kind(kind)
        self._kind = self._kind if kind == "retracted" else kind
        item, annotator = str(record["id"]), record["annotator"]
        of_item = self.by_item.setdefault(item, {})
        of_annotator = self.by_annotator.setdefault(annotator, {})
        of_item.pop(annotator, None)
        of_annotator.pop(item, None)
        if not record.get("retracted"):
            of_item[annotator] = of_annotator[item] = record

    @property
    def is_rating(self) -> bool:
        """Whether these are ratings; False for choices, and as long as there is nothing."""
        return self._kind == "rating"

    def of(self, annotator: str) -> dict[str, Record]:
        """This annotator's records by id, the latest last."""
        return self.by_annotator.get(annotator, {})

    def check_kind(self, kind: str) -> None:
        """Raise a ValueError where "choice" or "rating" is another kind than those before."""
        if kind != "retracted" and self._kind not in (None, kind):
            raise ValueError(
                "judgements: expected either choices or ratings, got both. "
                "Keep them in files of their own."
            )


def read_records(path: str | Path) -> list[Record]:
    """The lines of a file; the last one, too, if it lacks nothing but its newline.

    Raises:
        ValueError: one is no JSON object.
        OSError: the file cannot be read.
    """
    path = Path(path)
    *lines, last = path.read_bytes().split(b"\n")
    try:
        json.loads(last)
    except ValueError:  # cut short, or nothing
        pass
    else:
        lines.append(last)
    return _all_parsed(lines, path, 1)


def read_answers(*paths: str | Path) -> Answers:
    """What stands of the lines of all files, in their order."""
    answers = Answers()
    for path in paths:
        for number, record in enumerate(read_records(path), 1):
            try:
                answers.add(record)
            except ValueError as error:
                raise ValueError(f"{error} It is record {number} of {path}.") from error
    return answers


def choices_of(answers: Answers) -> Iterator[tuple[str, dict[str, str]]]:
    """For each item each annotator's choice, without those who skipped it."""
    for item, records in answers.by_item.items():
        choices = {who: record.get("choice", "skip") for who, record in records.items()}
        yield item, {who: choice for who, choice in choices.items() if choice != "skip"}


def ratings_of(answers: Answers) -> Iterator[tuple[str, dict[str, float]]]:
    """For each item each annotator's rating, without those who skipped it."""
    for item, records in answers.by_item.items():
        ratings = {who: record.get("rating") for who, record in records.items()}
        yield item, {who: float(x) for who, x in ratings.items() if x is not None}


def lock(descriptor: int, path: Path, *, wait: bool) -> None:
    """Lock an open file; the lock goes with the process, even killed.

    Raises:
        ValueError: another process has it, and wait is False.
    """
    import fcntl  # not everywhere

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError as error:
        raise ValueError(
            f"label: expected {path} not to be in use, got another `fastrl label` writing to it. "
            "Leave that one first, or write to a file of your own."
        ) from error


def _kind_of(record: Record) -> str:
    """ "choice", "rating" or "retracted"; an error for anything else."""
    is_whole = isinstance(record.get("annotator"), str) and isinstance(record.get("id"), str | int)
    rating = record.get("rating", math.nan)
    is_number = isinstance(rating, int | float) and not isinstance(rating, bool)
    kinds = {
        "choice": record.get("choice") in CHOICES,
        "rating": rating is None or (is_number and math.isfinite(rating)),
        "retracted": record.get("retracted") is True,
    }
    found = [kind for kind, is_it in kinds.items() if is_it and is_whole]
    if len(found) != 1:
        shown = json.dumps(record)[:120]
        raise ValueError(
            'judgements: expected "id", "annotator" and a "choice" of a, b, tie or skip, or a '
            f'"rating" that is a number or null, got {shown}. Pass a file of judgements.'
        )
    return found[0]


def _all_parsed(lines: list[bytes], path: Path, first: int) -> list[Record]:
    return [_parsed(line, path, n) for n, line in enumerate(lines, first) if line.strip()]


def _parsed(line: bytes, path: Path, number: int) -> Record:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise _not_records(path, number, line[:40]) from error
    if not isinstance(record, dict):
        raise _not_records(path, number, line[:40])
    return record


def _not_records(path: Path, number: int, got: bytes) -> ValueError:
    return ValueError(
        f"judgements: expected line {number} of {path} to be a JSON object, got "
        f"{got.decode(errors='replace').strip()!r}. Correct the line, or name another file."
    )


def _sync_folder(folder: Path) -> None:
    """The name of a new file is on the disk too."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
