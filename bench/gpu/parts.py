"""Runs commands one after the other, each in a process group of its own and under its own limit."""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]

OK, FAILED, LATE = "ok", "failed", "over its limit"
SKIPPED, NOT_REACHED, INTERRUPTED = "skipped", "not reached", "interrupted"

SECONDS = "{seconds}"  # in a command: how long it should take, so as to end by itself

_OWN = 0.8  # of a part's share; the rest is for what cannot be cut short, such as a compilation

_DEATH_S = 10.0  # what a killed process has to end
_LEAST_S = 1.0  # with less time left a part is not begun
_TAIL_LINES, _TAIL_BYTES = 60, 20_000


@dataclass
class Part:
    """A command. limit_s None: its start, and a share of the time that the parts with a limit and
    the starts of the others leave.

    start_s: what it needs before it begins with its work.
    weight: how large a share, beside those of the others.
    verdict: status and reason of a part that is known not to run.
    meanings: status and reason for exit statuses that say more than "failed".
    """

    name: str
    command: list[str]
    limit_s: float | None = None
    start_s: float = 0.0
    weight: float = 1.0
    verdict: tuple[str, str] | None = None
    meanings: Mapping[int, tuple[str, str]] = field(default_factory=dict)


@dataclass
class Outcome:
    name: str
    status: str
    seconds: float = 0.0
    limit_s: float = 0.0
    reason: str = ""
    tail: str = ""  # the end of the log of a part that is not ok

    @property
    def is_bad(self) -> bool:
        return self.status not in (OK, SKIPPED)


class Runner:
    """Parts until a deadline.

    folder: where the logs go.
    seconds: how long all parts together may take, from now on.
    grace_s: what a part over its limit has to write down what it knows, before it is killed.
    """

    def __init__(
        self, folder: Path, env: Mapping[str, str], seconds: float, *, grace_s: float = 4.0
    ) -> None:
        self.outcomes: list[Outcome] = []
        self._folder = folder
        self._env = env
        self._grace_s = grace_s
        self._end = time.monotonic() + seconds

    def run(self, part: Part, later: tuple[Part, ...] = ()) -> Outcome:
        """later: those that still want their share of the time."""
        if part.verdict is not None:
            status, reason = part.verdict
            self.outcomes.append(Outcome(part.name, status, reason=reason))
            return self.outcomes[-1]
        limit = self._limit(part, later)
        outcome = Outcome(part.name, NOT_REACHED, reason="the time was used up")
        self.outcomes.append(outcome)
        if limit < _LEAST_S:
            return outcome
        print(f"{part.name}: at most {limit:.0f} s ...", flush=True)
        outcome.status, outcome.reason, outcome.limit_s = INTERRUPTED, "", limit
        log, start = self._folder / f"{len(self.outcomes)}-{part.name}.log", time.monotonic()
        try:
            outcome.status, outcome.reason = self._run(part, limit, log)
        finally:
            outcome.seconds = time.monotonic() - start
            if outcome.is_bad:
                outcome.tail = tail(log)
            print(f"{part.name}: {outcome.status}, {outcome.seconds:.0f} s", flush=True)
        return outcome

    def run_all(self, parts: list[Part], after_each: Callable[[], None]) -> None:
        """Raises KeyboardInterrupt, the outcomes being complete."""
        for i, part in enumerate(parts):
            try:
                self.run(part, tuple(parts[i + 1 :]))
            except KeyboardInterrupt:
                self.outcomes += [Outcome(p.name, NOT_REACHED) for p in parts[i + 1 :]]
                raise
            after_each()

    def logs(self, most: int) -> str:
        """What the parts printed, of each the last `most` bytes."""
        paths = sorted(self._folder.glob("*.log"), key=lambda p: int(p.name.split("-")[0]))
        return "\n".join(f"==== {path.stem}\n{_end(path, most)}" for path in paths)

    def _limit(self, part: Part, later: tuple[Part, ...]) -> float:
        left = self._end - time.monotonic() - self._grace_s
        if part.limit_s is not None:
            return min(part.limit_s, left)
        waiting = [p for p in later if p.verdict is None]
        left -= sum(p.limit_s for p in waiting if p.limit_s is not None)
        sharing = [part, *(p for p in waiting if p.limit_s is None)]
        starts = sum(p.start_s for p in sharing)
        # Where not even the starts have time, each has as much less.
        begins = part.start_s * min(1.0, left / starts) if starts else 0.0
        return begins + max(0.0, left - starts) * part.weight / sum(p.weight for p in sharing)

    def _run(self, part: Part, limit: float, log: Path) -> tuple[str, str]:
        """Status and reason."""
        with log.open("wb") as output:
            try:
                own = part.start_s + _OWN * max(0.0, limit - part.start_s)
                command = [f"{own:.0f}" if word == SECONDS else word for word in part.command]
                process = subprocess.Popen(
                    command, env=self._env, stdin=subprocess.DEVNULL, stdout=output,
                    stderr=subprocess.STDOUT, start_new_session=True, cwd=ROOT,
                )  # fmt: skip
            except OSError as error:
                return FAILED, str(error)
        in_time = False
        try:
            in_time = _ends(process.pid, limit)
        finally:
            # SIGINT first: pytest then writes down what it has found so far.
            if not in_time:
                os.killpg(process.pid, signal.SIGINT)
                _ends(process.pid, self._grace_s)
            os.killpg(process.pid, signal.SIGKILL)
            # A driver may hold a process whose GPU hangs: the parts that come do not wait for it.
            is_gone = _ends(process.pid, _DEATH_S)
            status = process.wait() if is_gone else None
        if status is None:
            return LATE, "it was killed, and does not end"
        if not in_time:
            return LATE, ""
        failed = (FAILED, f"exit status {status}")
        return (OK, "") if status == 0 else part.meanings.get(status, failed)


def _ends(pid: int, seconds: float) -> bool:
    """Whether the process ends in time. It is left unreaped, so that no other group can have its
    number when what it left behind is killed."""
    end = time.monotonic() + seconds
    while os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        if time.monotonic() >= end:
            return False
        time.sleep(0.02)
    return True


def tail(log: Path) -> str:
    return "\n".join(_end(log, _TAIL_BYTES).splitlines()[-_TAIL_LINES:]) if log.exists() else ""


def _end(path: Path, most: int) -> str:
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - most))
        return file.read().decode(errors="replace")
