"""Timing: all contestants of a case take turns, so that a drift of the machine hits all of them."""

import gc
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True)
class Budget:
    """How long the contestants of a case may take."""

    seconds: float  # for the timed launches of one contestant
    least_rounds: int
    most_rounds: int
    turn_seconds: float = 0.004  # so many launches per turn that the clock's own error is small


FULL = Budget(seconds=1.0, least_rounds=5, most_rounds=31)
QUICK = Budget(seconds=0.4, least_rounds=3, most_rounds=15)
# What takes seconds a call would take minutes of the run, and its share of noise is small.
_SLOW, _SLOW_ROUNDS = 1.0, 3


@dataclass
class Contestant:
    """One implementation of a case.

    call: one launch.
    before: untimed work that each launch needs (a forward pass, an input restored), or None.
    """

    call: Callable[[], Any]
    before: Callable[[], Any] | None = None
    launches: int = 1
    rounds: int = 1
    times: dict[int, float] = field(default_factory=dict)  # seconds per launch, by round

    def plan(self, budget: Budget, device: torch.device, once: float) -> None:
        """Launches per turn and number of rounds, from the seconds of one call."""
        if self.before is None and once < budget.turn_seconds:
            for _ in range(2):  # a microsecond's call needs a loop to be timed at all
                self.launches = max(1, min(20000, round(budget.turn_seconds / max(once, 1e-9))))
                once = _seconds(self, device) / self.launches
        rounds = int(budget.seconds / max(once * self.launches, 1e-9))
        least = budget.least_rounds if once < _SLOW else min(_SLOW_ROUNDS, budget.least_rounds)
        self.rounds = min(max(rounds, least), budget.most_rounds)

    def ready(self) -> None:
        if self.before is not None:
            self.before()

    def warm(self) -> None:
        """Untimed, at the start of a turn: caches hold another's data, and the memory that others
        gave back to the system is slow to come again."""
        self.ready()
        self.call()
        self.ready()

    def launch(self) -> None:
        for _ in range(self.launches):
            self.call()


def synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _seconds(contestant: Contestant, device: torch.device) -> float:
    """One turn. On a GPU between two events of its stream: what the host needs to wait for it and
    to look at a clock is not the op's time; what it needs to launch is, where the GPU waits."""
    synchronize(device)
    if device.type == "cuda":
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        contestant.launch()
        after.record()
        synchronize(device)
        return before.elapsed_time(after) / 1e3
    start = time.perf_counter()
    contestant.launch()
    synchronize(device)
    return time.perf_counter() - start


def take_turns(
    ours: Contestant,
    others: list[Contestant],
    device: torch.device,
    *,
    run_rounds: "RunRounds | None" = None,
) -> None:
    """Fill in `times`. In each round the others take their turns, then we take ours.

    A contestant that has fewer rounds than we do takes them spread over the whole time.

    Args:
        run_rounds: times our turns; pytest-benchmark's clock in place of our own.
    """
    total = max(c.rounds for c in (ours, *others))

    def before_round(r: int) -> None:
        # Another one first each time: nobody always follows the one that empties the caches.
        for i in range(len(others)):
            other = others[(i + r) % len(others)]
            if (r + 1) * other.rounds // total > r * other.rounds // total:
                other.warm()
                other.times[r] = _seconds(other, device) / other.launches
        ours.warm()

    with no_garbage_collection():
        seconds = (run_rounds or _run_rounds)(ours, before_round, total, device)
    ours.times.update({r: s / ours.launches for r, s in enumerate(seconds)})


RunRounds = Callable[[Contestant, Callable[[int], None], int, torch.device], list[float]]


def _run_rounds(
    ours: Contestant, before_round: Callable[[int], None], total: int, device: torch.device
) -> list[float]:
    """Seconds of each of our turns."""
    seconds = []
    for r in range(total):
        before_round(r)
        seconds.append(_seconds(ours, device))
    return seconds


@contextmanager
def no_garbage_collection():
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
