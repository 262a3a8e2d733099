import time

import torch

from bench import memory
from bench.case import Target
from bench.field import quantile
from bench.timing import Budget, Contestant, take_turns

CPU = torch.device("cpu")


def test_contestants_take_turns_and_fewer_rounds_are_spread():
    order = []
    ours = Contestant(lambda: order.append("ours"), rounds=6)
    fast = Contestant(lambda: order.append("fast"), rounds=6)
    slow = Contestant(lambda: order.append("slow"), rounds=2)
    take_turns(ours, [fast, slow], CPU)
    assert order.count("ours") == order.count("fast") == 12  # an untimed call in each turn
    assert sorted(slow.times) == [2, 5] and sorted(ours.times) == list(range(6))
    assert "".join(name[0] for name in order[::2]) == "fofofsofofosfo"  # the first one changes


def test_what_each_launch_needs_is_not_timed():
    contestant = Contestant(lambda: None, before=lambda: time.sleep(0.01))
    contestant.plan(Budget(0.01, 2, 3), CPU, once=1e-6)
    take_turns(contestant, [], CPU)
    assert contestant.launches == 1 and max(contestant.times.values()) < 0.005


def test_short_calls_are_looped():
    contestant = Contestant(lambda: None)
    contestant.plan(Budget(0.01, 2, 3, turn_seconds=0.001), CPU, once=1e-5)
    assert contestant.launches > 100


def test_peak_memory_sees_what_was_freed_again_and_nothing_else():
    def call():
        torch.ones(16 * 2**20)  # 64 MiB, gone when the call returns
        return torch.ones(2**20)

    if not memory.can_measure(CPU):
        return
    assert 63 <= memory.peak_extra_mib(call, CPU) <= 72
    assert memory.peak_extra_mib(lambda: None, CPU) < 1


def test_quantiles_interpolate():
    assert quantile([1.0, 2.0, 3.0], 0.5) == 2.0
    assert quantile([1.0, 2.0], 0.2) == 1.2
    assert quantile([7.0], 0.8) == 7.0


def test_targets_hold_at_their_bounds():
    assert Target("numba *", "ratio", at_least=1.5).holds(1.5)
    assert not Target("fastrl", "time_us", at_most=15).holds(15.1)
    assert Target("torchrl *", "ratio", at_least=25).matches("torchrl reward2go")
    assert not Target("fastrl", "ratio", at_least=1).matches("fastrl inplace_backward")
