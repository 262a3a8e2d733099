"""JSON lines that people and programs write one at a time, and that others read meanwhile.

A line is written when its newline is; what stands behind the last newline was cut short by a kill.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastrl._disk import sync

Record = dict[str, Any]


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
                sync(self.path.parent)
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

    def __exit__(self, *_: object) -> None:
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
