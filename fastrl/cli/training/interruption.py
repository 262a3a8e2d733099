"""Ctrl-C and SIGTERM end a run between two steps, with everything saved."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from fastrl.trainers._exchange import Exchange


class Interrupted(BaseException):
    """The run was asked to stop. No Exception: a reward function's errors are caught and counted.

    Args:
        signal_number: SIGINT or SIGTERM.
    """

    def __init__(self, signal_number: int) -> None:
        super().__init__(signal.Signals(signal_number).name)
        self.signal_number = signal_number


class StopRequest:
    """Remembers that a signal came.

    Args:
        workers: several processes that end together; None: this one is alone.
    """

    def __init__(self, workers: Exchange | None = None) -> None:
        self.signal_number: int | None = None
        self._workers = Exchange(None) if workers is None else workers
        self._is_at_once = False

    def check(self) -> None:
        """Raise Interrupted if a signal came, to one of several processes in all."""
        for number in self._workers.told("signals", self.signal_number):
            if number is not None:
                raise Interrupted(number)

    @contextmanager
    def listening(self) -> Iterator["StopRequest"]:
        """Catch signals; a second Ctrl-C stops at once, as it would have without us.

        A second SIGTERM does not: whatever sends it may send it to the whole group of processes as
        well, and it means the same.
        """
        numbers = (int(signal.SIGINT), int(signal.SIGTERM))
        previous = {number: signal.getsignal(number) for number in numbers}

        def on_signal(number: int, frame: FrameType | None) -> None:
            self.signal_number = number
            if number == signal.SIGINT:
                signal.signal(number, previous[number])
            if self._is_at_once:
                raise Interrupted(number)

        for number in previous:
            signal.signal(number, on_signal)
        try:
            yield self
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Within, a signal raises Interrupted where it comes: for work that nothing depends on.

        Several processes, in each of which it comes elsewhere, wait for the next check.
        """
        self.check()
        self._is_at_once = self._workers.count == 1
        try:
            yield
        finally:
            self._is_at_once = False
