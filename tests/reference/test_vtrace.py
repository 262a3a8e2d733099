import math

import pytest
import torch

from fastrl.reference import gae, lambda_returns, vtrace

RATES = {"gamma": 0.5, "gae_lambda": 0.5, "rho_clip": 2.0, "c_clip": 1.0}


def only(inputs):
    """Without what vtrace does not take."""
    return {name: x for name, x in inputs.items() if name != "q_values"}


def test_masked_row(masked_row):
    # delta as for gae: 3, -2, -2, 8 at t = 0, 2, 3, 4; ratio 2, 1/2, 1, 4
    # vs - v: t4 2 * 8; t3 ends -2; t2 (-2 + (1/4) (-2)) / 2 = -1.25; t0 2 * 3 - 1.25/4
    advantages, targets = vtrace(**only(masked_row), **RATES)
    torch.testing.assert_close(targets, torch.tensor([[7.6875, 0, 6.75, 2, 32, 0]]))
    # t0: 2 (3 - 1.25/4); t2: (-2 - 2/4) / 2
    torch.testing.assert_close(advantages, torch.tensor([[5.375, 0, -1.25, -2, 16, 0]]))


def test_broken_row(broken_row):
    # delta 1, 3, -4, 8; ratio 1/2, 2, 1, 1/4; vs - v: t3 2; t2 -4; t1 2 * 3; t0 1/2 + 6/4/2
    advantages, targets = vtrace(**only(broken_row), **RATES)
    torch.testing.assert_close(targets, torch.tensor([[3.25, 10, 4, 18]]))
    # t0: (1 + 6/4) / 2
    torch.testing.assert_close(advantages, torch.tensor([[1.25, 6, -4, 2]]))


def test_packed_rows(packed_rows):
    advantages, targets = vtrace(**only(packed_rows), **RATES)
    expected = torch.tensor([7.6875, 0, 6.75, 2, 32, 0, 3.25, 10, 4, 18])
    torch.testing.assert_close(targets, expected)
    expected = torch.tensor([5.375, 0, -1.25, -2, 16, 0, 1.25, 6, -4, 2])
    torch.testing.assert_close(advantages, expected)


def test_on_policy_is_gae(random_rows):
    inputs = only(random_rows(4, 11)) | {"log_ratio": torch.zeros(4, 11, dtype=torch.float64)}
    advantages, targets = vtrace(**inputs)
    del inputs["log_ratio"]
    torch.testing.assert_close(targets, lambda_returns(**inputs))
    torch.testing.assert_close(advantages, gae(**inputs)[0])


def test_definition_of_the_paper():
    """vs_s = v_s + sum_t gamma^(t-s) (prod_{s<=i<t} c_i) rho_t delta_t: eq. 1, as a double sum."""
    torch.manual_seed(1)
    rewards, values, log_ratio = torch.randn(3, 7, dtype=torch.float64)
    end = torch.tensor(0.4, dtype=torch.float64)
    _, targets = vtrace(
        rewards, values, log_ratio, gamma=0.9, rho_clip=1.2, c_clip=0.8, bootstrap_value=end
    )
    next_values = torch.cat([values[1:], end[None]])
    ratio = log_ratio.exp()
    rho, c = ratio.clamp(max=1.2), ratio.clamp(max=0.8)
    delta = rho * (rewards + 0.9 * next_values - values)
    expected = [
        values[s] + sum(0.9 ** (t - s) * c[s:t].prod() * delta[t] for t in range(s, 7))
        for s in range(7)
    ]
    torch.testing.assert_close(targets, torch.stack(expected))


def test_gradients_of_log_ratio_stop_at_the_clips():
    log_ratio = torch.tensor([0.5, -0.5], requires_grad=True)
    advantages, _ = vtrace(torch.ones(2), torch.zeros(2), log_ratio, gamma=0.0)
    advantages.sum().backward()
    torch.testing.assert_close(log_ratio.grad, torch.tensor([0.0, math.exp(-0.5)]))


@pytest.mark.parametrize("log_ratio", [100.0, -100.0])  # exp(100) overflows float32
def test_extreme_ratios_stay_finite(log_ratio):
    ratio = torch.full((3,), log_ratio, requires_grad=True)
    outputs = vtrace(torch.ones(3), torch.ones(3), ratio, gamma=0.9)
    sum(x.sum() for x in outputs).backward()
    assert all(x.isfinite().all() for x in (*outputs, ratio.grad))


def test_without_clips():
    rewards, values, log_ratio = torch.tensor([1.0]), torch.tensor([0.0]), torch.tensor([4.0]).log()
    unbounded = {"rho_clip": math.inf, "c_clip": math.inf}
    advantages, targets = vtrace(rewards, values, log_ratio, gamma=0.9, **unbounded)
    torch.testing.assert_close(advantages, torch.tensor([4.0]))
    torch.testing.assert_close(targets, torch.tensor([4.0]))
