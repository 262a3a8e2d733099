"""What a part gave for a batch, checked: one entry for each completion."""

import math
from collections.abc import Sequence
from typing import Any

from fastrl.rewards._calling import as_float

# A number: the reward of the whole completion. A list: one reward for each of its ids, at least
# one. None: no opinion.
Entry = float | list[float] | None

# What float32 cannot hold, the trainer does not learn from: nor do statistics.
_LARGEST = 3.4028234663852886e38


def checked(result: Any, lengths: Sequence[int], op: str, part: str) -> list[Entry]:
    """The entries in what a part returned; lists of no ids have become 0.

    Args:
        result: what the part returned.
        lengths: number of ids of each completion.
        op, part: names for the message.
    Raises:
        ValueError: the list, or an entry of it, is of the wrong length.
        TypeError: an entry is neither a number, nor a list of numbers, nor None.
    """
    result = _plain(result)
    if not _is_list(result) or len(result) != len(lengths):
        got = len(result) if _is_list(result) else type(result).__name__
        raise ValueError(
            f"{op}: expected part {part} to give a list of {len(lengths)} rewards, one for each "
            f"completion, got {got}. Return one entry for each completion."
        )
    return [
        _entry(_plain(entry), length, f"{op}: expected part {part} to give", index)
        for index, (entry, length) in enumerate(zip(result, lengths, strict=True))
    ]


def _entry(entry: Any, length: int, expected: str, index: int) -> Entry:
    if entry is None:
        return None
    if isinstance(entry, int | float):
        return float(as_float(entry))
    if not _is_list(entry):
        raise TypeError(
            f"{expected} floats, lists of floats or None, got {type(entry).__name__} for "
            f"completion {index}. Return a number."
        )
    if len(entry) != length:
        raise ValueError(
            f"{expected} {length} rewards for completion {index}, one for each of its "
            f"completion_ids, got {len(entry)}. Count the EOS and the tokens of tools too, or "
            "return one float."
        )
    try:
        return [float(as_float(value)) for value in entry] or 0.0
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"{expected} numbers for the tokens of completion {index}, got {error}. Return "
            "floats; None stands only for a whole completion."
        ) from error


def numbers_of(entry: Entry) -> list[float]:
    """The numbers in it: none, one, or one for each id."""
    if entry is None:
        return []
    return entry if isinstance(entry, list) else [entry]


def total(entry: float | list[float]) -> float:
    """The completion's reward in all; inf or NaN as IEEE has it."""
    if not isinstance(entry, list):
        return entry
    return math.fsum(entry) if all(map(math.isfinite, entry)) else sum(entry)


def magnitude(entry: float | list[float]) -> float:
    """The sum of the magnitudes of its numbers."""
    return sum(map(abs, numbers_of(entry)))


def is_usable(number: float) -> bool:
    """Whether it is finite in float32; False for NaN."""
    return abs(number) <= _LARGEST


def usable_totals(entries: Sequence[Entry]) -> tuple[list[float], list[float]]:
    """Totals and magnitudes of those completions that statistics count: rewarded, and finite."""
    given = [entry for entry in entries if entry is not None and is_usable(magnitude(entry))]
    return [total(entry) for entry in given], [magnitude(entry) for entry in given]


def weighted_sum(entries: Sequence[Entry], weights: Sequence[float], last: int) -> Entry:
    """One completion's sum over its parts, those without an opinion left out; beside lists,
    numbers stand at the id `last`."""
    number: float | None = None
    row: list[float] | None = None
    for entry, weight in zip(entries, weights, strict=True):
        if isinstance(entry, list):
            terms = [weight * value for value in entry]
            row = terms if row is None else [a + b for a, b in zip(row, terms, strict=True)]
        elif entry is not None:
            number = weight * entry if number is None else number + weight * entry
    if row is None:
        return number
    if number is not None:
        row[last] += number
    return row


def _plain(given: Any) -> Any:
    return given.tolist() if hasattr(given, "tolist") else given


def _is_list(given: Any) -> bool:
    return isinstance(given, Sequence) and not isinstance(given, str)
