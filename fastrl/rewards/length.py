"""Rewards for completions of a wanted length."""

from collections.abc import Callable, Sequence
from typing import Any

from fastrl.rewards._ngrams import Words
from fastrl.rewards.metric import MetricReward, Reading, References

_UNITS = ("tokens", "words", "characters")


class LengthReward(MetricReward):
    """0 for a completion of a wanted length, less for others; without references.

        minimum ≤ L ≤ maximum: 0;   L < minimum: −(minimum − L) / minimum
                                    L > maximum: −(L − maximum) / maximum

    L is the length. `target` is both bounds. With `soft_maximum` and `cache` it is, or is added to
    that, DAPO's soft overlong punishment:

        L ≤ soft_maximum − cache: 0;   L > soft_maximum: −1
        between: (soft_maximum − cache − L) / cache

    Tokens are counted by completion_ids, EOS included; words stand between white space. The empty
    completion counts as 0 in immediate rewards, so the first of them has the whole fall below
    `minimum`, which the others make good.

    Args:
        unit: "tokens", "words" or "characters".
        target: the wanted length.
        minimum: no shorter.
        maximum: no longer, at least 1.
        soft_maximum: length from which the punishment is −1.
        cache: lengths before it over which the punishment grows.
        immediate, scale, tokenizer, name, cache_size: as `MetricReward` has them; tokens need no
            tokenizer.
    Raises:
        ValueError: no bound at all, target with others, minimum > maximum, another unit, cache
            not in 1 … soft_maximum; and as `MetricReward` does.
    Reference: Yu et al. 2025 (DAPO), arXiv:2503.14476, eq. 13.
    """

    def __init__(
        self,
        unit: str = "tokens",
        target: int | None = None,
        minimum: int | None = None,
        maximum: int | None = None,
        soft_maximum: int | None = None,
        cache: int | None = None,
        *,
        immediate: bool = False,
        scale: float = 1.0,
        tokenizer: Any = None,
        name: str = "length",
        cache_size: int = 4096,
    ) -> None:
        _check(unit, target, minimum, maximum, soft_maximum, cache)
        self.unit = unit
        self.minimum = minimum if target is None else target
        self.maximum = maximum if target is None else target
        self.soft_maximum, self.cache = soft_maximum, cache
        super().__init__(
            _Metric(unit, self.of_length),
            immediate=immediate,
            scale=scale,
            reference=None,
            tokenizer=tokenizer,
            name=name,
            cache_size=cache_size,
        )

    def of_length(self, length: int) -> float:
        """The score of a completion of this length, without `scale`."""
        score = 0.0
        if self.minimum is not None and length < self.minimum:
            score -= (self.minimum - length) / self.minimum
        if self.maximum is not None and length > self.maximum:
            score -= (length - self.maximum) / self.maximum
        if self.soft_maximum is not None and self.cache is not None:
            over = length - (self.soft_maximum - self.cache)
            score -= min(1.0, max(0.0, over / self.cache))
        return score

    def score(self, text: str, references: Sequence[str] | str = ()) -> float:
        """The score of a text, which has no length in tokens."""
        if self.unit == "tokens":
            raise ValueError(
                'LengthReward: expected unit "words" or "characters" to score a text, got '
                '"tokens". Call of_length.'
            )
        return super().score(text, references)

    def _cuts_text(self) -> bool:
        return self.unit != "tokens"

    def _whole(self, completion: Any, ids: Sequence[int], references: References) -> float:
        if self.unit == "tokens":
            return self.of_length(len(ids))
        return super()._whole(completion, ids, references)

    def _prefixes(
        self, completion: Any, ids: Sequence[int], references: References
    ) -> Sequence[float]:
        if self.unit == "tokens":
            return [self.of_length(length) for length in range(len(ids) + 1)]
        return super()._prefixes(completion, ids, references)


def _check(
    unit: str,
    target: int | None,
    minimum: int | None,
    maximum: int | None,
    soft_maximum: int | None,
    cache: int | None,
) -> None:
    def error(expected: str, got: Any, remedy: str) -> ValueError:
        return ValueError(f"LengthReward: expected {expected}, got {got}. {remedy}")

    if unit not in _UNITS:
        raise error(f"unit one of {_UNITS}", repr(unit), "Leave it out for tokens.")
    bounds = (minimum, maximum)
    if target is None and bounds == (None, None) and soft_maximum is None:
        raise error(
            "target, minimum, maximum or soft_maximum", "none", "Say which length is wanted."
        )
    if target is not None and bounds != (None, None):
        raise error("target without minimum and maximum", bounds, "Pass one or the others.")
    low, high = (minimum, maximum) if target is None else (target, target)
    if (high is not None and high < 1) or (low is not None and low < 0):
        raise error("minimum >= 0, maximum and target >= 1", (low, high), "Lengths are counts.")
    if low is not None and high is not None and low > high:
        raise error("minimum <= maximum", (low, high), "Swap them.")
    if (soft_maximum is None) != (cache is None):
        raise error("soft_maximum and cache together", (soft_maximum, cache), "Pass both.")
    if soft_maximum is not None and cache is not None and not 1 <= cache <= soft_maximum:
        raise error(f"cache in 1 ... soft_maximum = {soft_maximum}", cache, "DAPO has a quarter.")


class _Metric:
    def __init__(self, unit: str, of_length: Callable[[int], float]) -> None:
        self._unit, self._of_length = unit, of_length

    def against(self, references: References) -> Callable[[], Reading]:
        reading = _InWords if self._unit == "words" else _InCharacters
        return lambda: reading(self._of_length)


class _InCharacters:
    def __init__(self, of_length: Callable[[int], float]) -> None:
        self._of_length, self._length = of_length, 0

    def read(self, piece: str) -> None:
        self._length += len(piece)

    def score(self) -> float:
        return self._of_length(self._length)


class _InWords:
    def __init__(self, of_length: Callable[[int], float]) -> None:
        self._of_length, self._words, self._length = of_length, Words(), 0

    def read(self, piece: str) -> None:
        self._length += len(self._words.read(piece))

    def score(self) -> float:
        return self._of_length(self._length + len(self._words.last()))
