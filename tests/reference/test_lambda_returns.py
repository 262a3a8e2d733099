import torch

from fastrl.reference import discounted_returns, gae, lambda_returns, n_step_returns

HALVES = {"gamma": 0.5, "gae_lambda": 0.5}


def only(inputs):
    """Without what lambda_returns does not take."""
    return {name: x for name, x in inputs.items() if name not in ("q_values", "log_ratio")}


def test_masked_row(masked_row):
    # G: t4 8 + 32/2 = 24; t3 ends 2; t2 4 + (4/2 + 2/2)/2 = 5.5; t0 1 + (8/2 + 5.5/2)/2 = 4.375
    expected = torch.tensor([[4.375, 0, 5.5, 2, 24, 0]])
    torch.testing.assert_close(lambda_returns(**only(masked_row), **HALVES), expected)


def test_packed_rows(packed_rows):
    # second segment: t3 24; t2 ends 4; t1 truncated 2 + 10/2; t0 1 + (4/2 + 7/2)/2
    expected = torch.tensor([4.375, 0, 5.5, 2, 24, 0, 3.75, 7, 4, 24])
    torch.testing.assert_close(lambda_returns(**only(packed_rows), **HALVES), expected)


def test_recursion(random_rows):
    """G_t = r_t + c_t [(1 - lambda k_t) v_{t+1} + lambda k_t G_{t+1}], step by step."""
    inputs = random_rows(1, 15, seed=8)
    ended, broken = inputs["terminated"], inputs["truncated"]
    values, rewards = inputs["values"], inputs["rewards"]
    next_values = torch.cat([values[:, 1:], torch.tensor([[0.3]])], 1)  # as a critic would
    next_values = torch.where(broken, inputs["next_values"], next_values)
    expected = torch.zeros_like(rewards)
    later = next_values[0, -1]
    for t in reversed(range(15)):
        c = 0.0 if ended[0, t] else 0.9
        lam = 0.0 if broken[0, t] else 0.6
        later = rewards[0, t] + c * ((1 - lam) * next_values[0, t] + lam * later)
        expected[0, t] = later
    got = lambda_returns(
        rewards,
        values,
        gamma=0.9,
        gae_lambda=0.6,
        next_values=next_values,
        terminated=ended,
        truncated=broken,
    )
    assert ended.any() and broken.any()
    torch.testing.assert_close(got, expected)


def test_equals_the_returns_of_gae(random_rows):
    inputs = only(random_rows(4, 9))
    torch.testing.assert_close(lambda_returns(**inputs), gae(**inputs)[1], rtol=0, atol=0)


def test_lambda_one_and_zero(random_rows):
    inputs = random_rows(3, 7)
    rewards, values, mask = inputs["rewards"], inputs["values"], inputs["mask"]
    ends = {"mask": mask, "bootstrap_value": values[:, 0] - 1, "gamma": 0.9}
    got = lambda_returns(rewards, values, gae_lambda=1.0, **ends)
    torch.testing.assert_close(got, discounted_returns(rewards, **ends))
    got = lambda_returns(rewards, values, gae_lambda=0.0, **ends)
    torch.testing.assert_close(got, n_step_returns(rewards, values, n=1, **ends))


def test_mixture_of_n_step_returns():
    """G^lambda = (1 - lambda) sum_n lambda^(n-1) G^n + lambda^(T-1) G^T at the first step."""
    torch.manual_seed(0)
    rewards, values = torch.randn(2, 4, dtype=torch.float64)
    end = {"gamma": 0.9, "bootstrap_value": torch.tensor(0.7, dtype=torch.float64)}
    g = [n_step_returns(rewards, values, n=n, **end)[0] for n in (1, 2, 3, 4)]
    mixture = 0.5 * (g[0] + 0.5 * g[1] + 0.25 * g[2]) + 0.125 * g[3]
    got = lambda_returns(rewards, values, gae_lambda=0.5, **end)[0]
    torch.testing.assert_close(got, mixture)
