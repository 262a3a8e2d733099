"""Timing: all contestants of a case take turns, so that a drift of the machine hits all of them."""

import gc
import math
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from bench import memory
from bench.quiet import Probe


@dataclass(frozen=True)
class Budget:
    """How long the contestants of a case may take."""

    seconds: float  # for the timed launches of one contestant
    least_rounds: int
    most_rounds: int
    turn_seconds: float = 0.004  # so many launches per turn that the clock's own error is small
    patience_seconds: float = 0.0  # how long a case may wait for quiet moments, and use them


FULL = Budget(seconds=1.0, least_rounds=7, most_rounds=31, patience_seconds=20.0)
QUICK = Budget(seconds=0.5, least_rounds=4, most_rounds=13, patience_seconds=0.5)
# A GPU is ours alone: it is quiet, or will not become so.
FULL_GPU = Budget(seconds=0.8, least_rounds=5, most_rounds=31)
QUICK_GPU = Budget(seconds=0.4, least_rounds=3, most_rounds=15)  # many cases in nine minutes

# What takes seconds a call would take minutes of the run, and its share of noise is small.
SLOW, _SLOW_ROUNDS = 1.0, 3
_VERY_SLOW = 10.0  # no round: the call that was planned with has told enough


def budget_for(device: torch.device, *, quick: bool) -> Budget:
    if device.type == "cuda":
        return QUICK_GPU if quick else FULL_GPU
    return QUICK if quick else FULL


@dataclass
class Contestant:
    """One implementation of a case.

    call: one launch.
    before: untimed work that each launch needs (a forward pass, an input restored), or None.
    times: seconds per launch, by round.
    probes: the slower of the two around each of these turns.
    kept: the times of the turns in quiet moments, or of the quietest ones.
    failed: what it raised in a turn; it takes no more of them.
    """

    call: Callable[[], Any]
    before: Callable[[], Any] | None = None
    launches: int = 1
    rounds: int = 1
    times: dict[int, float] = field(default_factory=dict)
    probes: dict[int, float] = field(default_factory=dict)
    kept: list[float] = field(default_factory=list)
    is_slow: bool = False
    failed: str | None = None

    def plan(self, budget: Budget, device: torch.device, once: float) -> None:
        """Launches per turn and number of rounds, from the seconds of one call."""
        if self.before is None and once < budget.turn_seconds:
            for _ in range(2):  # a microsecond's call needs a loop to be timed at all
                self.launches = max(1, min(20000, round(budget.turn_seconds / max(once, 1e-9))))
                once = _seconds(self, device) / self.launches
        self.is_slow = once >= SLOW
        if once >= _VERY_SLOW:
            self.times, self.probes, self.rounds = {0: once}, {0: math.inf}, 0
            return
        rounds = int(budget.seconds / max(once * self.launches, 1e-9))
        least = min(_SLOW_ROUNDS, budget.least_rounds) if self.is_slow else budget.least_rounds
        self.rounds = min(max(rounds, least), budget.most_rounds)

    def ready(self) -> None:
        if self.before is not None:
            self.before()

    def warm(self) -> None:
        """Untimed, at the start of a turn: caches hold another's data, and the memory that others
        gave back to the system is slow to come again. A call of seconds does not notice."""
        self.ready()
        if not self.is_slow:
            self.call()
            self.ready()

    def launch(self) -> None:
        for _ in range(self.launches):
            self.call()

    def fail(self, reason: str) -> None:
        """Without what its calls hold: the others need the memory."""
        self.failed, self.call, self.before = reason, lambda: None, None

    def fresh(self, rounds: int) -> "Contestant":
        """With as many rounds at most, and with none taken yet; one too slow for any, as it is."""
        taken: dict[str, Any] = {"times": {}, "probes": {}} if self.rounds else {}
        return replace(self, rounds=min(rounds, self.rounds), kept=[], **taken)

    @property
    def wanted(self) -> int:
        """Quiet turns that are enough."""
        return min(self.rounds, max(3, (self.rounds + 1) // 2))

    def lacks_quiet_turns(self, probe: Probe) -> bool:
        quiet = sum(map(probe.is_quiet, self.probes.values()))
        return quiet < self.wanted and len(self.times) < 2 * self.rounds

    def keep_quiet_turns(self, probe: Probe) -> None:
        by_slowness = sorted(self.times, key=lambda r: probe.slowness(self.probes[r]))
        quiet = sum(map(probe.is_quiet, self.probes.values()))
        self.kept = [self.times[r] for r in by_slowness[: max(quiet, self.wanted, 1)]]


def described(raised: Exception) -> str:
    """In one line."""
    first_line = str(raised).strip().split("\n")[0][:120]
    return f"raised {type(raised).__name__}: {first_line}"


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
    probe: Probe,
    patience_seconds: float = 0.0,
    run_rounds: "RunRounds | None" = None,
) -> None:
    """Fill in `times` and `kept`. In each round the others take their turns, then we take ours.

    A contestant that has fewer rounds than we do takes them spread over the whole time. Who has
    had too few turns in quiet moments then waits for some, as long as patience lasts. One of the
    others that raises is out, and the rest go on.

    Args:
        run_rounds: times our turns; pytest-benchmark's clock in place of our own.
    """
    total = max(c.rounds for c in (ours, *others))
    before = probe()

    def end_turn(contestant: Contestant, r: int) -> None:
        nonlocal before
        after = probe()
        contestant.probes[r] = max(before, after)
        before = after

    def take_turn(contestant: Contestant, r: int) -> None:
        if contestant.failed is not None:
            return
        try:
            contestant.warm()
            contestant.times[r] = _seconds(contestant, device) / contestant.launches
        except Exception as raised:
            if contestant is ours:
                raise
            contestant.fail(described(raised))
        if contestant.failed is not None:  # and the frames that held what did not fit are gone
            memory.release(device)
        end_turn(contestant, r)

    def before_round(r: int) -> None:
        if r > 0:
            end_turn(ours, r - 1)
        # Another one first each time: nobody always follows the one that empties the caches.
        for i in range(len(others)):
            other = others[(i + r) % len(others)]
            if (r + 1) * other.rounds // total > r * other.rounds // total:
                take_turn(other, r)
        ours.warm()

    with no_garbage_collection():
        seconds = (run_rounds or _run_rounds)(ours, before_round, total, device)
        end_turn(ours, total - 1)
        ours.times.update({r: s / ours.launches for r, s in enumerate(seconds)})
        for r in range(total, 2 * total) if run_rounds is None else ():
            for contestant in (ours, *others):
                if contestant.failed is not None:
                    continue
                if patience_seconds > 0 and contestant.lacks_quiet_turns(probe):
                    start = time.perf_counter()
                    probe.wait(patience_seconds)
                    before = probe()
                    take_turn(contestant, r)
                    patience_seconds -= time.perf_counter() - start
    for contestant in (ours, *others):
        if contestant.failed is None:
            contestant.keep_quiet_turns(probe)


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
