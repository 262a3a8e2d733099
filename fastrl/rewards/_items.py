"""The files of what people judge: pairs of completions, and completions."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastrl.rewards._judgements import content_id
from fastrl.rewards._record_file import Record, read_records
from fastrl.rewards._texts import prompt_text, text_of


def read_pairs(path: str | Path) -> list[Record]:
    """Rows {"id"?, "prompt", "a", "b"}; one without an id gets the hash of its content.

    Of rows that are the same the first one stands.

    Raises:
        ValueError: a row lacks something, or two different ones have the same id.
        OSError: the file cannot be read.
    """
    return _read(path, ("prompt", "a", "b"))


def read_completions(path: str | Path) -> list[Record]:
    """Rows {"id"?, "prompt", "completion"}, as `read_pairs`; requests that were closed count."""
    return _read(path, ("prompt", "completion"))


def _read(path: str | Path, names: Sequence[str]) -> list[Record]:
    rows: dict[str, Record] = {}
    for number, row in enumerate(read_records(path), 1):
        if row.get("closed") is True and "id" in row:  # of a HumanReward's requests
            continue
        texts = _texts(row, names, f"record {number} of {path}")
        identity = str(row["id"]) if row.get("id") is not None else content_id(*texts)
        before = rows.setdefault(identity, {**row, "id": identity})
        if _texts(before, names, "") != texts:
            raise ValueError(
                f"judgements: expected every id of {path} once, got {identity} again in record "
                f"{number} with other texts. Leave ids out to have them made of the content."
            )
    return list(rows.values())


def _texts(row: Record, names: Sequence[str], where: str) -> list[str]:
    missing = [name for name in names if name not in row]
    if missing:
        wanted = ", ".join(f'"{name}"' for name in names)
        raise ValueError(
            f"judgements: expected {wanted} in {where}, got {', '.join(row) or 'nothing'}. "
            "Rename what holds them."
        )
    try:
        return [_text(row, name) for name in names]
    except TypeError as error:
        raise ValueError(f"judgements: expected texts in {where}, got another: {error}") from error


def _text(row: Record, name: str) -> str:
    return prompt_text(row[name]) if name == "prompt" else text_of(row[name])


def texts_of(row: Record, *names: str) -> dict[str, Any]:
    """The texts under these names."""
    return {name: _text(row, name) for name in names}
