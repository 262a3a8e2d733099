import itertools
import math
import statistics
from fractions import Fraction

import pytest
import torch

from fastrl.reference import group_advantages

NAN, INF = float("nan"), float("inf")
EVERY = [("grpo", None), ("dr_grpo", None), ("rloo", None), ("rloo_std", None)] + [
    ("max_at_k", k) for k in (1, 2, 3)
]
every_estimator = pytest.mark.parametrize(("estimator", "k"), EVERY)
# groups 7: 1, 2, 6 (mean 3, variance 7); -5: 4, 0 (mean 2, variance 8); out of order
REWARDS = torch.tensor([1.0, 4.0, 2.0, 0.0, 6.0])
GROUP_IDS = torch.tensor([7, -5, 7, -5, 7])


@pytest.mark.parametrize(
    ("estimator", "k", "expected"),
    [
        (
            "grpo",
            None,
            [-2 / (7**0.5 + 1e-4), 2 / (8**0.5 + 1e-4), -1 / (7**0.5 + 1e-4)]
            + [-2 / (8**0.5 + 1e-4), 3 / (7**0.5 + 1e-4)],
        ),
        ("dr_grpo", None, [-2, 2, -1, -2, 3]),
        ("rloo", None, [1 - 4, 4 - 0, 2 - 3.5, 0 - 4, 6 - 1.5]),
        (
            "rloo_std",
            None,
            [-3 / (7**0.5 + 1e-4), 4 / (8**0.5 + 1e-4), -1.5 / (7**0.5 + 1e-4)]
            + [-4 / (8**0.5 + 1e-4), 4.5 / (7**0.5 + 1e-4)],
        ),
        ("max_at_k", 1, [1 - 4, 4 - 0, 2 - 3.5, 0 - 4, 6 - 1.5]),
    ],
)
def test_by_hand(estimator, k, expected):
    advantages, active = group_advantages(REWARDS, GROUP_IDS, estimator=estimator, k=k)
    torch.testing.assert_close(advantages, torch.tensor(expected, dtype=torch.float32))
    assert active.all() and active.dtype == torch.bool


def test_max_at_2_by_hand():
    """k = 2. Group 7: rewards 1, 2, 6; 2 (mean over others of max(r, o) - max of both others):

        1: 2 ((2 + 6) / 2 - 6) = -4    2: 2 ((2 + 6) / 2 - 6) = -4    6: 2 (6 - 2) = 8

    Group -5 has two rewards, 4 and 0: the lead of 4 over 0, twice.
    """
    advantages, active = group_advantages(REWARDS, GROUP_IDS, estimator="max_at_k", k=2)
    assert advantages.tolist() == [-4, 8, -4, 0, 8]
    assert active.tolist() == [True, True, True, False, True]
    # three do not make four; without the NaN, two do not make three
    for k, rewards in ((4, [1.0, 2.0, 6.0]), (3, [1.0, 2.0, NAN])):
        advantages, active = group_advantages(
            torch.tensor(rewards), torch.zeros(3, dtype=torch.int64), estimator="max_at_k", k=k
        )
        assert not advantages.any() and not active.any()


def max_at_k(rewards, k):
    """The definition, over all sets of others."""
    out = []
    for i, r in enumerate(rewards):
        others = rewards[:i] + rewards[i + 1 :]
        own = [max(r, *rest) if rest else r for rest in itertools.combinations(others, k - 1)]
        sets = [*itertools.combinations(others, k)] or [others]
        out.append(k * (statistics.fmean(own) - statistics.fmean(map(max, sets))))
    return out


@pytest.mark.parametrize("n", [2, 3, 4, 7, 9])
@pytest.mark.parametrize("levels", [2, 4, 1000])  # of reward: success or not, ties, none
def test_max_at_k_over_all_sets(n, levels):
    torch.manual_seed(n)
    for k in range(1, n + 1):
        rewards = torch.randint(levels, (n,)).double() / 8 - 3
        ids = torch.zeros(n, dtype=torch.int64)
        advantages, active = group_advantages(rewards, ids, estimator="max_at_k", k=k)
        expected = torch.tensor(max_at_k(rewards.tolist(), k), dtype=torch.float64)
        torch.testing.assert_close(advantages, expected, rtol=1e-12, atol=1e-12)
        assert (advantages[~active] == 0).all()
        if n > k:
            assert abs(advantages.sum()) < 1e-11


