"""Two result files side by side: did we become slower, larger or less exact?"""

import math
import statistics
from dataclasses import dataclass

from bench.results import CaseResult, Entry, Results

COPY = "copy bandwidth, GB/s"

# Below these a difference is noise of the measurement, whatever share of the figure it is.
MEMORY_NOISE_MIB = 4.0
ERROR_NOISE = 1e-7


@dataclass
class Change:
    """One figure of one case. `change` > 0 is worse: 0.25 is slower, or larger, by a quarter."""

    case: str
    figure: str
    old: float
    new: float
    change: float
    is_verdict: bool  # decides over the exit status; the others are there to be read
    is_worse: bool = False


def compare(old: Results, new: Results, threshold: float) -> list[Change]:
    """The changes of every case in both files, in the order of the new one.

    How fast we are is taken relative to what ran beside us, which cancels the state of the
    machine. A single peer's ratio moves with that peer's noise; a slow-down of ours moves all of
    them together. The verdict on time is therefore their median.
    """
    before = {case.name: case for case in old.cases}
    changes: list[Change] = []
    for case in new.cases:
        if case.name in before:
            changes += _case_changes(before[case.name], case, threshold)
    return changes


def _case_changes(old: CaseResult, new: CaseResult, threshold: float) -> list[Change]:
    if new.wrong is not None:
        return [Change(new.name, "result", 0.0, math.nan, math.inf, True, old.wrong is None)]
    if old.ours is None or new.ours is None:
        gone = old.ours is not None
        return [Change(new.name, "result", 1.0, math.nan, math.inf, True, True)] if gone else []
    changes = []
    if old.copy_gb_s is not None and new.copy_gb_s is not None:
        copies = old.copy_gb_s, new.copy_gb_s
        changes.append(Change(new.name, COPY, *copies, copies[0] / copies[1] - 1, False))
    relative = [
        Change(new.name, f"times {peer.name}", was.ratio, peer.ratio, was.ratio / peer.ratio - 1,
               False)
        for was, peer in _pairs(old, new) if not peer.name.startswith("fastrl inplace")
        and peer is not new.ours
    ]  # fmt: skip
    shares = old.ours.share_of_ceiling, new.ours.share_of_ceiling
    relative.append(Change(new.name, "share of ceiling", *shares, shares[0] / shares[1] - 1, False))
    middle = statistics.median(c.change for c in relative)
    changes += relative
    times = old.ours.time_us["p50"], new.ours.time_us["p50"]
    changes.append(Change(new.name, "time, us", *times, middle, True, middle > threshold))
    for was, now in _pairs(old, new):
        if now.name.startswith("fastrl") and now.name != "fastrl.reference":
            changes += _size_changes(new.name, was, now, threshold)
    return changes


def _pairs(old: CaseResult, new: CaseResult) -> list[tuple[Entry, Entry]]:
    by_name = {entry.name: entry for entry in old.entries}
    return [(by_name[entry.name], entry) for entry in new.entries if entry.name in by_name]


def _size_changes(case: str, was: Entry, now: Entry, threshold: float) -> list[Change]:
    figures = [("error", was.error, now.error, ERROR_NOISE)]
    if was.extra_memory_mib is not None and now.extra_memory_mib is not None:
        memory = was.extra_memory_mib, now.extra_memory_mib
        figures.append(("extra memory, MiB", *memory, MEMORY_NOISE_MIB))
    changes = []
    for name, a, b, noise in figures:
        change = (b - a) / max(a, noise)
        is_worse = change > threshold and b - a > noise
        changes.append(Change(case, f"{now.name}: {name}", a, b, change, True, is_worse))
    return changes


def unlike(changes: list[Change], threshold: float) -> list[str]:
    """The cases in which the machine's own copy bandwidth was another: ratios between what memory
    bounds and what arithmetic bounds follow it, whatever the code does."""
    copies = [c for c in changes if c.figure == COPY]
    return [c.case for c in copies if not 1 / (1 + threshold) <= c.old / c.new <= 1 + threshold]
