"""Pairs of completions, one of them preferred, as people judge them and as ids."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from fastrl.ops._checks import fail, wrong_type
from fastrl.rewards.preference.texts import Encoder, Ids


@dataclass(frozen=True)
class Pair:
    """One judgement.

    Attributes:
        prompt, chosen, rejected: token ids.
        margin: what the chosen one's score has to lead by, nats.
        is_tie: neither is preferred.
    """

    prompt: Ids
    chosen: Ids
    rejected: Ids
    margin: float
    is_tie: bool


def checked_pairs(op: str, pairs: Iterable[Any]) -> list[Mapping[str, Any]]:
    """The pairs as a list of mappings with what is needed.

    Raises:
        ValueError: none at all, a missing column, or a margin that is no number >= 0.
        TypeError: an entry that is no mapping, or a tie that is neither true nor false.
    """
    listed = list(pairs)
    columns = '"prompt", "chosen" and "rejected"'
    if not listed:
        raise fail(op, "pairs, one at least", "none", f"Pass dicts with {columns}.")
    for index, pair in enumerate(listed):
        if not isinstance(pair, Mapping):
            got = type(pair).__name__
            raise wrong_type(op, f"pairs[{index}] a dict", got, f"It has {columns}.")
        missing = [name for name in ("prompt", "chosen", "rejected") if name not in pair]
        if missing:
            got, remedy = f"no {missing[0]!r} among {sorted(map(str, pair))}", "Rename the columns."
            raise fail(op, f"pairs[{index}] with {columns}", got, remedy)
        margin = pair.get("margin")
        is_number = isinstance(margin, int | float) and not isinstance(margin, bool)
        if margin is not None and not (is_number and 0 <= margin < math.inf):
            got, remedy = repr(margin), "Swap chosen and rejected where it is negative."
            raise fail(op, f'pairs[{index}]["margin"] a number >= 0', got, remedy)
        if not isinstance(pair.get("tie") or False, bool):
            got, remedy = repr(pair["tie"]), "Leave it out where one is preferred."
            raise wrong_type(op, f'pairs[{index}]["tie"] true or false', got, remedy)
    return listed


def encoded_pairs(op: str, pairs: Iterable[Any], encoder: Encoder) -> list[Pair]:
    """The pairs as ids; see `checked_pairs` and `Encoder` for the errors."""
    return [
        Pair(
            encoder.prompt(pair["prompt"], f"pairs[{index}] prompt"),
            encoder.completion(pair["chosen"], f"pairs[{index}] chosen"),
            encoder.completion(pair["rejected"], f"pairs[{index}] rejected"),
            float(pair.get("margin") or 0.0),
            bool(pair.get("tie")),
        )
        for index, pair in enumerate(checked_pairs(op, pairs))
    ]