@pytest.mark.parametrize("k", [1, 2, 3, 4])
@pytest.mark.parametrize("rewards", [[0.0, 1.0, 2.5], [0.0, 1.0, 0.0]])
def test_max_at_k_is_unbiased(k, rewards):
    """All 81 groups of four from a policy over three completions, weighted by probability."""
    n, actions = 4, range(3)
    logits = torch.tensor([0.3, -0.7, 0.1], dtype=torch.float64, requires_grad=True)
    logprobs = logits.log_softmax(0)
    expected_maximum = sum(
        logprobs[list(drawn)].sum().exp() * max(rewards[a] for a in drawn)
        for drawn in itertools.product(actions, repeat=k)
    )
    (truth,) = torch.autograd.grad(expected_maximum, logits, retain_graph=True)
    surrogate = torch.zeros((), dtype=torch.float64)
    for drawn in map(list, itertools.product(actions, repeat=n)):
        group = torch.tensor([rewards[a] for a in drawn], dtype=torch.float64)
        ids = torch.zeros(n, dtype=torch.int64)
        advantages, _ = group_advantages(group, ids, estimator="max_at_k", k=k)
        probability = logprobs[drawn].sum().exp().detach()
        surrogate = surrogate + probability * (advantages * logprobs[drawn]).mean()
    (got,) = torch.autograd.grad(surrogate, logits)
    torch.testing.assert_close(got, truth, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(("n", "c", "k"), [(3000, 3, 7), (3000, 40, 900), (5000, 1, 4999)])
def test_pass_at_k_in_groups_of_thousands(n, c, k):
    """Whole numbers: a success is worth k C(n - c, k) / C(n - 1, k), the share of sets of others
    without one; the advantages of the group sum to 0."""
    rewards = torch.zeros(n, dtype=torch.float64)
    rewards[torch.randperm(n)[:c]] = 1
    ids = torch.zeros(n, dtype=torch.int64)
    advantages, active = group_advantages(rewards, ids, estimator="max_at_k", k=k)
    success = Fraction(k * math.comb(n - c, k), math.comb(n - 1, k))
    failure = -success * Fraction(c, n - c)
    assert success > 0 and active.all()
    for value, exact in ((1, success), (0, failure)):
        (got,) = set(advantages[rewards == value].tolist())
        assert got == pytest.approx(float(exact), rel=1e-11)


@every_estimator
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_group_alone_is_bitwise_the_group_in_a_batch_in_any_order(estimator, k, dtype):
    torch.manual_seed(1)
    sizes = [1, 2, 3, 8, 5, 64, 33, 700]
    ids = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    rewards = 100 + torch.randn(len(ids), dtype=dtype)
    rewards[ids == 4] *= 1e30  # whose rounding would show in every other group
    shuffled = torch.randperm(len(ids))
    together = group_advantages(rewards[shuffled], ids[shuffled], estimator=estimator, k=k)
    for g in range(len(sizes)):
        alone = group_advantages(rewards[ids == g], ids[ids == g], estimator=estimator, k=k)
        position = shuffled.argsort()[ids == g]
        for got, expected in zip(alone, together, strict=True):
            assert torch.equal(got, expected[position])


@every_estimator
def test_equal_rewards_get_equal_bits(estimator, k):
    torch.manual_seed(2)
    rewards = torch.randint(7, (999,)).double() / 10
    ids = torch.randint(3, (999,))
    advantages, _ = group_advantages(rewards, ids, estimator=estimator, k=k)
    pairs = set(zip(ids.tolist(), rewards.tolist(), advantages.tolist(), strict=True))
    assert len(pairs) == len({pair[:2] for pair in pairs}) == 21


def test_max_at_k_where_nothing_can_be_learned():
    # every set of three of the others, or two of them and oneself, holds a success
    ids = torch.zeros(6, dtype=torch.int64)
    rewards = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0, 1.0])
    advantages, active = group_advantages(rewards, ids, estimator="max_at_k", k=3)
    assert not advantages.any() and not active.any()
    assert group_advantages(rewards, ids, estimator="max_at_k", k=2)[1].all()
    # six of six: the lead of the best, and of two best none
    for best, expected in ((9.0, 6 * 8.0), (1.0, 0.0)):
        rewards[3] = best
        advantages, active = group_advantages(rewards, ids, estimator="max_at_k", k=6)
        assert advantages.tolist() == [0, 0, 0, expected, 0, 0]
        assert active.tolist() == [False] * 3 + [expected > 0] + [False] * 2


@pytest.mark.parametrize("estimator", ["grpo", "dr_grpo", "rloo", "rloo_std"])
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
            "rloo_std": lambda g=group, o=others, r=r: (
                (r - statistics.fmean(o)) / (statistics.stdev(g) + 1e-4)
            ),
        }[estimator]()
        assert advantages[c].item() == pytest.approx(expected, rel=1e-12)
        assert active[c]


@pytest.mark.parametrize(("estimator", "k"), EVERY[:5])
def test_nothing_to_learn(estimator, k):
    # a group of one; one of equals whose rounded mean is not their value; one left with one
    rewards = torch.tensor([3.0, 0.1, 0.1, 0.1, 5.0, NAN, INF, 1.0, 2.0, -INF])
    ids = torch.tensor([0, 1, 1, 1, 2, 2, 2, 3, 3, 3])
    advantages, active = group_advantages(rewards, ids, estimator=estimator, k=k)
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


def test_k_belongs_to_max_at_k():
    with pytest.raises(ValueError, match="group_advantages: expected k with estimator 'max_at_k'"):
        group_advantages(REWARDS, GROUP_IDS, estimator="max_at_k")
    with pytest.raises(ValueError, match="expected no k with estimator 'rloo', got 2. Leave it"):
        group_advantages(REWARDS, GROUP_IDS, estimator="rloo", k=2)
