import torch

from fastrl.reference import discounted_returns, gae


def only(inputs):
    """Without what gae does not take."""
    return {name: x for name, x in inputs.items() if name not in ("q_values", "log_ratio")}


HALVES = {"gamma": 0.5, "gae_lambda": 0.5}


def test_masked_row(masked_row):
    # delta: t4 8 + 32/2 - 16 = 8; t3 ends 2 - 4 = -2; t2 4 + 4/2 - 8 = -2; t0 1 + 8/2 - 2 = 3
    # A: 8; -2; -2 - 2/4 = -2.5; 3 - 2.5/4 = 2.375
    advantages, returns = gae(**only(masked_row), **HALVES)
    torch.testing.assert_close(advantages, torch.tensor([[2.375, 0, -2.5, -2, 8, 0]]))
    torch.testing.assert_close(returns, torch.tensor([[4.375, 0, 5.5, 2, 24, 0]]))


def test_broken_row(broken_row):
    # delta: t3 8; t2 ends 4 - 8 = -4; t1 2 + 10/2 - 4 = 3; t0 1 + 4/2 - 2 = 1; A0 = 1 + 3/4
    advantages, returns = gae(**only(broken_row), **HALVES)
    torch.testing.assert_close(advantages, torch.tensor([[1.75, 3, -4, 8]]))
    torch.testing.assert_close(returns, torch.tensor([[3.75, 7, 4, 24]]))


def test_packed_rows(packed_rows):
    advantages, returns = gae(**only(packed_rows), **HALVES)
    expected = torch.tensor([2.375, 0, -2.5, -2, 8, 0, 1.75, 3, -4, 8])
    torch.testing.assert_close(advantages, expected)
    expected = torch.tensor([4.375, 0, 5.5, 2, 24, 0, 3.75, 7, 4, 24])
    torch.testing.assert_close(returns, expected)


def test_lambda_one_is_monte_carlo(random_rows):
    inputs = random_rows(4, 10)
    ends = {"bootstrap_value": inputs["values"][:, 0] + 1, "terminated": inputs["terminated"]}
    advantages, returns = gae(
        inputs["rewards"], inputs["values"], gamma=0.9, gae_lambda=1.0, mask=inputs["mask"], **ends
    )
    monte_carlo = discounted_returns(inputs["rewards"], gamma=0.9, mask=inputs["mask"], **ends)
    torch.testing.assert_close(returns, monte_carlo)
    values = inputs["values"].masked_fill(~inputs["mask"], 0)
    torch.testing.assert_close(advantages, monte_carlo - values)


def test_lambda_zero_is_the_temporal_difference():
    rewards, values = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 5.0])
    bootstrap_value = torch.tensor(7.0)
    advantages, _ = gae(rewards, values, gamma=0.5, gae_lambda=0.0, bootstrap_value=bootstrap_value)
    torch.testing.assert_close(advantages, torch.tensor([1 + 2.5 - 3, 2 + 3.5 - 5]))


def test_gamma_zero_is_the_immediate_reward(random_rows):
    inputs = random_rows(2, 6)
    advantages, returns = gae(inputs["rewards"], inputs["values"], gamma=0.0, gae_lambda=0.9)
    torch.testing.assert_close(advantages, inputs["rewards"] - inputs["values"])
    torch.testing.assert_close(returns, inputs["rewards"])
