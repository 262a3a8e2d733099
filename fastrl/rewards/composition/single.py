"""One reward, changed: clipped, scaled, or normalised by running statistics."""

import math
from collections.abc import Callable

from fastrl.rewards._calling import distinct_names
from fastrl.rewards._moments import Moments, divided
from fastrl.rewards.composition._composition import Batch, Composition, Part
from fastrl.rewards.composition._entries import Entry, is_usable, numbers_of, weighted_sum
from fastrl.rewards.composition._normalizer import checked_decay


class _Single(Composition):
    """A composition of one part."""

    def __init__(self, part: Part, name: str | None, prefix: str) -> None:
        parts = [part]
        super().__init__(parts, name or f"{prefix}_{distinct_names(parts)[0]}")


class Clipped(_Single):
    """Each number that the part gives, a completion's or an id's, within [low, high].

    NaN and infinity stay as they are: they are errors, not large rewards. What else holds is in
    `Composition`.

    Args:
        part: a reward function.
        low, high: may be infinite.
        name: what metrics call it; None: "clipped_" and the part's name.
    Raises:
        ValueError: low is above high, or one is NaN.
    """

    def __init__(self, part: Part, low: float, high: float, *, name: str | None = None) -> None:
        super().__init__(part, name, "clipped")
        if not low <= high:
            raise ValueError(
                f"Clipped: expected low <= high, got {low} and {high}. Pass -inf or inf for a "
                "side without a bound."
            )
        self.low, self.high = float(low), float(high)

    def _combined(self, given: dict[str, list[Entry]], batch: Batch) -> list[Entry]:
        (entries,) = given.values()
        return [_mapped(entry, lambda x: _clipped(x, self.low, self.high)) for entry in entries]


class Scaled(_Single):
    """factor · s + offset for each completion; in a list, the offset stands at the last id that
    the policy wrote.

    What else holds is in `Composition`.

    Args:
        part: a reward function.
        factor, offset: finite.
        name: what metrics call it; None: "scaled_" and the part's name.
    Raises:
        ValueError: factor or offset is not finite.
    """

    def __init__(
        self, part: Part, factor: float = 1.0, offset: float = 0.0, *, name: str | None = None
    ) -> None:
        super().__init__(part, name, "scaled")
        if not math.isfinite(factor) or not math.isfinite(offset):
            raise ValueError(
                f"Scaled: expected factor and offset finite, got {factor} and {offset}. Pass "
                "numbers."
            )
        self.factor, self.offset = float(factor), float(offset)

    def _combined(self, given: dict[str, list[Entry]], batch: Batch) -> list[Entry]:
        (entries,) = given.values()
        factors = (self.factor, self.offset)
        return [
            None if entry is None else weighted_sum((entry, 1.0), factors, last)
            for entry, last in zip(entries, batch.lasts, strict=True)
        ]


class RunningNormalized(_Single):
    """(x - mean) / deviation of each number x that the part gives, a completion's or an id's.

    Mean and deviation are of all finite numbers of all calls so far, this one's included, which
    are taken in first; n in the deviation's denominator. With a decay, numbers of k calls ago
    weigh decay^k. A call without finite numbers changes nothing. The statistics are saved with
    the run, and an evaluation leaves them as they were. What is normalised here is what is
    given, so lists get deviation 1 id by id: NormalizedSum does it by completion. A mean taken off
    each id counts as often as there are ids: above 0 it rewards an early end, below 0 a late one.
    center=False leaves that alone.

    While all numbers so far are equal but for rounding, they become 0; with center=False they
    stay as they are, as there is no scale yet. NaN and infinity are not counted and not clipped.
    What else holds is in `Composition`.

    Args:
        part: a reward function.
        decay: in (0, 1), or None to forget nothing.
        clip: bound of the result's magnitude, above 0, or None.
        center: False: x / deviation, which keeps the sign.
        name: what metrics call it; None: "normalized_" and the part's name.
    Raises:
        ValueError: decay or clip is out of range.
    Reference: Welford 1962, Technometrics 4(3); merged as in Chan et al. 1983.
    """

    def __init__(
        self,
        part: Part,
        decay: float | None = None,
        clip: float | None = None,
        center: bool = True,
        *,
        name: str | None = None,
    ) -> None:
        super().__init__(part, name, "normalized")
        if clip is not None and not clip > 0:
            raise ValueError(
                f"RunningNormalized: expected clip above 0, got {clip}. Pass None for no bound."
            )
        self.decay, self.clip, self.center = checked_decay(self._op, decay), clip, center
        self._moments = self._remembered["statistics"] = Moments()

    def _combined(self, given: dict[str, list[Entry]], batch: Batch) -> list[Entry]:
        (entries,) = given.values()
        numbers = [x for entry in entries for x in numbers_of(entry) if is_usable(x)]
        self._moments.merge(numbers, list(map(abs, numbers)), self.decay)
        mean, deviation = self._moments.mean, self._moments.deviation(sample=False)
        bound = math.inf if self.clip is None else self.clip

        def normalized(x: float) -> float:
            if self.center:
                x = divided(x - mean, deviation)
            elif deviation > 0:
                x /= deviation
            return _clipped(x, -bound, bound)

        return [_mapped(entry, normalized) for entry in entries]


def _mapped(entry: Entry, function: Callable[[float], float]) -> Entry:
    if isinstance(entry, list):
        return [function(x) for x in entry]
    return None if entry is None else function(entry)


def _clipped(x: float, low: float, high: float) -> float:
    return min(max(x, low), high) if math.isfinite(x) else x
