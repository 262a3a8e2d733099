"""What people said of items, in files of JSON lines: judgements and ratings.

    {"id": "9f3a…", "annotator": "ada", "choice": "a" | "b" | "tie" | "skip", "time": "2026-…"}
    {"id": "9f3a…", "annotator": "ada", "rating": 4 or null where it was skipped, "time": "2026-…"}
    {"id": "9f3a…", "annotator": "ada", "retracted": true, "time": "2026-…"}

Nothing is ever rewritten: of two lines of one annotator on one item the later one stands.
"""

import hashlib
import json
import sys
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from fastrl.rewards._record_file import Record, read_records

CHOICES = ("a", "b", "tie", "skip")


def content_id(*parts: Any) -> str:
    """16 hexadecimal digits that are the same for the same content."""
    text = json.dumps(parts, ensure_ascii=True, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def now() -> str:
    """The time, UTC, to the second."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


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


def _kind_of(record: Record) -> str:
    """ "choice", "rating" or "retracted"; an error for anything else."""
    is_whole = isinstance(record.get("annotator"), str) and isinstance(record.get("id"), str | int)
    rating = record.get("rating", "none")
    is_number = isinstance(rating, int | float) and not isinstance(rating, bool)
    kinds = {
        "choice": record.get("choice") in CHOICES,
        "rating": rating is None or (is_number and abs(rating) <= sys.float_info.max),
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
