"""Prompts from files, lists and datasets."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastrl.cli.recipes.toml import RecipeError

SUFFIXES = (".jsonl", ".json", ".txt")


def load_prompts(
    source: str | list[str],
    *,
    key: str,
    column: str = "prompt",
    limit: int | None = None,
    split: str = "train",
    subset: str | None = None,
) -> Any:
    """Entries for a trainer: dicts with "prompt" and further columns, or a Dataset of them.

    Args:
        source: texts; a file .jsonl (objects, or texts), .json (a list of these) or .txt (a
            prompt a line, empty lines left out); else a name for datasets.load_dataset.
        key: what the source is called in a message.
        column: which column is the prompt.
        limit: the first so many alone.
        split, subset: of a dataset by name.
    Raises:
        RecipeError: not there, damaged, empty, or without the column; with file and line.
    """
    if isinstance(source, list):
        return [{"prompt": text} for text in source[:limit]]
    path = Path(source)
    if is_dataset(source):
        if path.is_file():
            suffixes = ", ".join(SUFFIXES)
            raise _bad(key, f"to be a file {suffixes}, got {path}", "Write it as one of these")
        return _dataset(source, key, column, limit, split, subset)
    readers = dict(zip(SUFFIXES, (_json_lines, _json, _lines), strict=True))
    try:
        entries = readers[path.suffix](path.read_text(encoding="utf-8-sig"), f"{key} {path}")
    except OSError as error:
        raise _bad(key, f"to be a file that can be read, got {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        got = f"byte {error.object[error.start]:#04x} at offset {error.start}"
        raise _bad(f"{key} {path}", f"to be text in UTF-8, got {got}") from error
    if not entries:
        raise _bad(f"{key} {path}", "to hold at least one prompt, got none")
    names_it = "--column" if key.startswith("--") else "data.column"
    rows = [_entry(entry, place, column, names_it) for place, entry in entries[:limit]]
    # As in a table: a function that names a column gets it, wherever a step's prompts stand.
    columns = dict.fromkeys(name for row in rows for name in row)
    return [{**dict.fromkeys(columns), **row} for row in rows]


def is_dataset(source: Any) -> bool:
    """Whether prompts are those of a dataset by name, which alone has splits and subsets."""
    return isinstance(source, str) and Path(source).suffix not in SUFFIXES


def is_split(text: str) -> bool:
    """Names of splits have neither a folder nor a suffix: "test", "train[90%:]"."""
    return "/" not in text and "." not in text


def _json_lines(text: str, what: str) -> list[tuple[str, Any]]:
    entries = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                entries.append((f"{what}, line {number},", json.loads(line)))
            except ValueError as error:
                raise _bad(f"{what}, line {number},", f"to be JSON, got {error}") from error
    return entries


def _json(text: str, what: str) -> list[tuple[str, Any]]:
    try:
        document = json.loads(text)
    except ValueError as error:
        raise _bad(what, f"to be JSON, got {error}") from error
    if not isinstance(document, list):
        raise _bad(what, f"to be a list of prompts, got {type(document).__name__}")
    return [(f"{what}, entry {index},", entry) for index, entry in enumerate(document)]


def _lines(text: str, what: str) -> list[tuple[str, Any]]:
    lines = enumerate(text.split("\n"), 1)  # splitlines would cut at U+2028 and the like too
    return [(f"{what}, line {number},", line) for number, line in lines if line.strip()]


def _entry(entry: Any, place: str, column: str, names_it: str) -> dict[str, Any]:
    try:
        json.dumps(entry, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        got = repr(error.object[error.start : error.end])
        raise _bad(place, f"to be text that UTF-8 has, got half a character, {got}") from error
    if isinstance(entry, str) and entry:
        return {"prompt": entry}
    if not isinstance(entry, dict):
        raise _bad(place, f"to be a text or an object, got {entry!r}")
    if column not in entry:
        raise _bad(place, f'to have "{column}", got {_listed(entry)}', f"{names_it} names it")
    columns = {name: value for name, value in entry.items() if name != column}
    return {**columns, "prompt": entry[column]}


def _dataset(
    name: str, key: str, column: str, limit: int | None, split: str, subset: str | None
) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise _bad(
            key,
            f"to be a file .jsonl, .json or .txt, got {name}",
            "A dataset by name needs `pip install datasets`",
        ) from error
    try:
        dataset = datasets.load_dataset(name, subset, split=split)
    except Exception as error:  # of the network, of the hub, of the dataset's own files
        raise _bad(
            key, f"to be a dataset that can be loaded, got {name} (split {split}): {error}"
        ) from error
    if column not in dataset.column_names:
        columns = _listed(dataset.column_names)
        names_it = "--column" if key.startswith("--") else "data.column"
        raise _bad(f"{key} {name}", f'to have "{column}", got {columns}', f"{names_it} names it")
    if column != "prompt":
        if "prompt" in dataset.column_names:
            dataset = dataset.remove_columns("prompt")
        dataset = dataset.rename_column(column, "prompt")
    return dataset if limit is None else dataset.select(range(min(limit, len(dataset))))


def _listed(names: Sequence[str] | dict[str, Any]) -> str:
    return ", ".join(f'"{name}"' for name in names) or "nothing"


def _bad(what: str, expected: str, remedy: str = "") -> RecipeError:
    stop = "" if expected.endswith(".") else "."
    return RecipeError(f"train: expected {what} {expected}{stop} {remedy or 'Correct it'}.")
