import torch

from fastrl.reference import lambda_returns, retrace_returns

HALVES = {"gamma": 0.5, "gae_lambda": 0.5}


def test_masked_row(masked_row):
    # t4: 8 + 32/2; t3 ends: 2; t2: 4 + (4 + (2 - 6)/2)/2 = 5, ratio 1 at t3
    # t0: 1 + (8 + (5 - 4)/4)/2, ratio 1/2 at t2
    expected = torch.tensor([[5.125, 0, 5, 2, 24, 0]])
    torch.testing.assert_close(retrace_returns(**masked_row, **HALVES), expected)


def test_broken_row(broken_row):
    # t3: 24; t2 ends: 4; t1 truncated: 2 + 10/2; t0: 1 + (4 + (7 - 3)/2)/2, ratio 2 clipped to 1
    expected = torch.tensor([[4.0, 7, 4, 24]])
    torch.testing.assert_close(retrace_returns(**broken_row, **HALVES), expected)


def test_packed_rows(packed_rows):
    expected = torch.tensor([5.125, 0, 5, 2, 24, 0, 4, 7, 4, 24])
    torch.testing.assert_close(retrace_returns(**packed_rows, **HALVES), expected)


def test_definition_of_the_paper():
    """G_s = q_s + sum_t gamma^(t-s) (prod_{s<i<=t} w_i) (r_t + gamma v_{t+1} - q_t): eq. 3."""
    torch.manual_seed(2)
    rewards, values, q_values, log_ratio = torch.randn(4, 7, dtype=torch.float64)
    end = torch.tensor(0.4, dtype=torch.float64)
    got = retrace_returns(
        rewards, values, q_values, log_ratio, gamma=0.9, gae_lambda=0.7, bootstrap_value=end
    )
    weight = 0.7 * log_ratio.exp().clamp(max=1)
    delta = rewards + 0.9 * torch.cat([values[1:], end[None]]) - q_values
    expected = [
        q_values[s]
        + sum(0.9 ** (t - s) * weight[s + 1 : t + 1].prod() * delta[t] for t in range(s, 7))
        for s in range(7)
    ]
    torch.testing.assert_close(got, torch.stack(expected))


def test_on_policy_with_q_equal_to_v_gives_lambda_returns(random_rows):
    inputs = random_rows(3, 8)
    del inputs["q_values"]
    inputs["log_ratio"] = torch.zeros_like(inputs["rewards"])
    inputs["gae_lambda"] = 0.8
    got = retrace_returns(**inputs, q_values=inputs["values"])
    del inputs["log_ratio"]
    torch.testing.assert_close(got, lambda_returns(**inputs))
