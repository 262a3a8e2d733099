"""Whether the machine is disturbed right now, told by a probe and not by who is being timed.

Two threads that the system runs on one core, or a guest beside ours, slow an op by half for seconds
at a time. A fixed bit of arithmetic on all threads shows it, against the least time that it has
taken since the run began.
"""

import time

import torch

DISTURBED = 1.25  # times the least time; a quiet machine's probes lie within a few percent
_FLOATS = 2**15  # a thread's share: it stays in the cache


class Probe:
    """On the CPU; a GPU that is ours alone needs none, and is always quiet here."""

    def __init__(self, device: torch.device) -> None:
        self._on_cpu = device.type == "cpu"
        self._best = torch.inf
        if self._on_cpu:
            self._x = torch.rand(_FLOATS * torch.get_num_threads())
            self._out = torch.empty_like(self._x)
            for _ in range(50):
                self()

    def __call__(self) -> float:
        """Seconds. The least of three: threads that slept through another's single-threaded turn
        take time to wake."""
        if not self._on_cpu:
            return 1.0
        seconds = min(self._seconds() for _ in range(3))
        self._best = min(self._best, seconds)
        return seconds

    def is_quiet(self, seconds: float) -> bool:
        return self.slowness(seconds) <= DISTURBED

    def slowness(self, seconds: float) -> float:
        """1 is as fast as this machine was at its best."""
        return seconds / self._best if self._on_cpu else 1.0

    def wait(self, seconds: float) -> None:
        """For a quiet moment, but no longer than that."""
        start = time.perf_counter()
        while not self.is_quiet(self()) and time.perf_counter() - start < seconds:
            time.sleep(0.05)

    def _seconds(self) -> float:
        start = time.perf_counter()
        with torch.no_grad():
            for _ in range(10):
                torch.exp(self._x, out=self._out)
        return time.perf_counter() - start
