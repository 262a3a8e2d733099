"""Axes: where the ticks go, and what they say."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Axis:
    """Values from `low` to `high` on pixels from `start` to `end`."""

    low: float
    high: float
    start: float
    end: float

    def at(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return round(self.start + share * (self.end - self.start), 2)


def ticks(low: float, high: float, most: int, *, whole: bool = False) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) in [low, high].

    Args:
        most: so many of them, or fewer.
        whole: integers only.
    """
    span = high - low
    step = 10.0 ** math.floor(math.log10(span / most))
    factors = (1, 2, 5, 10, 20, 50, 100)
    step *= next(f for f in factors if span / (f * step) < most)
    if whole:
        step = max(1.0, step)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [index * step for index in range(first, last + 1)]


def limits(values: list[float]) -> tuple[float, float]:
    """A range with room above and below; of one value, around it."""
    low, high = min(values), max(values)
    if high - low <= 1e-9 * max(abs(low), abs(high)):  # a constant, up to rounding
        room = abs(low) * 0.1 or 1.0
    else:
        room = 0.06 * (high - low)
    # What is never negative, as a count or a KL divergence, has no axis below zero.
    return (0.0 if low >= 0 > low - room else low - room), high + room


def tick_labels(values: list[float]) -> list[str]:
    """The same decimals for all, as few as tell them apart."""
    if len(values) < 2:
        return [f"{value:.3g}" for value in values]
    step, largest = values[1] - values[0], max(map(abs, values))
    if largest >= 1e5 or largest < 1e-3:
        power = math.floor(math.log10(largest))
        digits = max(0, power - math.floor(math.log10(step) + 1e-9))
        return [_minus(f"{v:.{digits}e}".replace("e+0", "e").replace("e-0", "e-")) for v in values]
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    return [_minus(f"{value:,.{digits}f}") for value in values]


def _minus(text: str) -> str:
    text = "0" if text.strip("-0.") in ("", "e") else text
    return text.replace("-", "−")
