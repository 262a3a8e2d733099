"""How far people agree: share of equal judgements, Cohen's kappa, Krippendorff's alpha.

Everything is a ratio of sums over items, so an interval is that of the percentiles over items that
are drawn again with replacement: each draw weighs the same sums by how often an item came.
Draws for which a measure is not defined are left out of its interval.
"""

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Table = Sequence[Mapping[str, Hashable]]
_DRAWS_AT_ONCE = 100
_ROUNDING = 1e-12  # far above that of float64 sums, far below what ratings differ by


class Estimate(NamedTuple):
    """A measure, its interval, and how many items it rests on; NaN where it is not defined."""

    value: float
    low: float
    high: float
    items: int


def agreement_share(table: Table, *, draws: int = 2000, seed: int = 0) -> Estimate:
    """The share of pairs of judgements of one item that are equal.

        Σ_u #{i < j: x_ui = x_uj} / Σ_u m_u (m_u − 1) / 2

    Args:
        table: for each item u its judgements by annotator, m_u of them; those of fewer than two
            count nowhere.
        draws: of the bootstrap over items, for the interval of 95 %.
        seed: of the draws.
    """
    rows = []
    for values in _paired(table):
        counts = _counts(values)
        equal = sum(count * (count - 1) for count in counts.values()) / 2
        rows.append([equal, len(values) * (len(values) - 1) / 2])
    return _estimate(rows, lambda sums: _ratio(sums[:, 0], sums[:, 1]), draws, seed)


def cohens_kappa(
    table: Table, first: str, second: str, *, draws: int = 2000, seed: int = 0
) -> Estimate:
    """Agreement of two annotators beyond that of chance, on the items that both judged.

        κ = (p_o − p_e) / (1 − p_e),   p_e = Σ_c p_first(c) p_second(c)

    NaN where p_e = 1: both said one and the same of everything.

    Args:
        table, draws, seed: as in `agreement_share`.
        first, second: the annotators.
    Reference: Cohen 1960, A coefficient of agreement for nominal scales.
    """
    pairs = [(row[first], row[second]) for row in table if first in row and second in row]
    values = list(dict.fromkeys(value for pair in pairs for value in pair))
    rows = [
        [1.0, float(x == y), *(float(x == v) for v in values), *(float(y == v) for v in values)]
        for x, y in pairs
    ]

    def kappa(sums: Array) -> Array:
        count = sums[:, 0]
        of_first, of_second = np.split(sums[:, 2:], 2, axis=1)
        by_chance = (of_first * of_second).sum(1)
        return _ratio(sums[:, 1] * count - by_chance, count * count - by_chance)

    return _estimate(rows, kappa, draws, seed)


def krippendorffs_alpha(
    table: Table, level: str = "nominal", *, draws: int = 2000, seed: int = 0
) -> Estimate:
    """Agreement of any number of annotators beyond that of chance; judgements may be missing.

        α = 1 − D_o / D_e
        D_o = 1/n Σ_u 1/(m_u − 1) Σ_{i≠j} δ(x_ui, x_uj)      within items
        D_e = 1/(n (n − 1)) Σ over all ordered pairs of δ     between all n values

    δ is 0 or 1 (nominal) or the square of the difference (interval). Items with fewer than two
    judgements count nowhere. NaN where all values are equal.

    Args:
        table, draws, seed: as in `agreement_share`.
        level: "nominal", or "interval" for numbers.
    Raises:
        ValueError: another level.
    Reference: Krippendorff 2011, Computing Krippendorff's Alpha-Reliability.
    """
    if level not in ("nominal", "interval"):
        raise ValueError(
            f'krippendorffs_alpha: expected level "nominal" or "interval", got {level!r}. '
            "Choices are nominal, ratings interval."
        )
    items = _paired(table)
    rows = _nominal_rows(items) if level == "nominal" else _interval_rows(items)

    def alpha(sums: Array) -> Array:
        count, within = sums[:, 0], sums[:, 1]
        if level == "nominal":
            between = count * count - (sums[:, 2:] ** 2).sum(1)
        else:
            between = 2 * (count * sums[:, 3] - sums[:, 2] ** 2)
            between[between < _ROUNDING * count * sums[:, 3]] = 0.0  # a draw of equal values
        return 1 - _ratio(within * (count - 1), between)

    return _estimate(rows, alpha, draws, seed)


def _nominal_rows(items: list[list[Hashable]]) -> list[list[float]]:
    """m_u, Σ δ / (m_u − 1), and how often each value stands there."""
    values = list(dict.fromkeys(value for item in items for value in item))
    rows = []
    for item in items:
        counts, size = _counts(item), len(item)
        within = (size * size - sum(count * count for count in counts.values())) / (size - 1)
        rows.append([float(size), within, *(float(counts.get(value, 0)) for value in values)])
    return rows


def _interval_rows(items: list[list[Hashable]]) -> list[list[float]]:
    """m_u, Σ δ / (m_u − 1), Σ x and Σ x² around the mean of all."""
    numbers = [[float(value) for value in item] for item in items]  # type: ignore[arg-type]
    everything = [number for item in numbers for number in item]
    mean = math.fsum(everything) / len(everything) if everything else 0.0
    rows = []
    for item in numbers:
        within = math.fsum((x - y) ** 2 for x in item for y in item) / (len(item) - 1)
        centred = [x - mean for x in item]
        rows.append(
            [float(len(item)), within, math.fsum(centred), math.fsum(x * x for x in centred)]
        )
    return rows


def _paired(table: Table) -> list[list[Hashable]]:
    return [list(row.values()) for row in table if len(row) > 1]


def _counts(values: Sequence[Hashable]) -> dict[Hashable, int]:
    counts: dict[Hashable, int] = {}
    for value in values:
        counts[value] = counts.get(value, 0) + 1
    return counts


def _ratio(above: Array, below: Array) -> Array:
    """NaN where it is not defined."""
    return np.divide(above, below, out=np.full_like(above, np.nan), where=below != 0)


def _estimate(
    rows: list[list[float]], measure: Callable[[Array], Array], draws: int, seed: int
) -> Estimate:
    if not rows:
        return Estimate(math.nan, math.nan, math.nan, 0)
    sums, count = np.array(rows), len(rows)
    value = float(measure(sums.sum(0, keepdims=True))[0])
    generator = np.random.default_rng(seed)
    found = []
    for start in range(0, draws, _DRAWS_AT_ONCE):
        size = min(_DRAWS_AT_ONCE, draws - start)
        times = generator.multinomial(count, np.full(count, 1 / count), size=size)
        found.append(measure(times @ sums))
    measures = np.concatenate(found) if found else np.empty(0)
    measures = measures[np.isfinite(measures)]
    if not len(measures) or math.isnan(value):
        return Estimate(value, math.nan, math.nan, count)
    low, high = np.quantile(measures, [0.025, 0.975])
    return Estimate(value, float(low), float(high), count)
