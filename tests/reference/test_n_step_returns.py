import pytest
import torch

from fastrl.reference import discounted_returns, n_step_returns


def only(inputs):
    """Without what n_step_returns does not take."""
    return {name: x for name, x in inputs.items() if name not in ("q_values", "log_ratio")}


@pytest.mark.parametrize(
    ("n", "expected"),
    [
        (1, [[5.0, 0, 6, 2, 24, 0]]),  # t2: 4 + 4/2; t0 skips t1: 1 + 8/2
        (2, [[4.0, 0, 5, 2, 24, 0]]),  # t2: 4 + 2/2, ended; t0: 1 + (4 + 4/2)/2
        (3, [[3.5, 0, 5, 2, 24, 0]]),  # t0: 1 + (4 + 2/2)/2
        (99, [[3.5, 0, 5, 2, 24, 0]]),
    ],
)
def test_masked_row(n, expected, masked_row):
    got = n_step_returns(**only(masked_row), gamma=0.5, n=n)
    torch.testing.assert_close(got, torch.tensor(expected))


def test_broken_row(broken_row):
    # t3: 8 + 32/2; t2 ends: 4; t1 truncated: 2 + 10/2; t0: 1 + 7/2
    got = n_step_returns(**only(broken_row), gamma=0.5, n=2)
    torch.testing.assert_close(got, torch.tensor([[4.5, 7, 4, 24]]))


def test_packed_rows(packed_rows):
    got = n_step_returns(**only(packed_rows), gamma=0.5, n=2)
    torch.testing.assert_close(got, torch.tensor([4.0, 0, 5, 2, 24, 0, 4.5, 7, 4, 24]))


def test_a_value_that_is_stepped_over_may_be_anything():
    rewards = torch.tensor([1.0, 2.0, 4.0])
    for bad in (float("nan"), float("inf")):
        values = torch.tensor([bad, bad, 8.0])
        got = n_step_returns(rewards, values, gamma=0.5, n=2)
        assert got.tolist() == [4.0, 4.0, 4.0]  # 1 + 2/2 + 8/4; 2 + 4/2; 4


def test_unbroken_row():
    rewards, values = torch.tensor([1.0, 2.0, 4.0, 8.0]), torch.tensor([2.0, 4.0, 8.0, 16.0])
    got = n_step_returns(rewards, values, gamma=0.5, n=2, bootstrap_value=torch.tensor(32.0))
    # 1 + 2/2 + 8/4; 2 + 4/2 + 16/4; 4 + 8/2 + 32/4; 8 + 32/2
    torch.testing.assert_close(got, torch.tensor([4.0, 8, 16, 24]))


def test_n_of_the_whole_row_is_monte_carlo(random_rows):
    inputs = random_rows(3, 9)
    common = {name: inputs[name] for name in ("terminated", "truncated", "mask", "next_values")}
    got = n_step_returns(inputs["rewards"], inputs["values"], gamma=0.9, n=9, **common)
    torch.testing.assert_close(got, discounted_returns(inputs["rewards"], gamma=0.9, **common))
