"""What a run learns from, as digests: its rows, and the files of its own code.

A recipe names files, and a run that goes on would not notice that somebody has changed them since:
other rows are another run, other code may be a repair, and is said.
"""

import hashlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastrl.cli.recipes.data import TaskData
from fastrl.cli.recipes.schema import Recipe
from fastrl.cli.training.run_folder import RunFolderError
from fastrl.trainers.prompts import canonical

LEARNED = ("train", "supervised", "validation", "calibration")  # lists of TaskData
MEASURED = "held_out"
_MOST = 100_000  # rows that are read of a dataset on the disk, evenly from all


def contents_of(recipe: Recipe, data: TaskData) -> dict[str, Any]:
    """The entries "rows" and "code" of versions.json: digests by list, and by file or module."""
    lists = {name: getattr(data, name) for name in (*LEARNED, MEASURED)}
    watching = recipe.over_optimization
    named = [*recipe.rewards.functions, watching.gold, watching.proxy, recipe.data.builder]
    files = {name: _file_of(name) for name in sorted(set(_names(named)))}
    return {
        "rows": {name: _digest_of_rows(rows) for name, rows in lists.items() if rows},
        "code": {name: _digest(path.read_bytes()) for name, path in files.items() if path},
    }


def check_contents(path: Path, was: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What is to be said of what has changed since; versions of fastrl that noted nothing say so.

    Args:
        path: of versions.json, for the message.
        was, now: as `contents_of` gives them.
    Raises:
        RunFolderError: other rows are learned from.
    """
    rows, others = was.get("rows", {}), now["rows"]
    changed = [name for name in LEARNED if rows and rows.get(name) != others.get(name)]
    if changed:
        raise RunFolderError(
            f"train: expected the rows that the run was begun with, got other {changed[0]} rows. "
            f"Put the old ones back, start a new run, or delete {path} to go on with these."
        )
    found = []
    if rows and rows.get(MEASURED) != others.get(MEASURED):
        found.append("the held-out rows are others than before: evaluations cannot be compared")
    for name, digest in was.get("code", {}).items():
        if now["code"].get(name, digest) != digest:
            found.append(f"{name} has been changed since: from here on it is the new code")
    return found


def _names(entry: Any) -> Iterator[str]:
    """The modules and files in entries like those of rewards.functions."""
    if isinstance(entry, dict | list):
        for each in entry.values() if isinstance(entry, dict) else entry:
            yield from _names(each)
    elif isinstance(entry, str) and ":" in entry:
        yield entry.rpartition(":")[0]


def _file_of(name: str) -> Path | None:
    """The source of a file or a loaded module; None of fastrl's own, which has its version."""
    module = sys.modules.get(name)
    found = Path(name) if name.endswith(".py") else Path(getattr(module, "__file__", None) or ".")
    return found if found.is_file() and name.partition(".")[0] != "fastrl" else None


def _digest_of_rows(rows: Any) -> str:
    count = len(rows)
    is_read = isinstance(rows, list | tuple) or count <= _MOST
    indices = range(count) if is_read else (i * count // _MOST for i in range(_MOST))
    digest = hashlib.sha256(str(count).encode())
    for index in indices:
        digest.update(canonical(rows[index]))
    return digest.hexdigest()[:16]


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
