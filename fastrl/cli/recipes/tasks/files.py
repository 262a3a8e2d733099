"""Files of data sets, and what builders do with lists of rows."""

import gzip
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from fastrl.cli.recipes.toml import RecipeError

Entry = TypeVar("Entry")
SOURCES = {
    "wikitext-2": "github.com/pytorch/examples, folder word_language_model/data/wikitext-2",
    "multi30k": "github.com/multi30k/dataset, folder data/task1/raw",
    "tinyshakespeare": "github.com/karpathy/char-rnn, folder data/tinyshakespeare",
}


def read_text(folder: Path | None, data_set: str, name: str) -> str:
    """A file of a data set, plain or gzipped, from the folder or the data set's own in it.

    Raises:
        RecipeError: it is not there, or cannot be read; says where it can be had.
    """
    remedy = f"It is in {SOURCES[data_set]}; say where you put it: --set data.folder=FOLDER"
    if folder is None:
        raise RecipeError(f"train: expected data.folder with {data_set}/{name}, got none. {remedy}")
    places = [
        place / file for place in (folder / data_set, folder) for file in (name, f"{name}.gz")
    ]
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        raise RecipeError(
            f"train: expected {data_set}/{name} (or .gz) in data.folder, got {folder} without it. "
            f"{remedy}"
        )
    try:
        content = path.read_bytes()
        return (gzip.decompress(content) if path.suffix == ".gz" else content).decode("utf-8")
    except (OSError, EOFError, ValueError) as error:
        raise RecipeError(
            f"train: expected {path} to be text in UTF-8, got {error}. {remedy}"
        ) from error


def spread(entries: Sequence[Entry], count: int, offset: int = 0) -> list[Entry]:
    """At most so many, evenly from the whole list.

    Args:
        offset: how far behind the usual ones; others have none of them in common.
    Raises:
        RecipeError: there are too few for that offset.
    """
    count = min(count, len(entries))
    if offset and not 0 < offset < len(entries) // max(1, count):
        raise RecipeError(
            f"train: expected offset below {len(entries)} rows / {count} held out, got {offset}. "
            "Lower data.arguments.held_out."
        )
    return [entries[i * len(entries) // count + offset] for i in range(count)]


def split_off(entries: Sequence[Entry], share: float, seed: int) -> tuple[list[Entry], list[Entry]]:
    """The others, and a random share of the entries (one at least), each in their order."""
    count = max(1, round(share * len(entries)))
    count = min(count, len(entries))
    chosen = set(random.Random(seed).sample(range(len(entries)), count))
    kept = [entry for i, entry in enumerate(entries) if i not in chosen]
    return kept, [entries[i] for i in sorted(chosen)]


def without(rows: Sequence[dict[str, Any]], *others: Sequence[dict[str, Any]]) -> list[Any]:
    """The rows whose prompt is that of none of the others."""
    known = {row["prompt"] for part in others for row in part}
    return [row for row in rows if row["prompt"] not in known]
