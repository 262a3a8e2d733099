"""Normalised compositions, against numbers that were worked out by hand."""

import math
import random
import statistics

import numpy as np
import pytest
import torch
from torch.nn.functional import logsigmoid

from fastrl.rewards.composition import Minimum, NormalizedSum, RunningNormalized, WeightedSum

IDS = [[1, 2, 7], [3], [4, 5], [6, 7]]
NAN, INF = math.nan, math.inf
ROOT_HALF = math.sqrt(0.5)


def giving(*results, name="judge"):
    """A part that gives one result after the other."""
    left = iter(results)

    def function(**_):
        return next(left)

    function.__name__ = name
    return function


def call(reward, prompts=("a", "a", "b", "b"), ids=IDS, **arguments):
    return reward(list(prompts), ["x"] * len(ids), ids, **arguments)


def close(found, expected):
    is_none = [[x is None for x in row] for row in (found, expected)]
    numbers = [[x for x in row if x is not None] for row in (found, expected)]
    return is_none[0] == is_none[1] and numbers[0] == pytest.approx(
        numbers[1], rel=1e-14, abs=1e-14
    )


def test_over_the_batch():
    assert call(NormalizedSum([giving([0.0, 2.0, None, 4.0])])) == [-1, 0, None, 1]
    parts = [giving([0.0, 2.0, None, 4.0], name="a"), giving([7.0, None, 9.0, 8.0], name="b")]
    assert call(NormalizedSum(parts, [3.0, -2.0])) == [-3 + 2, 0, -2, 3]


def test_over_the_group_of_a_prompt():
    found = call(NormalizedSum([giving([0.0, 5.0, 2.0, 5.0])], over="group"), prompts="abab")
    assert close(found, [-ROOT_HALF, 0, ROOT_HALF, 0])
    chat = [[{"role": "user", "content": text}] for text in "abba"]
    found = call(NormalizedSum([giving([1.0, 4.0, 5.0, 3.0])], [2.0], over="group"), prompts=chat)
    assert close(found, [-2 * ROOT_HALF, -2 * ROOT_HALF, 2 * ROOT_HALF, 2 * ROOT_HALF])


def test_a_group_of_one_says_nothing():
    assert call(NormalizedSum([giving([1.0, 2.0, 3.0, 4.0])], over="group"), "abcd") == [0] * 4
    # b's group has one opinion, c's two bad ones
    found = call(NormalizedSum([giving([8.0, None, NAN, INF])], over="group"), "bbcc")
    assert found[:2] == [0, None] and math.isnan(found[2]) and math.isnan(found[3])
    assert call(NormalizedSum([giving([5.0])]), "a", [[1]]) == [0]


def test_over_the_run():
    reward = NormalizedSum([giving([1.0, 3.0, 1.0, 3.0], [5.0, 5.0, None, 5.0])], over="running")
    assert call(reward) == [-1, 1, -1, 1]
    # 1, 3, 1, 3 and three 5: m2 = 4 + 0 + (5 - 2)² 4 · 3 / 7
    mean, deviation = 23 / 7, math.sqrt((4 + 9 * 12 / 7) / 7)
    z = (5 - mean) / deviation
    assert close(call(reward), [z, z, None, z])


def test_a_decay_forgets_calls():
    reward = NormalizedSum(
        [giving([1.0, 3.0, 1.0, 3.0], [5.0] * 4, [None] * 4, [5.0] * 4)], over="running", decay=0.5
    )
    call(reward)
    # Weights 1/2 and 1: n = 6, mean (4 + 20) / 6 = 4, m2 = (9 + 1 + 9 + 1) / 2 + 4
    assert close(call(reward), [1 / math.sqrt(14 / 6)] * 4)
    assert call(reward) == [None] * 4  # and forgets nothing
    # n = 7, mean (2 + 10 + 20) / 7, m2 = Σ w (x - mean)²
    mean = 32 / 7
    m2 = 0.5 * ((1 - mean) ** 2 + (3 - mean) ** 2) + 6 * (5 - mean) ** 2
    assert close(call(reward), [(5 - mean) / math.sqrt(m2 / 7)] * 4)


def test_lists_are_normalised_by_their_sum():
    # totals 6, 4, 2: mean 4, deviation 2
    dense = giving([[1.0, 2.0, 3.0], [4.0], [0.0, 2.0], None], name="dense")
    rows = call(NormalizedSum([dense]))
    assert rows == [[-1.5, 1, 1.5], [0], [-2, 1], None]
    dense = giving([[1.0, 2.0, 3.0], [4.0], [0.0, 2.0], None], name="dense")
    sparse = giving([0.0, None, 2.0, 4.0], name="sparse")
    rows = call(NormalizedSum([dense, sparse], [1.0, 6.0]))
    assert rows == [[-1.5, 1, 1.5 - 6], [0], [-2, 1], 6]


