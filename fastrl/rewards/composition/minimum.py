"""The worst of several rewards."""

import math
from collections import Counter

from fastrl.rewards.composition._composition import Batch, Composition, Parts
from fastrl.rewards.composition._entries import Entry, is_usable, magnitude, total
from fastrl.rewards.composition._normalizer import Normalizer


class Minimum(Composition):
    """reward = min_k s_k over the parts k that have an opinion: none can be traded for another.

    s_k is a completion's total of part k, raw or normalised as in NormalizedSum. The completion
    gets what the worst part gave it, list or number; of equal ones, the first. Where any part gave
    NaN or infinity, or what float32 cannot hold, the completion gets NaN. The share of completions
    at which a part is the worst is logged as "rewards/<name>/<part>/share", of those that get a
    finite reward. What else holds is in `Composition`.

    Args:
        parts: reward functions, in a list or by name.
        over: None for raw totals, or "batch", "group" or "running", see NormalizedSum.
        decay: in (0, 1), or None to forget nothing; for "running" alone.
        name: what metrics call it.
    Raises:
        ValueError, TypeError: an argument does not fit.
    """

    def __init__(
        self,
        parts: Parts,
        *,
        over: str | None = None,
        decay: float | None = None,
        name: str = "minimum",
    ) -> None:
        super().__init__(parts, name)
        if over is None and decay is not None:
            raise ValueError(
                f'{self._op}: expected decay None without over = "running", got {decay}. Only '
                "running statistics have something to forget."
            )
        self._normalizer: Normalizer | None = None
        if over is not None:
            self._normalizer = Normalizer(self._op, list(self.parts), over, decay)
            self._remembered["statistics"] = self._normalizer

    def _combined(self, given: dict[str, list[Entry]], batch: Batch) -> list[Entry]:
        if self._normalizer is not None:
            given = {
                part: self._normalizer(part, entries, batch) for part, entries in given.items()
            }
        found: list[Entry] = []
        worst = Counter[str]()
        for i in range(len(batch.lengths)):
            row = ((part, entries[i]) for part, entries in given.items())
            opinions = {part: entry for part, entry in row if entry is not None}
            if not opinions:
                found.append(None)
            elif not all(is_usable(magnitude(entry)) for entry in opinions.values()):
                found.append(math.nan)
            else:
                part, entry = min(opinions.items(), key=lambda opinion: total(opinion[1]))
                worst[part] += 1
                found.append(entry)
        for part in given:
            share = worst[part] / worst.total() if worst else math.nan
            batch.log(part, "share", share)
        return found
