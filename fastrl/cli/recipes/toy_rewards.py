"""Rewards for recipes that are tried out: known at once, and learned within seconds."""

import string
from typing import Any

_LETTERS = frozenset(string.ascii_lowercase + " ")
_VOWELS = frozenset("aeiou")


def lower_case(completions: list[str], **columns: Any) -> list[float]:
    """The share of a completion's characters that are lower-case letters or blanks, in [0, 1]."""
    return [sum(c in _LETTERS for c in text) / max(1, len(text)) for text in completions]


def vowels(completions: list[str], **columns: Any) -> list[float]:
    """The share of a completion's characters that are vowels, in [0, 1]."""
    return [sum(c in _VOWELS for c in text) / max(1, len(text)) for text in completions]