@pytest.mark.parametrize("over", ["batch", "group", "running"])
def test_the_mean_of_lists_stands_where_the_policy_wrote(over):
    """A trainer drops what stands at an environment's ids."""
    call_of = NormalizedSum([giving([[1.0, 2.0], [3.0, 4.0, 0.0]])], over=over)
    own = [[True, True], [False, True, True]]
    rows = call_of(["a", "a"], ["x", "y"], [[1, 2], [1, 2, 3]], is_target=own)
    deviation = 2.0 if over == "running" else math.sqrt(8)
    assert close(rows[0], [-4 / deviation, 2 / deviation])
    assert close(rows[1], [3 / deviation, -1 / deviation, 0])


@pytest.mark.parametrize("gamma", [1.0, 0.5, 0.0])
def test_the_mean_of_lists_moves_no_policy_gradient(gamma):
    """Over all completions of a policy that goes on (1) or ends (0), which alone decides on their
    number of ids: the gradient is that of the rewards over their deviation."""
    ids = [[0], [1, 0], [1, 1, 0], [1, 1, 1]]
    dense = [[3.0], [1.0, 2.5], [1.0, 2.0, 2.0], [1.0, 2.0, 0.5]]
    deviation = statistics.stdev(map(sum, dense))
    logits = torch.tensor([0.3, -0.5, 0.8], dtype=torch.float64, requires_grad=True)

    def gradient(rewards):
        loss = torch.zeros((), dtype=torch.float64)
        for row, taken in zip(rewards, ids, strict=True):
            logprobs = logsigmoid(logits[: len(taken)] * (2 * torch.tensor(taken) - 1))
            likely = logprobs.sum().exp().item()
            for t, logprob in enumerate(logprobs):
                to_go = sum(gamma**k * r for k, r in enumerate(row[t:]))
                loss = loss + likely * logprob * to_go
        return torch.autograd.grad(loss, logits)[0]

    expected = gradient([[r / deviation for r in row] for row in dense])
    found = gradient(call(NormalizedSum([giving(dense)]), "aaaa", ids))
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("over", ["batch", "group", "running"])
@pytest.mark.parametrize(
    "equal",
    [
        [0.1] * 4,
        [0.1 + 0.2, 0.3, 0.3, 0.1 + 0.2],
        [[0.1, 0.2, -0.3], [0.0], [0.3, -0.3], [-0.1, 0.1]],  # 5.6e-17 in the first
        [1e30, 1e30, 1e30, 1e30],
    ],
)
def test_what_does_not_differ_adds_nothing(over, equal):
    other = giving([0.0, 2.0, 0.0, 2.0], name="other")
    rows = call(NormalizedSum({"equal": giving(equal), "other": other}, over=over))
    totals = [sum(row) if isinstance(row, list) else row for row in rows]
    expected = {"batch": 1 / math.sqrt(4 / 3), "group": ROOT_HALF, "running": 1.0}[over]
    assert close(totals, [-expected, expected, -expected, expected])


def test_rounding_is_known_in_later_calls():
    rounding = [[0.1, 0.2, -0.3], [0.0], [0.0, 0.0], [0.0, 0.0]]
    reward = NormalizedSum([giving(rounding, [0.0] * 4)], over="running")
    call(reward)
    assert call(reward) == [0] * 4


def test_small_differences_count_as_large_ones_do():
    numbers = [0.0, 1.0, 5.0, 2.0]
    expected = call(NormalizedSum([giving(numbers)]))
    for scale in (2.0**-100, 2.0**100):
        assert call(NormalizedSum([giving([scale * x for x in numbers])])) == expected


@pytest.mark.parametrize("over", ["batch", "running"])
def test_bad_numbers_touch_neither_others_nor_statistics(over):
    def rewards(bad):
        reward = NormalizedSum([giving([1.0, 3.0, 1.0, bad], [1.0, 4.0, 2.0, 3.0])], over=over)
        return call(reward), call(reward)

    without = rewards(None)
    for bad in (NAN, INF, -INF, [INF, 1.0], [NAN, 1.0], 1e39):
        first, second = rewards(bad)
        assert first[:3] == without[0][:3] and second == without[1]
        assert not abs(first[3][0] if isinstance(bad, list) else first[3]) < 1e38


