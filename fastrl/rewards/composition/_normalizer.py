"""A part's rewards with mean 0 and deviation 1, over a batch, a prompt's group, or the run."""

from collections.abc import Sequence
from typing import Any

from fastrl.rewards._moments import Moments, divided
from fastrl.rewards._states import check_keys
from fastrl.rewards.composition._composition import Batch
from fastrl.rewards.composition._entries import Entry, usable_totals

OVER = ("batch", "group", "running")


class Normalizer:
    """z = (s - mean) / deviation, s a completion's total of one part; NormalizedSum says over what.

    Args:
        over: "batch", "group" or "running".
        decay: in (0, 1), or None for 1; for "running" alone.
    Raises:
        ValueError: over is none of the three; decay is out of range, or not for "running".
    """

    def __init__(self, op: str, parts: Sequence[str], over: str, decay: float | None) -> None:
        if over not in OVER:
            raise ValueError(
                f"{op}: expected over one of {', '.join(map(repr, OVER))}, got {over!r}. "
                "Choose one of these."
            )
        if over != "running" and decay is not None:
            raise ValueError(
                f'{op}: expected decay None with over = "{over}", got {decay}. Only over = '
                '"running" has something to forget.'
            )
        self._op, self.over, self.decay = op, over, checked_decay(op, decay)
        self._running = {name: Moments() for name in parts} if over == "running" else {}

    def __call__(self, part: str, entries: list[Entry], batch: Batch) -> list[Entry]:
        """The entries of a part, normalised; updates its running statistics first."""
        if self.over == "group":
            found: list[Entry] = [None] * len(entries)
            for group in groups_of(batch.prompts):
                moments = _moments([entries[i] for i in group])
                for i in group:
                    found[i] = _normalized(entries[i], batch.firsts[i], moments, sample=True)
            return found
        if self.over == "batch":
            moments = _moments(entries)
        else:
            moments = self._running[part]
            moments.merge(*usable_totals(entries), self.decay)
        is_sample = self.over == "batch"
        return [
            _normalized(entry, first, moments, sample=is_sample)
            for entry, first in zip(entries, batch.firsts, strict=True)
        ]

    def state_dict(self) -> dict[str, Any]:
        return {name: moments.state_dict() for name, moments in self._running.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        check_keys(state, self._running, f"{self._op}: expected running statistics of the parts")
        for name, moments in self._running.items():
            moments.load_state_dict(state[name])


def checked_decay(op: str, decay: float | None) -> float:
    """The decay as a factor, 1 for None.

    Raises:
        ValueError: it is not in (0, 1).
    """
    if decay is not None and not 0 < decay < 1:
        raise ValueError(
            f"{op}: expected decay in (0, 1), got {decay}. Pass None to forget nothing."
        )
    return 1.0 if decay is None else decay


def groups_of(prompts: Sequence[Any]) -> list[list[int]]:
    """Indices of equal prompts, in the order in which they first stand."""
    groups: dict[str, list[int]] = {}
    for index, prompt in enumerate(prompts):
        # As text: chat messages cannot be hashed, and tensors are not equal as lists are.
        key = repr(prompt.tolist() if hasattr(prompt, "tolist") else prompt)
        groups.setdefault(key, []).append(index)
    return list(groups.values())


def _moments(entries: list[Entry]) -> Moments:
    moments = Moments()
    moments.merge(*usable_totals(entries))
    return moments


def _normalized(entry: Entry, first: int, moments: Moments, *, sample: bool) -> Entry:
    if entry is None:
        return None
    deviation = moments.deviation(sample=sample)
    if isinstance(entry, list):
        # At the policy's first id, which each completion has: a share for each id would reward an
        # early end, or a late one, as what is left to come then depends on how many will be there.
        row = list(entry)
        row[first] -= moments.mean
        return [divided(value, deviation) for value in row]
    return divided(entry - moments.mean, deviation)
