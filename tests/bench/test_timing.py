import os
import threading
import time

import pytest
import torch

from bench import memory
from bench.case import Target
from bench.field import quantile
from bench.quiet import DISTURBED, Probe
from bench.timing import Budget, Contestant, take_turns

CPU = torch.device("cpu")


class FakeProbe:
    """A machine that is slow for the probes in `disturbed`, by their number."""

    def __init__(self, disturbed=()):
        self.disturbed, self.calls, self.waited = disturbed, 0, 0

    def __call__(self):
        self.calls += 1
        return 2.0 if self.calls - 1 in self.disturbed else 1.0

    def slowness(self, seconds):
        return seconds

    def is_quiet(self, seconds):
        return seconds == 1.0

    def wait(self, seconds):
        self.waited += 1


def test_contestants_take_turns_and_fewer_rounds_are_spread():
    order = []
    ours = Contestant(lambda: order.append("ours"), rounds=6)
    fast = Contestant(lambda: order.append("fast"), rounds=6)
    slow = Contestant(lambda: order.append("slow"), rounds=2)
    take_turns(ours, [fast, slow], CPU, probe=FakeProbe())
    assert order.count("ours") == order.count("fast") == 12  # an untimed call in each turn
    assert sorted(slow.times) == [2, 5] and sorted(ours.times) == list(range(6))
    assert "".join(name[0] for name in order[::2]) == "fofofsofofosfo"  # the first one changes


def test_who_takes_a_minute_is_called_no_more():
    ours, slow = Contestant(lambda: None, rounds=3), Contestant(lambda: pytest.fail("called"))
    slow.plan(Budget(1.0, 7, 31), CPU, once=84.0)
    take_turns(ours, [slow], CPU, probe=FakeProbe(), patience_seconds=1.0)
    assert slow.kept == [84.0] and slow.failed is None and len(ours.kept) == 3


def test_what_each_launch_needs_is_not_timed():
    contestant = Contestant(lambda: None, before=lambda: time.sleep(0.01))
    contestant.plan(Budget(0.01, 2, 3), CPU, once=1e-6)
    take_turns(contestant, [], CPU, probe=FakeProbe())
    assert contestant.launches == 1 and min(contestant.times.values()) < 0.005


def test_turns_in_disturbed_moments_are_left_out():
    """A probe stands before the first turn and after each: number 2 spoils turns 1 and 2."""
    ours, other = Contestant(lambda: None, rounds=5), Contestant(lambda: None, rounds=5)
    take_turns(ours, [other], CPU, probe=FakeProbe(disturbed=[2, 3]))
    assert [len(c.times) for c in (ours, other)] == [5, 5]
    # Turns go other, ours, other, ours, ...: ours loses rounds 0 and 1, the other one round 1.
    assert ours.kept == [ours.times[r] for r in (2, 3, 4)]
    assert other.kept == [other.times[r] for r in (0, 2, 3, 4)]


def test_who_has_too_few_quiet_turns_waits_for_some_but_not_for_ever():
    ours = Contestant(lambda: None, rounds=4)
    probe = FakeProbe(disturbed=range(5))
    take_turns(ours, [], CPU, probe=probe, patience_seconds=1.0)
    assert sorted(ours.times) == [0, 1, 2, 3, 4, 5, 6] and probe.waited == 3
    assert ours.kept == [ours.times[4], ours.times[5], ours.times[6]]
    ours, probe = Contestant(lambda: None, rounds=6), FakeProbe(disturbed=range(1000))
    take_turns(ours, [], CPU, probe=probe, patience_seconds=1.0)
    assert len(ours.times) == 12 and len(ours.kept) == 3  # all are alike: so many count as must
    ours, probe = Contestant(lambda: None, rounds=4), FakeProbe(disturbed=range(1000))
    take_turns(ours, [], CPU, probe=probe)
    assert len(ours.times) == 4 and probe.waited == 0
    ours = Contestant(lambda: time.sleep(0.02), rounds=6)  # patience pays for the turns as well
    take_turns(ours, [], CPU, probe=FakeProbe(disturbed=range(1000)), patience_seconds=0.05)
    assert 6 < len(ours.times) <= 8


@pytest.fixture
def all_cores():
    """A probe of one thread slips in between the slices of time that others get."""
    before = torch.get_num_threads()
    torch.set_num_threads(max(2, os.cpu_count()))
    yield
    torch.set_num_threads(before)


def test_the_probe_sees_work_beside_it(all_cores):
    probe = Probe(CPU)
    calm, deadline = probe.slowness(probe()), time.monotonic() + 10
    while calm >= DISTURBED and time.monotonic() < deadline:  # the machine may be slow just now
        calm = min(calm, probe.slowness(probe()))
    assert 1.0 <= calm < DISTURBED
    stop = threading.Event()

    def work():
        x = torch.rand(1 << 22)  # long calls: a short one mostly waits for the interpreter
        while not stop.is_set():
            x.exp()

    threads = [threading.Thread(target=work) for _ in range(4 * os.cpu_count())]
    for thread in threads:
        thread.start()
    busy, deadline = [1.0], time.monotonic() + 10
    while busy[len(busy) // 2] <= DISTURBED and time.monotonic() < deadline:  # until they run
        busy = sorted(probe.slowness(probe()) for _ in range(20))
    stop.set()
    for thread in threads:
        thread.join()
    assert busy[10] > DISTURBED
    assert Probe(torch.device("cuda")).is_quiet(9.0)


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
