import math
import random

import pytest

from fastrl.rewards.agreement import agreement_share, cohens_kappa, krippendorffs_alpha


def table_of(**rows):
    """A row of characters for each annotator, "." where one is missing, as textbooks print it."""
    columns = zip(*rows.values(), strict=True)
    return [
        {
            name: int(x) if x.isdigit() else x
            for name, x in zip(rows, column, strict=True)
            if x != "."
        }
        for column in columns
    ]


def crossed(both_yes, first_yes, second_yes, both_no):
    cells = [
        ("y", "y", both_yes),
        ("y", "n", first_yes),
        ("n", "y", second_yes),
        ("n", "n", both_no),
    ]
    return [{"ann": x, "bob": y} for x, y, count in cells for _ in range(count)]


# Krippendorff 2011, Computing Krippendorff's Alpha-Reliability, examples A, B and C.
MEG_OWEN = table_of(meg="0100000010", owen="1110010000")
BEN_GERRY = table_of(ben="aabbdcccedda", gerry="babbbccceddd")
FOUR = table_of(
    a="123321412...", b="1233224125.3", c=".3332342251.", d="12332441251."
)  # fmt: skip


@pytest.mark.parametrize(
    "table, level, expected",
    [
        (MEG_OWEN, "nominal", 0.095),
        (BEN_GERRY, "nominal", 0.692),
        (FOUR, "nominal", 0.743),
        (FOUR, "interval", 0.849),
    ],
)
def test_alpha_is_that_of_krippendorffs_examples(table, level, expected):
    assert krippendorffs_alpha(table, level).value == pytest.approx(expected, abs=5e-4)


def test_alpha_is_the_double_sum_over_random_ratings():
    """Its definition, pair by pair, on ratings far from 0, where squares lose their digits."""
    draw = random.Random(1)
    table = [
        {who: 1e6 + draw.randint(1, 5) for who in "abcd" if draw.random() < 0.7} for _ in range(30)
    ]
    items = [list(row.values()) for row in table if len(row) > 1]
    values = [x for item in items for x in item]
    n = len(values)
    within = sum((x - y) ** 2 / (len(item) - 1) for item in items for x in item for y in item) / n
    between = sum((x - y) ** 2 for x in values for y in values) / (n * (n - 1))
    found = krippendorffs_alpha(table, "interval")
    assert found.value == pytest.approx(1 - within / between, abs=1e-9)
    assert found.items == len(items)


@pytest.mark.parametrize(
    "cells, share, kappa",
    [((20, 5, 10, 15), 0.7, 0.4), ((45, 15, 25, 15), 0.6, 0.1304), ((25, 35, 5, 35), 0.6, 0.2593)],
)
def test_kappa_is_that_of_the_textbook_tables(cells, share, kappa):
    table = crossed(*cells)
    assert cohens_kappa(table, "ann", "bob").value == pytest.approx(kappa, abs=5e-5)
    assert agreement_share(table).value == pytest.approx(share)


def test_kappa_counts_only_what_both_judged():
    table = [*crossed(20, 5, 10, 15), {"ann": "y"}, {"bob": "n", "cyd": "y"}]
    found = cohens_kappa(table, "ann", "bob")
    assert (found.value, found.items) == (pytest.approx(0.4), 50)


def test_the_share_counts_pairs_of_judgements():
    # 3 pairs with 1 equal, 1 pair equal, and one who is alone: 2 of 4.
    table = [{"a": "x", "b": "x", "c": "y"}, {"a": "z", "c": "z"}, {"a": "x"}]
    assert agreement_share(table).value == 0.5


def test_the_interval_is_that_of_a_share_of_independent_items():
    table = crossed(160, 40, 40, 160)  # 320 of 400 agree
    found = agreement_share(table, draws=4000)
    half = 1.96 * math.sqrt(0.8 * 0.2 / 400)
    assert (found.low, found.high) == (
        pytest.approx(0.8 - half, abs=0.1 * half),
        pytest.approx(0.8 + half, abs=0.1 * half),
    )
    # κ = 2 p_o − 1 where all margins are even.
    kappa = cohens_kappa(table, "ann", "bob", draws=4000)
    assert kappa.value == pytest.approx(0.6)
    assert kappa.high - kappa.low == pytest.approx(4 * half, rel=0.1)
    assert krippendorffs_alpha(table, draws=4000) != krippendorffs_alpha(table, draws=4000, seed=1)


def test_full_agreement_and_what_is_not_defined():
    same = [{"a": x, "b": x} for x in (1, 2, 3) * 5]
    for found in (krippendorffs_alpha(same, "interval"), cohens_kappa(same, "a", "b")):
        assert (found.value, found.low, found.high) == (1.0, 1.0, 1.0)
    constant = [{"a": 3, "b": 3}] * 4
    for found in (
        krippendorffs_alpha(constant),
        krippendorffs_alpha(constant, "interval"),
        cohens_kappa(constant, "a", "b"),
        krippendorffs_alpha([{"a": 1}, {}]),
    ):
        assert math.isnan(found.value) and math.isnan(found.low)
    with pytest.raises(ValueError, match='expected level "nominal" or "interval", got \'ordinal\''):
        krippendorffs_alpha(same, "ordinal")
