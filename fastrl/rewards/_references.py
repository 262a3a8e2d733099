"""The references of completions, as they stand in a column of the dataset."""

from collections.abc import Mapping
from typing import Any

References = tuple[str, ...]
# What trainers pass besides.
_NO_COLUMNS = {"is_target", "trainer_state", "log_metric", "log_extra"}


def references_in(columns: Mapping[str, Any], name: str, op: str) -> list[References | None]:
    """The texts in the column, one or more for each completion; None for no opinion on it.

    Raises:
        ValueError: there is no such column, or an entry is neither a text, nor a list of at least
            one, nor None.
    """
    given = columns.get(name)
    if given is None:
        raise ValueError(
            f"{op}: expected a column {name!r} with references, got columns "
            f"{sorted(columns.keys() - _NO_COLUMNS)}. Add it to the dataset, or name it: "
            "reference=."
        )
    return [_checked(entry, name, op, index) for index, entry in enumerate(given)]


def _checked(entry: Any, name: str, op: str, index: int) -> References | None:
    if entry is None or isinstance(entry, str):
        return None if entry is None else (entry,)
    entry = entry.tolist() if hasattr(entry, "tolist") else entry  # numpy's, from tables
    if isinstance(entry, list | tuple) and entry and all(isinstance(x, str) for x in entry):
        return tuple(entry)
    raise ValueError(
        f"{op}: expected column {name!r} of texts, lists of at least one text, or None, got "
        f"{entry!r} for completion {index}. Repair the dataset."
    )
