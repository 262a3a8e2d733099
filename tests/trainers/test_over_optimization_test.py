"""The sequential test alone: its p-value, its level on honest streams, its power on gamed ones."""

import itertools
import math
import statistics

import numpy as np
import pytest
import torch
from reward_streams import EVALUATIONS, HONEST, alarms, stream

from fastrl.trainers.over_optimization import sequential_test
from fastrl.trainers.over_optimization.sequential_test import PartingTest

ALPHA = 0.05
STREAMS = 40  # of each kind


def rises(x):
    return sequential_test.rises(np.asarray(x, dtype=np.float64))


def p_by_all_signs(x):
    """Of the one-sided sign-flip test, all 2^n signs."""
    signs = torch.tensor(list(itertools.product([1.0, -1.0], repeat=len(x))), dtype=torch.float64)
    return float((signs @ x >= x.sum() - 1e-12).double().mean())


@pytest.mark.parametrize("shift", [0.0, 0.5, 1.5])
def test_the_p_value_is_that_of_the_exact_sign_flip_test_or_a_little_above(shift):
    generator = torch.Generator().manual_seed(3)
    for _ in range(30):
        x = torch.randn(12, generator=generator, dtype=torch.float64) + shift
        x = x * torch.rand(12, generator=generator, dtype=torch.float64).exp() ** 2
        exact, got = p_by_all_signs(x), rises(x)
        if x.sum() > 0:
            assert exact <= got <= 1.1 * exact + 2**-11
        else:
            assert got == 1 and exact > 0.5


def test_the_p_value_of_many_prompts_is_near_the_normal_one():
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(400, generator=generator, dtype=torch.float64) + 0.2
    t = float(x.sum() / x.square().sum().sqrt())
    normal = 0.5 * math.erfc(t / 2**0.5)
    assert 3 < t < 5 and 0.8 * normal < rises(x) < 1.1 * normal


def test_p_values_by_hand():
    """Coins of one size: binomial; without a trend, or with NaN alone, nothing is known."""
    assert rises(torch.full((10,), 0.3)) == 2**-10
    two_against = torch.tensor([0.1] * 8 + [-0.1] * 2)
    # Of b in {0, 1}^10: at most as many of the 8 as of the 2.
    count = sum(
        math.comb(8, up) * math.comb(2, down) for down in range(3) for up in range(down + 1)
    )
    assert rises(two_against) == count / 2**10
    assert rises(torch.tensor([2.0, math.nan, 2.0])) == 0.25
    assert rises(torch.tensor([-1.0, -2.0])) == 1
    assert rises(torch.tensor([math.nan])) == 1
    assert rises([1e-200, 1e-200]) == 0.25


@pytest.mark.parametrize("planned", [1, 7, 100])
def test_the_levels_add_up_to_alpha(planned):
    total = sum(sequential_test.level(k, planned, ALPHA) for k in range(20_000))
    assert ALPHA * (1 - planned / 20_000) <= total < ALPHA
    assert sequential_test.level(0, planned, ALPHA) == 0


def test_a_trend_is_the_least_squares_slope():
    rewards = list(torch.randn(6, 4, dtype=torch.float64).numpy())
    time = torch.arange(6, dtype=torch.float64)
    for span in (1, 2, 3, 4, 5):
        t, y = time[-span - 1 :], torch.tensor(np.array(rewards[-span - 1 :]))
        slope = ((t - t.mean())[:, None] * y).sum(0) / (t - t.mean()).square().sum()
        got = torch.tensor(sequential_test.trend(rewards, span))
        assert torch.allclose(got / (2 * (t - t.mean()).square().sum()), slope)
    rewards[-2][1] = math.nan  # in the middle of span 2, where its weight is 0
    assert np.isnan(sequential_test.trend(rewards, 2)).tolist() == [False, True, False, False]


def test_what_has_not_changed_has_no_trend():
    """Nor has rounding: in float32 the sums of rewards are only known so well."""
    third = np.full(16, 1 / 3)
    rewards = [third * (1 + 1e-8 * k) for k in range(9)]
    assert all(not sequential_test.trend(rewards, span).any() for span in (1, 2, 4, 8))
    assert rises(sequential_test.trend(rewards, 8)) == 1


def count_of_most(trials, rate):
    """More than this many have a chance below one in a thousand."""
    distribution = [
        math.comb(trials, k) * rate**k * (1 - rate) ** (trials - k) for k in range(trials + 1)
    ]
    return next(k for k in range(trials + 1) if sum(distribution[: k + 1]) > 0.999)


