"""Answers that are not asked for twice: in memory, and in a file that outlives the process."""

import hashlib
import json
import os
from collections import OrderedDict
from collections.abc import Hashable
from pathlib import Path
from typing import Any


def digest(*parts: Any) -> str:
    """A key for parts that JSON knows: 32 hexadecimal digits of a hash over all of them."""
    text = json.dumps(parts, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


class AnswerCache:
    """The answers used last, by key.

    With a file, each new answer is appended to it as a line {"key": ..., "answer": ...}: keys are
    hashes, so that no text stands in it. Lines are written whole, so that several processes may
    share a file; one that was cut short is skipped when the file is read.

    Args:
        owner: whose answers they are, for messages.
        size: answers in memory, at most; 0: none is kept. Those of a file beyond them are asked
            for again.
        file: read now if it is there, and appended to; None: no file.
    Raises:
        ValueError: size is negative; or 0 with a file; or the file is another kind of file.
    """

    def __init__(self, owner: str, size: int, file: str | os.PathLike[str] | None = None) -> None:
        if not isinstance(size, int) or isinstance(size, bool) or size < (file is not None):
            raise ValueError(
                f"{owner}: expected cache_size to be an integer >= 0, and > 0 with a cache_file, "
                f"got {size!r}. Pass how many answers to keep in memory."
            )
        self.size = size
        self._answers: OrderedDict[Hashable, Any] = OrderedDict()
        self._file = None if file is None else Path(file)
        if self._file is not None and self._file.exists():
            self._read(owner, self._file)

    def __len__(self) -> int:
        return len(self._answers)

    def __contains__(self, key: str) -> bool:
        return key in self._answers

    def __getitem__(self, key: str) -> Any:
        self._answers.move_to_end(key)
        return self._answers[key]

    def add(self, answers: dict[str, Any]) -> None:
        """Keep these, of JSON's types, and forget the ones that were not used for longest."""
        if not self.size or not answers:
            return
        for key, answer in answers.items():
            self._keep(key, answer)
        if self._file is not None:
            self._append(self._file, answers)

    def _keep(self, key: str, answer: Any) -> None:
        self._answers[key] = answer
        self._answers.move_to_end(key)
        if len(self._answers) > self.size:
            self._answers.popitem(last=False)

    def _append(self, file: Path, answers: dict[str, Any]) -> None:
        lines = [json.dumps({"key": key, "answer": answer}) for key, answer in answers.items()]
        file.parent.mkdir(parents=True, exist_ok=True)
        with open(file, "ab", buffering=0) as out:
            # After a line that was cut short, a new one begins.
            start = b"" if out.tell() == 0 or _ends_a_line(file) else b"\n"
            out.write(start + "".join(line + "\n" for line in lines).encode())

    def _read(self, owner: str, file: Path) -> None:
        num_lines = num_answers = 0
        with open(file, "rb") as lines:
            for line in lines:
                num_lines += bool(line.strip())
                try:
                    entry = json.loads(line)
                    key, answer = entry["key"], entry["answer"]
                except (ValueError, TypeError, KeyError, RecursionError):
                    continue
                if isinstance(key, str):
                    self._keep(key, answer)
                    num_answers += 1
        if num_lines > 1 and not num_answers:
            raise ValueError(
                f"{owner}: expected cache_file with lines of key and answer, got {file} without "
                "any. Pass the name of a new file."
            )


def _ends_a_line(file: Path) -> bool:
    with open(file, "rb") as lines:
        lines.seek(-1, os.SEEK_END)
        return lines.read(1) == b"\n"
