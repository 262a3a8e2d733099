"""Lines of a chart: a key's values by step, smoothed, and thinned to what can be seen."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from fastrl.cli.reporting.numbers import is_number

MOST_POINTS = 600  # in a line, as wide as a chart is in pixels; more cannot be seen
FEWEST_TO_SMOOTH = 20
SHARE = 15  # a running mean is over this part of a line's points


@dataclass(frozen=True, kw_only=True)
class Line:
    """A line of a chart.

    Attributes:
        name: in the legend.
        xs, ys: its points; None leaves a gap.
        color: index of the page's colours.
        dash: index of the page's dashes: what tells lines apart without colours.
        label: a letter at its end, or nothing.
        half_widths: of an interval around each point; empty: none.
        is_smooth: whether a running mean is drawn over faint points.
        has_marks: whether each point has a mark.
        has_line: whether its points are joined.
    """

    name: str
    xs: list[float]
    ys: list[float | None]
    color: int = 0
    dash: int = 0
    label: str = ""
    half_widths: list[float] = field(default_factory=list)
    is_smooth: bool = True
    has_marks: bool = False
    has_line: bool = True

    @property
    def smoothed(self) -> list[float | None]:
        return running_mean(self.ys, self.window)

    @property
    def window(self) -> int:
        """Points in a running mean; 1: none is taken."""
        count = len(self.ys)
        return max(3, count // SHARE) if self.is_smooth and count >= FEWEST_TO_SMOOTH else 1


def values_of(
    records: Sequence[dict[str, Any]], key: str, x: str = "step"
) -> tuple[list[float], list[float | None]]:
    """A key by step over the records that have it; None for null, NaN and infinity."""
    pairs = [(r[x], r[key] if is_number(r[key]) else None) for r in records if key in r]
    return [float(a) for a, _ in pairs], [b for _, b in pairs]


def running_mean(values: Sequence[float | None], window: int) -> list[float | None]:
    """The mean of the `window` values around each, or of those there are; None stays None."""
    if window <= 1:
        return list(values)
    before, after = (window - 1) // 2, window // 2
    sums, counts = [0.0], [0]
    for value in values:
        sums.append(sums[-1] + (value or 0.0))
        counts.append(counts[-1] + (value is not None))
    means: list[float | None] = []
    for index, value in enumerate(values):
        low, high = max(0, index - before), min(len(values), index + after + 1)
        count = counts[high] - counts[low]
        means.append(None if value is None else (sums[high] - sums[low]) / count)
    return means


def thinned(
    xs: Sequence[float], ys: Sequence[float | None], most: int = MOST_POINTS
) -> list[tuple[float, float | None]]:
    """At most about `most` points: of each stretch its lowest and highest, and a gap if it is all.

    So no peak is lost.
    """
    points = list(zip(xs, ys, strict=True))
    if len(points) <= most:
        return points
    size = math.ceil(len(points) / (most // 2))
    kept: list[tuple[float, float | None]] = []
    for start in range(0, len(points), size):
        part = points[start : start + size]
        indices = [i for i, (_, y) in enumerate(part) if y is not None]
        if not indices:
            kept.append(part[0])
            continue
        ends = {f(indices, key=lambda i: part[i][1] or 0.0) for f in (min, max)}
        kept += [part[i] for i in sorted(ends)]
    return kept
