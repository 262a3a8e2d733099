"""The README's table "what happens at each edge", by hand for every estimator; see edges.py."""

import math

import pytest
from edges import (
    AT_STEP_1,
    NOTHING_FOLLOWS,
    ROW,
    SIXTEEN_FOLLOWS,
    TERMINATED,
    TRUNCATED,
    check,
    everywhere,
    per_output,
)

NAN, INF = math.nan, math.inf


@everywhere
def test_last_step_without_a_value_after_it(space, op):
    check(space, op, NOTHING_FOLLOWS)


@everywhere
def test_last_step_with_bootstrap_value(space, op):
    check(space, op, SIXTEEN_FOLLOWS, bootstrap_value=16.0)


@everywhere
def test_last_step_with_next_values(space, op):
    check(space, op, SIXTEEN_FOLLOWS, next_values=[4.0, 8.0, 16.0])


@everywhere
def test_next_values_count_at_every_step(space, op):
    """v' = 8, 8, 16: td at step 0 is 1 + 4 - 2 = 3. A: 3 + 3/4. e: 3/2 + 5/8. P: (3 + 5/4) / 2.
    G: 1 + 4 + (8.5 - 4) / 4. Two steps, and all of them, reach over it."""
    expected = {
        "discounted_returns": [5.0, 8.0, 12.0],
        "gae": ([3.75, 3.0, 4.0], [5.75, 7.0, 12.0]),
        "vtrace": ([2.125, 6.0, 4.0], [4.125, 9.0, 12.0]),
        "retrace_returns": [6.125, 8.5, 12.0],
        "n_step_returns": [4.0, 8.0, 12.0],
    }
    check(space, op, expected, next_values=[8.0, 8.0, 16.0])


@everywhere
def test_terminated(space, op):
    check(space, op, TERMINATED, terminated=AT_STEP_1, bootstrap_value=16.0)
    # whatever stands in next_values there
    for value in (64.0, NAN, INF):
        check(space, op, TERMINATED, terminated=AT_STEP_1, next_values=[4.0, value, 16.0])


@everywhere
def test_terminated_at_the_last_step(space, op):
    at_end = [False, False, True]
    check(space, op, NOTHING_FOLLOWS, terminated=at_end, bootstrap_value=16.0)
    check(space, op, NOTHING_FOLLOWS, terminated=at_end, next_values=[4.0, 8.0, 16.0])


@everywhere
def test_truncated(space, op):
    check(space, op, TRUNCATED, truncated=AT_STEP_1, next_values=[4.0, 32.0, 16.0])


@everywhere
def test_truncated_at_the_last_step_is_its_next_value(space, op):
    at_end = [False, False, True]
    check(space, op, SIXTEEN_FOLLOWS, truncated=at_end, next_values=[4.0, 8.0, 16.0])


@everywhere
def test_terminated_wins_over_truncated(space, op):
    flags = {"terminated": AT_STEP_1, "truncated": AT_STEP_1}
    check(space, op, TERMINATED, **flags, next_values=[4.0, 32.0, 16.0])


def spoiled(position, bad):
    """ROW with one more step, which holds `bad` and is not to be looked at."""
    return {name: [*x[:position], bad, *x[position:]] for name, x in ROW.items()}


def zero_at(position):
    return lambda numbers: [*numbers[:position], 0.0, *numbers[position:]]


@everywhere
@pytest.mark.parametrize("bad", [NAN, INF])
def test_masked_step_in_the_middle_is_carried_over(space, op, bad):
    """Its rewards, values and flags are ignored, and the row is the row without it."""
    expected = per_output(SIXTEEN_FOLLOWS, zero_at(1))
    given = {"mask": [True, False, True, True], "terminated": [False, True, False, False]}
    check(space, op, expected, spoiled(1, bad), **given, bootstrap_value=16.0)
    check(space, op, expected, spoiled(1, bad), **given, next_values=[4.0, bad, 8.0, 16.0])