def test_an_honest_run_has_an_alarm_at_most_as_often_as_stated():
    false = {
        kind: sum(bool(alarms(PartingTest(ALPHA, EVALUATIONS), kind, s)) for s in range(STREAMS))
        for kind in HONEST
    }
    assert max(false.values()) <= count_of_most(STREAMS, ALPHA), false
    assert sum(false.values()) <= ALPHA * STREAMS * len(HONEST), false


def test_an_honest_run_that_is_longer_than_planned_has_no_more_alarms():
    kind, sizes = "gold flat", {"evaluations": 80}
    false = sum(bool(alarms(PartingTest(0.3, 10), kind, s, **sizes)) for s in range(20))
    assert false <= count_of_most(20, 0.3)


@pytest.mark.parametrize("kind, within", [("gamed", 8), ("gamed, proxy saturates", 10)])
def test_a_gamed_run_is_caught_soon_after_the_peak_and_not_before(kind, within):
    """Gold peaks at evaluation 8, then falls by 1/8 of a completion's deviation each time.

    The proxy rises by 1/10, or from 1/11 at the peak down to 1/50.
    """
    firsts = [next(iter(alarms(PartingTest(ALPHA, EVALUATIONS), kind, s)), None) for s in range(20)]
    assert None not in firsts and min(firsts) > 8
    assert statistics.median(firsts) <= 8 + within


def test_a_collapse_is_caught_at_once():
    """Two deviations from one evaluation to the next; the proxy only rises slowly."""
    firsts = [
        next(iter(alarms(PartingTest(ALPHA, EVALUATIONS), "collapse", s)), None) for s in range(20)
    ]
    assert None not in firsts and min(firsts) >= 15 and statistics.median(firsts) <= 19


def test_after_an_alarm_the_evidence_is_new():
    gold, proxy = stream("gamed", 0)
    test = PartingTest(ALPHA, EVALUATIONS)
    verdicts = [test.add(g, p) for g, p in zip(gold, proxy, strict=True)]
    first = next(k for k, verdict in enumerate(verdicts) if verdict.is_alarm)
    assert verdicts[first].p_value <= verdicts[first].threshold == ALPHA / 2 / EVALUATIONS
    assert verdicts[first].is_falling and verdicts[first].since < first
    for verdict in verdicts[first + 1 :]:
        assert verdict.since >= first
    assert not verdicts[first + 1].is_alarm


def test_the_weaker_findings():
    test = PartingTest(ALPHA, EVALUATIONS)
    falling = [test.add(*row) for row in zip(*stream("gold falls, proxy flat", 1), strict=True)]
    assert any(verdict.is_falling for verdict in falling)
    assert not any(verdict.is_stalled or verdict.is_alarm for verdict in falling)
    found = {}
    for kind in ("gold rises then is flat", "both rise", "both flat"):
        rows = zip(*stream(kind, 2, prompts=128), strict=True)
        test = PartingTest(ALPHA, EVALUATIONS)
        found[kind] = [test.add(*row).is_stalled for row in rows]
    assert not any(found["gold rises then is flat"][:10]) and any(found["gold rises then is flat"])
    assert not any(found["both rise"]) and not any(found["both flat"])


def test_the_exchange_rate_is_a_slope_within_evaluations():
    proxy = [np.array([1.0, 2.0, 3.0]), np.array([11.0, 12.0, np.nan])]
    gold = [np.array([2.0, 5.0, 8.0]), np.array([0.0, 3.0, 7.0])]
    assert sequential_test.exchange_rate(gold, proxy) == pytest.approx(3)
    assert sequential_test.exchange_rate([-g for g in gold], proxy) == 0
    assert sequential_test.exchange_rate(gold, [np.ones(3), np.full(3, np.nan)]) == 0


def test_the_state_goes_on_exactly():
    rows = list(zip(*stream("gamed", 4), strict=True))
    whole = PartingTest(ALPHA, EVALUATIONS)
    verdicts = [whole.add(*row) for row in rows]
    first = PartingTest(ALPHA, EVALUATIONS)
    for row in rows[:13]:
        first.add(*row)
    second = PartingTest(ALPHA, 3)
    second.load_state_dict(first.state_dict())
    assert [second.add(*row) for row in rows[13:]] == verdicts[13:]


def test_fewest_prompts_is_where_an_alarm_becomes_possible():
    """All prompts alike is the clearest case there is."""
    for planned in (1, 4, 20):
        fewest = sequential_test.fewest_prompts(planned, ALPHA)
        for prompts, is_possible in ((fewest, True), (fewest - 1, False)):
            test = PartingTest(ALPHA, planned)
            time = torch.ones(prompts, dtype=torch.float64)
            for _k in range(planned):
                test.add(0 * time, 0 * time)
            assert test.add(-time, time).is_alarm == is_possible
