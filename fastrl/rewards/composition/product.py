"""The product of rewards."""

import math

from fastrl.rewards.composition._composition import Batch, Composition, Parts
from fastrl.rewards.composition._entries import Entry


class Product(Composition):
    """reward = Π_k s_k over the parts k that have an opinion, as where one is a gate of 0 and 1.

    One part may give a list for a completion: each of its numbers is multiplied by the others'.
    What else holds is in `Composition`.

    Args:
        parts: reward functions, in a list or by name.
        name: what metrics call it.
    Raises:
        ValueError, TypeError: an argument does not fit; TypeError in a call where several parts
            give a list for one completion.
    """

    def __init__(self, parts: Parts, *, name: str = "product") -> None:
        super().__init__(parts, name)

    def _combined(self, given: dict[str, list[Entry]], batch: Batch) -> list[Entry]:
        return [
            self._product({part: entries[i] for part, entries in given.items()}, i)
            for i in range(len(batch.lengths))
        ]

    def _product(self, entries: dict[str, Entry], index: int) -> Entry:
        numbers = [entry for entry in entries.values() if isinstance(entry, float)]
        lists = {part: entry for part, entry in entries.items() if isinstance(entry, list)}
        if len(lists) > 1:
            raise TypeError(
                f"{self._op}: expected at most one part with a list for a completion, got lists of "
                f"{' and '.join(lists)} for completion {index}. Let all but one give floats."
            )
        factor = math.prod(numbers)
        if lists:
            return [factor * value for value in next(iter(lists.values()))]
        return factor if numbers else None