def test_the_minimum_of_normalised_parts():
    parts = {
        "large": giving([0.0, 200.0, None, 400.0]),  # -1, 0, 1
        "small": giving([0.3, 0.1, None, 0.2]),  # 1, -1, 0
    }
    logged = {}
    reward = Minimum(parts, over="batch")
    found = call(reward, log_metric=lambda name, value: logged.update({name: value}))
    assert found[2] is None
    assert close([found[0], found[1], found[3]], [-1, -1, 0])
    assert logged["rewards/minimum/large/mean"] == 200
    assert logged["rewards/minimum/small/share"] == pytest.approx(2 / 3)


def test_running_normalized():
    results = [1.0, 3.0, 1.0, 3.0], [5.0, 5.0, None, 5.0]
    reward = RunningNormalized(giving(*results), clip=0.8)
    assert reward.__name__ == "normalized_judge"
    assert call(reward) == [-0.8, 0.8, -0.8, 0.8]
    assert call(reward) == [0.8, 0.8, None, 0.8]
    reward = RunningNormalized(giving(*results), center=False)
    assert call(reward) == [1, 3, 1, 3]
    deviation = math.sqrt((4 + 9 * 12 / 7) / 7)
    assert close(call(reward), [5 / deviation, 5 / deviation, None, 5 / deviation])


def test_running_normalized_takes_lists_id_by_id():
    reward = RunningNormalized(giving([[1.0, 3.0, NAN], [1.0], [INF, 3.0], [1.0, 3.0]]))
    rows = call(reward)
    assert rows[0][:2] == [-1, 1] and math.isnan(rows[0][2])
    assert rows[1:] == [[-1], [INF, 1], [-1, 1]]


def test_running_normalized_without_a_scale():
    assert call(RunningNormalized(giving([0.1] * 4))) == [0] * 4
    assert call(RunningNormalized(giving([0.1] * 4), center=False)) == [0.1] * 4
    assert call(RunningNormalized(giving([3.0] * 4), center=False, clip=1.0)) == [1] * 4
    assert call(RunningNormalized(giving([None] * 4))) == [None] * 4


def test_statistics_are_those_of_all_numbers_however_they_came():
    draw = random.Random(0)
    numbers = [1e6 + draw.gauss(0, 3) for _ in range(500)]
    sizes, start = [1, 2, 100, 397], 0
    for decay in (None, 0.25):
        batches = []
        for size in sizes:
            batches.append(numbers[start : start + size])
            start += size
        start = 0
        reward = RunningNormalized(giving(*batches), decay=decay)
        for batch in batches:
            found = call(reward, "a" * len(batch), [[1]] * len(batch))
        weights = [
            (decay or 1) ** (3 - k) for k, batch in enumerate(batches) for _ in range(len(batch))
        ]
        mean = np.average(numbers, weights=weights)
        variance = np.average((np.array(numbers) - mean) ** 2, weights=weights)
        expected = [(x - mean) / math.sqrt(variance) for x in batches[-1]]
        assert found == pytest.approx(expected, abs=1e-8)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda part: NormalizedSum(part, over="all"), "over one of 'batch', .* got 'all'"),
        (lambda part: Minimum(part, over="all"), "Minimum: expected over one of"),
        (lambda part: NormalizedSum(part, decay=0.5), 'decay None with over = "batch", got 0.5'),
        (lambda part: Minimum(part, decay=0.5), "decay None without over"),
        (lambda part: NormalizedSum(part, over="running", decay=1.0), r"in \(0, 1\), got 1.0"),
        (lambda part: RunningNormalized(part[0], decay=0.0), r"in \(0, 1\), got 0.0"),
        (lambda part: RunningNormalized(part[0], clip=0.0), "clip above 0, got 0.0"),
    ],
)
def test_arguments_are_checked(make, message):
    with pytest.raises(ValueError, match=message):
        make([giving([1.0])])


def test_wrong_results_leave_the_statistics_alone():
    inner = RunningNormalized(giving([1.0] * 4, [1.0, 3.0, 1.0, 3.0]))
    reward = WeightedSum([inner, giving([1.0], [0.0] * 4)])
    with pytest.raises(ValueError, match="part judge to give a list of 4"):
        call(reward)
    assert call(reward) == [-1, 1, -1, 1]


def test_the_minimum_of_one_is_the_sum_of_it_and_forgets_as_fast():
    rows = [[1.0, 3.0, 1.0, 3.0], [5.0, 4.0, 4.0, 5.0], [0.0, 9.0, 1.0, 2.0]]
    least, whole = (
        kind([giving(*rows)], over="running", decay=0.5) for kind in (Minimum, NormalizedSum)
    )
    for _ in rows:
        assert call(least) == call(whole)
