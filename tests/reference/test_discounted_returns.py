import torch

from fastrl.reference import discounted_returns


def only(inputs):
    """Without what discounted_returns does not take."""
    names = ["rewards", "bootstrap_value", "next_values", "terminated", "truncated", "mask"]
    return {name: inputs[name] for name in [*names, "cu_seqlens"] if name in inputs}


def test_masked_row(masked_row):
    # t4: 8 + 32/2; t3 ends: 2; t2: 4 + 2/2; t0 skips t1: 1 + 5/2
    expected = torch.tensor([[3.5, 0, 5, 2, 24, 0]])
    torch.testing.assert_close(discounted_returns(**only(masked_row), gamma=0.5), expected)


def test_broken_row(broken_row):
    # t3: 8 + 32/2; t2 ends: 4; t1 truncated: 2 + 10/2; t0: 1 + 7/2, not next_values
    expected = torch.tensor([[4.5, 7, 4, 24]])
    torch.testing.assert_close(discounted_returns(**only(broken_row), gamma=0.5), expected)


def test_packed_rows(packed_rows):
    expected = torch.tensor([3.5, 0, 5, 2, 24, 0, 4.5, 7, 4, 24])
    torch.testing.assert_close(discounted_returns(**only(packed_rows), gamma=0.5), expected)


def test_next_values_count_at_truncations_and_the_last_step_alone(broken_row):
    broken_row["next_values"] = torch.tensor([[float("nan"), 10.0, 1e9, 32.0]])
    expected = torch.tensor([[4.5, 7, 4, 24]])
    torch.testing.assert_close(discounted_returns(**only(broken_row), gamma=0.5), expected)


def test_gamma_zero_gives_the_rewards(random_rows):
    rewards = random_rows(3, 8)["rewards"]
    torch.testing.assert_close(discounted_returns(rewards, gamma=0.0), rewards, rtol=0, atol=0)


def test_gamma_one_gives_sums_of_what_follows():
    rewards = torch.tensor([1.0, 2.0, 4.0, 8.0])
    expected = torch.tensor([15.0, 14.0, 12.0, 8.0])
    torch.testing.assert_close(discounted_returns(rewards, gamma=1.0), expected)


def test_gamma_per_step_discounts_what_follows_that_step():
    rewards, gamma = torch.tensor([1.0, 1.0, 1.0]), torch.tensor([0.5, 0.0, 0.25])
    bootstrap_value = torch.tensor(8.0)
    returns = discounted_returns(rewards, gamma=gamma, bootstrap_value=bootstrap_value)
    torch.testing.assert_close(returns, torch.tensor([1.5, 1.0, 3.0]))
