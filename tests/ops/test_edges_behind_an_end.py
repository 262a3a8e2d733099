"""What stands behind the end of an episode, in the same row, never leaks into it; see edges.py."""

import math

import pytest
import torch
from edges import (
    AT_STEP_1,
    INPUTS,
    NOTHING_FOLLOWS,
    OPTIONS,
    ROW,
    TERMINATED,
    TRUNCATED,
    check,
    everywhere,
    per_output,
)

import fastrl

NAN, INF = math.nan, math.inf


def spoil_behind_step_1(bad):
    return {name: [*x[:2], bad] for name, x in ROW.items()}


@everywhere
@pytest.mark.parametrize("bad", [NAN, INF])
def test_what_stands_behind_a_termination_stays_there(space, op, bad):
    """The next episode of the row is spoiled; steps 0 and 1 are those of TERMINATED."""
    expected = per_output(TERMINATED, lambda numbers: numbers[:2])
    row = spoil_behind_step_1(bad)
    given = {"terminated": AT_STEP_1}
    for after in ({"bootstrap_value": bad}, {"next_values": [4.0, bad, bad]}):
        outputs = check(space, op, expected, row, **given, **after)
        assert not any(x[2].isfinite() for x in outputs)  # and it shows where it stands


@everywhere
@pytest.mark.parametrize("bad", [NAN, INF])
def test_what_stands_behind_a_truncation_stays_there(space, op, bad):
    expected = per_output(TRUNCATED, lambda numbers: numbers[:2])
    row = spoil_behind_step_1(bad)
    outputs = check(space, op, expected, row, truncated=AT_STEP_1, next_values=[4.0, 32.0, bad])
    assert not any(x[2].isfinite() for x in outputs)


@everywhere
def test_the_value_behind_a_termination_at_the_end_is_not_looked_at(space, op):
    for value in (NAN, INF):
        given = {"terminated": [False, False, True], "bootstrap_value": value}
        check(space, op, NOTHING_FOLLOWS, **given)


@pytest.mark.parametrize("bad", [NAN, INF])
def test_gradients_of_n_step_returns_before_an_end_stay_there(bad):
    """Times a discount of 0 they would be nan behind it."""
    op = "n_step_returns"
    names = [*INPUTS[op], "bootstrap_value"]
    found = []
    for upstream in ([bad, bad, 1.0], [0.0, 0.0, 1.0]):
        row = {k: torch.tensor(v) for k, v in ROW.items()} | {"bootstrap_value": torch.tensor(16.0)}
        leaves = [row[name].requires_grad_() for name in names]
        options = OPTIONS[op] | {"gamma": 0.5, "terminated": torch.tensor(AT_STEP_1)}
        returns = fastrl.n_step_returns(*leaves[:-1], bootstrap_value=leaves[-1], **options)
        grads = torch.autograd.grad(returns, leaves, torch.tensor(upstream))
        found.append([x[2:] if x.dim() else x for x in grads])
    assert all(map(torch.equal, *found)) and all(x.isfinite().all() for x in found[0])