@everywhere
@pytest.mark.parametrize("bad", [NAN, INF])
def test_masked_steps_at_the_end(space, op, bad):
    """What follows the row follows its last step that exists."""
    expected = per_output(SIXTEEN_FOLLOWS, zero_at(3))
    given = {"mask": [True, True, True, False], "terminated": [False, False, False, True]}
    check(space, op, expected, spoiled(3, bad), **given, bootstrap_value=16.0)
    check(space, op, expected, spoiled(3, bad), **given, next_values=[4.0, 8.0, 16.0, bad])


@everywhere
def test_a_row_that_is_masked_whole_gives_zeros(space, op):
    rows = {name: [[NAN] * 3, x] for name, x in ROW.items()}
    expected = per_output(SIXTEEN_FOLLOWS, lambda numbers: [[0.0] * 3, numbers])
    mask = [[False] * 3, [True] * 3]
    check(space, op, expected, rows, mask=mask, bootstrap_value=[NAN, 16.0])


@everywhere
def test_empty_segments(space, op):
    bounds = [0, 0, 3, 3]
    check(space, op, SIXTEEN_FOLLOWS, cu_seqlens=bounds, bootstrap_value=[64.0, 16.0, NAN])
    empty = per_output(SIXTEEN_FOLLOWS, lambda _: [])
    row = dict.fromkeys(ROW, [])
    check(space, op, empty, row, cu_seqlens=[0, 0], bootstrap_value=[64.0])


@everywhere
def test_segments_are_independent(space, op):
    """The row, then the row with nothing after it, then one of what is no number."""
    row = {name: x + x + [NAN, INF] for name, x in ROW.items()}
    expected = {
        op: tuple(a + b for a, b in zip(SIXTEEN_FOLLOWS[op], NOTHING_FOLLOWS[op], strict=True))
        if isinstance(SIXTEEN_FOLLOWS[op], tuple)
        else SIXTEEN_FOLLOWS[op] + NOTHING_FOLLOWS[op]
        for op in SIXTEEN_FOLLOWS
    }
    bounds, after = [0, 3, 6, 8], [16.0, 0.0, NAN]
    outputs = check(space, op, expected, row, cu_seqlens=bounds, bootstrap_value=after)
    assert not any(x[6:].isfinite().any() for x in outputs)


@everywhere
def test_gamma_zero_leaves_the_immediate_rewards(space, op):
    """td = r - v = -1, -2, -4 = A; e = P = rho td; targets e + v."""
    expected = {
        "discounted_returns": [1.0, 2.0, 4.0],
        "gae": ([-1.0, -2.0, -4.0], [1.0, 2.0, 4.0]),
        "vtrace": ([-0.5, -4.0, -4.0], [1.5, 0.0, 4.0]),
        "retrace_returns": [1.0, 2.0, 4.0],
        "n_step_returns": [1.0, 2.0, 4.0],
    }
    check(space, op, expected, gamma=0.0, bootstrap_value=16.0)


@everywhere
def test_gamma_and_lambda_per_step(space, op):
    """gamma 0.5, 0.25, 1; lambda 1, 0.5, 0.25; 16 follows. td 1, 2 + 2 - 4 = 0, 4 + 16 - 8 = 12.

    R: 4 + 16, 2 + 20/4, 1 + 7/2. A: 12, 12/8, 1 + 1.5/2. w 0.5, 0.5, 0.25: e 12, 0 + 12/8,
    1/2 + 1.5/4. P: 12, 2 (0 + 12/8), (1 + 1.5/2) / 2. G: 20, 2 + 2 + (20 - 2) / 16 = 5.125,
    1 + 2 + (5.125 - 4) / 4. n = 2: 20, 2 + 20/4, 1 + (2 + 8/4) / 2.
    """
    expected = {
        "discounted_returns": [4.5, 7.0, 20.0],
        "gae": ([1.75, 1.5, 12.0], [3.75, 5.5, 20.0]),
        "vtrace": ([0.875, 3.0, 12.0], [2.875, 5.5, 20.0]),
        "retrace_returns": [3.28125, 5.125, 20.0],
        "n_step_returns": [3.0, 7.0, 20.0],
    }
    rates = {"gamma": [0.5, 0.25, 1.0], "gae_lambda": [1.0, 0.5, 0.25]}
    check(space, op, expected, **rates, bootstrap_value=16.0)
