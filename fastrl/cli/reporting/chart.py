"""A chart as SVG that reads well on its own: axes, lines, gaps, intervals, alarms."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from fastrl.cli.reporting.axes import Axis, limits, tick_labels, ticks
from fastrl.cli.reporting.numbers import escape, number
from fastrl.cli.reporting.series import Line, thinned

WIDTH, HEIGHT = 400, 230  # of the picture; text is about as large as the page's own
TOP, BOTTOM, RIGHT = 16, 192, 388
CHARACTER = 6.4  # pixels, at most, of a digit on an axis
LABEL_HEIGHT = 12
ROOM = 6  # between the labels' axis and the first point, for its mark


@dataclass(frozen=True, kw_only=True)
class Chart:
    """A chart; `draw` makes the picture.

    Attributes:
        id: unique in the page.
        title: what is drawn.
        unit: of the vertical axis.
        lines: at least one, with at least one point that is no gap.
        x_title: of the horizontal axis.
        alarms: (x, letter) of steps with an alarm.
        caption: what one has to know to read it; HTML.
    """

    id: str
    title: str
    unit: str
    lines: list[Line]
    x_title: str = "step"
    alarms: list[tuple[float, str]] = field(default_factory=list)
    caption: str = ""

    @property
    def is_by_step(self) -> bool:
        return self.x_title == "step"


def draw(chart: Chart) -> str:
    """The picture, an <svg> element."""
    points = [p for line in chart.lines for p in zip(line.xs, line.ys, strict=True)]
    xs = [x for x, y in points if y is not None]
    low, high = limits(_heights(chart.lines))
    y_ticks = ticks(low, high, 5)
    labels = tick_labels(y_ticks)
    left = 8 + CHARACTER * max([3, *map(len, labels)])
    longest = max(len(line.label) for line in chart.lines)
    x_axis = Axis(*_x_limits(chart, xs), left + ROOM, RIGHT - (CHARACTER + 1) * longest)
    y_axis = Axis(low, high, BOTTOM, TOP)
    body = [
        *_y_grid(y_axis, x_axis, y_ticks, labels),
        *_x_grid(chart, x_axis),
        *(_alarm(x_axis.at(x), letter) for x, letter in chart.alarms),
        *(_line(line, x_axis, y_axis) for line in chart.lines),
        *_letters(chart.lines, x_axis, y_axis),
    ]
    scale = " ".join(
        f'data-{name}="{a.low:.9g} {a.high:.9g} {a.start:g} {a.end:g}"'
        for name, a in (("x", x_axis), ("y", y_axis))
    )
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-labelledby="{chart.id}-title" '
        f'aria-describedby="{chart.id}-text" {scale}>'
        f'<desc id="{chart.id}-text">{escape(_in_words(chart))}</desc>{"".join(body)}</svg>'
    )


def _heights(lines: list[Line]) -> list[float]:
    """All that has to fit between the vertical axis' ends."""
    found = []
    for line in lines:
        halves = line.half_widths or [0.0] * len(line.ys)
        for y, half in zip(line.ys, halves, strict=True):
            if y is not None:
                found += [y - half, y + half]
    return found


def _x_limits(chart: Chart, xs: list[float]) -> tuple[float, float]:
    low, high = min(xs), max(xs)
    if low <= 0.15 * high:
        low = 0.0
    if low == high:
        return low - 1, high + 1
    return low, high if chart.is_by_step else high + 0.04 * (high - low)


def _y_grid(y_axis: Axis, x_axis: Axis, values: list[float], labels: list[str]) -> Iterator[str]:
    left = x_axis.start - ROOM
    for value, label in zip(values, labels, strict=True):
        y = y_axis.at(value)
        kind = "axis" if value == 0 else "grid"
        yield f'<path class="{kind}" d="M{left:g},{y:g}H{x_axis.end:g}"/>'
        yield f'<text class="tick end" x="{left - 5:g}" y="{y + 4:g}">{label}</text>'


def _x_grid(chart: Chart, x_axis: Axis) -> Iterator[str]:
    yield f'<path class="axis" d="M{x_axis.start - ROOM:g},{BOTTOM}H{x_axis.end:g}"/>'
    values = ticks(x_axis.low, x_axis.high, 6, whole=chart.is_by_step)
    for value, label in zip(values, tick_labels(values), strict=True):
        x = x_axis.at(value)
        yield f'<path class="axis" d="M{x:g},{BOTTOM}v4"/>'
        yield f'<text class="tick mid" x="{x:g}" y="{BOTTOM + 17}">{label}</text>'
    middle = (x_axis.start + x_axis.end) / 2
    title = escape(chart.x_title)
    yield f'<text class="name mid" x="{middle:g}" y="{HEIGHT - 4}">{title}</text>'


