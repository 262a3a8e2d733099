import statistics

import pytest
import torch

from fastrl.reference import group_advantages

NAN, INF = float("nan"), float("inf")
# groups 7: 1, 2, 6 (mean 3, variance 7); -5: 4, 0 (mean 2, variance 8); out of order
REWARDS = torch.tensor([1.0, 4.0, 2.0, 0.0, 6.0])
GROUP_IDS = torch.tensor([7, -5, 7, -5, 7])


@pytest.mark.parametrize(
    ("estimator", "expected"),
    [
        (
            "grpo",
            [-2 / (7**0.5 + 1e-4), 2 / (8**0.5 + 1e-4), -1 / (7**0.5 + 1e-4)]
            + [-2 / (8**0.5 + 1e-4), 3 / (7**0.5 + 1e-4)],
        ),
        ("dr_grpo", [-2, 2, -1, -2, 3]),
        ("rloo", [1 - 4, 4 - 0, 2 - 3.5, 0 - 4, 6 - 1.5]),
    ],
)
def test_by_hand(estimator, expected):
    advantages, active = group_advantages(REWARDS, GROUP_IDS, estimator=estimator)
    torch.testing.assert_close(advantages, torch.tensor(expected, dtype=torch.float32))
    assert active.all() and active.dtype == torch.bool


@pytest.mark.parametrize("estimator", ["grpo", "dr_grpo", "rloo"])
def test_definition_on_random_groups(estimator):
    torch.manual_seed(0)
    rewards, ids = torch.randn(60, dtype=torch.float64), torch.randint(-3, 3, (60,)) * 2**40
    rewards[17] = NAN
    advantages, active = group_advantages(rewards, ids, estimator=estimator)
    for c in range(60):
        if c == 17:
            assert not active[c] and advantages[c] == 0
            continue
        group = [rewards[k].item() for k in range(60) if ids[k] == ids[c] and k != 17]
        others = [rewards[k].item() for k in range(60) if ids[k] == ids[c] and k not in (17, c)]
        r, mean = rewards[c].item(), statistics.fmean(group)
        expected = {
            "grpo": lambda g=group, r=r, m=mean: (r - m) / (statistics.stdev(g) + 1e-4),
            "dr_grpo": lambda r=r, m=mean: r - m,
            "rloo": lambda o=others, r=r: r - statistics.fmean(o),
        }[estimator]()
        assert advantages[c].item() == pytest.approx(expected, rel=1e-12)
        assert active[c]


@pytest.mark.parametrize("estimator", ["grpo", "dr_grpo", "rloo"])
def test_nothing_to_learn(estimator):
    # a group of one; one of equals whose rounded mean is not their value; one left with one
    rewards = torch.tensor([3.0, 0.1, 0.1, 0.1, 5.0, NAN, INF, 1.0, 2.0, -INF])
    ids = torch.tensor([0, 1, 1, 1, 2, 2, 2, 3, 3, 3])
    advantages, active = group_advantages(rewards, ids, estimator=estimator)
    assert active.tolist() == [False] * 7 + [True, True, False]
    assert (advantages[~active] == 0).all()
    assert advantages[8] > 0 and advantages[7] == -advantages[8]


def test_empty_and_dtypes():
    advantages, active = group_advantages(torch.zeros(0), torch.zeros(0, dtype=torch.int64))
    assert advantages.shape == active.shape == (0,) and active.dtype == torch.bool
    assert group_advantages(REWARDS.bfloat16(), GROUP_IDS)[0].dtype == torch.float32
    assert group_advantages(REWARDS.double(), GROUP_IDS)[0].dtype == torch.float64


def test_unknown_estimator():
    with pytest.raises(ValueError, match="group_advantages: expected estimator .*, got 'ppo'"):
        group_advantages(REWARDS, GROUP_IDS, estimator="ppo")