def _alarm(x: float, letter: str) -> str:
    """A dashed line with a warning sign on top: not by its colour alone."""
    text = f'<text class="alarm-name" x="{x + 8:g}" y="11">{letter}</text>' if letter else ""
    return (
        f'<g class="alarm"><path class="at" d="M{x:g},{TOP}V{BOTTOM}"/>'
        f'<path class="sign" d="M{x:g},0l7,13h-14z"/>'
        f'<text class="mark mid" x="{x:g}" y="11.5">!</text>{text}</g>'
    )


def _line(line: Line, x_axis: Axis, y_axis: Axis) -> str:
    kind = f"c{line.color} d{line.dash}"
    parts = []
    is_averaged = line.window > 1
    for index, half in enumerate(line.half_widths):
        x, y = x_axis.at(line.xs[index]), line.ys[index]
        if y is not None:
            ends = y_axis.at(y - half), y_axis.at(y + half)
            parts.append(
                f'<path class="bar" d="M{x:g},{ends[0]:g}V{ends[1]:g}'
                f'M{x - 3:g},{ends[0]:g}h6M{x - 3:g},{ends[1]:g}h6"/>'
            )
    if line.has_line:
        raw = _path(thinned(line.xs, line.ys), x_axis, y_axis)
        parts.append(f'<path class="{"raw" if is_averaged else "line"}" d="{raw}"/>')
    if is_averaged:
        mean = _path(thinned(line.xs, line.smoothed), x_axis, y_axis)
        parts.append(f'<path class="line" d="{mean}"/>')
    if line.has_marks:
        parts += [
            f'<path class="mark" d="M{x_axis.at(x) - 3.5:g},{y_axis.at(y) - 3.5:g}h7v7h-7z"/>'
            for x, y in zip(line.xs, line.ys, strict=True)
            if y is not None
        ]
    return f'<g class="{kind}" data-name="{escape(line.name)}">{"".join(parts)}</g>'


def _path(points: list[tuple[float, float | None]], x_axis: Axis, y_axis: Axis) -> str:
    """Stretches between gaps; a point between two of them is a dot, by the line's round ends."""
    stretches: list[list[str]] = [[]]
    for x, y in points:
        if y is None:
            stretches.append([])
        else:
            stretches[-1].append(f"{x_axis.at(x):g},{y_axis.at(y):g}")
    return "".join(
        f"M{'L'.join(stretch)}" + ("h0" if len(stretch) == 1 else "")
        for stretch in stretches
        if stretch
    )


def _letters(lines: list[Line], x_axis: Axis, y_axis: Axis) -> Iterator[str]:
    """The lines' letters at their ends, moved apart where ends are close."""
    ends = []
    for line in lines:
        last = [(x, y) for x, y in zip(line.xs, line.smoothed, strict=True) if y is not None][-1]
        if line.label:
            ends.append((y_axis.at(last[1]), x_axis.at(last[0]), line))
    ends.sort(key=lambda end: end[0])
    # From the top each below the one before, and as many as there are above the axis.
    height = float("-inf")
    for index, (y, x, line) in enumerate(ends):
        below = len(ends) - 1 - index
        height = max(height + LABEL_HEIGHT, min(y, BOTTOM - below * LABEL_HEIGHT))
        place = f'x="{x + 7:g}" y="{height + 4:g}"'
        yield f'<text class="letter t{line.color}" {place}>{escape(line.label)}</text>'


def _in_words(chart: Chart) -> str:
    """For those who do not see the picture."""
    said = [f"{chart.title}, {chart.unit}, by {chart.x_title}."]
    for line in chart.lines:
        values = [(x, y) for x, y in zip(line.xs, line.ys, strict=True) if y is not None]
        lowest, highest = (f(y for _, y in values) for f in (min, max))
        said.append(
            f"{line.name}: {number(values[0][1])} at {number(values[0][0])}, "
            f"{number(values[-1][1])} at {number(values[-1][0])}, "
            f"lowest {number(lowest)}, highest {number(highest)}."
        )
    if chart.alarms:
        said.append("Alarms at " + ", ".join(f"{letter} {x:g}" for x, letter in chart.alarms))
    return " ".join(said)
