"""What results.json says of the held-out prompts: intervals, gains, and what else was measured."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fastrl.cli.intervals import gain_interval, mean_interval
from fastrl.cli.reporting.numbers import is_number
from fastrl.cli.reporting.run_data import RunData

# What is shown of an evaluation beside rewards, where it is there: key -> title, unit.
FIGURES = {
    "eval/kl": ("KL from the start", "nats per token"),
    "eval/entropy": ("Entropy", "nats per token"),
    "eval/completions/mean_length": ("Length", "tokens"),
    "eval/completions/clipped_ratio": ("Ran out of length", "share of completions"),
    "eval/perplexity": ("Perplexity", "of held-out text"),
    "eval/distinct_2": ("Distinct-2", "share of word pairs"),
    "eval/accuracy": ("Accuracy", "share of pairs in the right order"),
    "eval/log_loss": ("Log-loss", "nats per pair"),
    "eval/ece": ("Calibration error", "expected"),
}


@dataclass(frozen=True)
class Gain:
    """Means with half-widths of their 95 % intervals, over prompts; `gain` of the pairs.

    Of one prompt there is no interval, and a half-width is NaN.
    """

    before: tuple[float, float]
    after: tuple[float, float]
    gain: tuple[float, float]
    prompts: int


def reward_intervals(entry: dict[str, Any]) -> tuple[float, float] | None:
    """Mean and half-width of an evaluation's rewards, as in `Gain`; None where there are none."""
    values = [v for v in entry.get("prompt_rewards") or () if is_number(v)]
    return mean_interval(values) if values else None


def gain_of(run: RunData) -> Gain | None:
    """Of the held-out reward; None before it was measured twice on the same prompts."""
    earlier, later = (e.get("prompt_rewards") or [] for e in (run.before, run.after))
    before, after = reward_intervals(run.before), reward_intervals(run.after)
    if before is None or after is None or len(earlier) != len(later):
        return None
    pairs = [(a, b) for a, b in zip(earlier, later, strict=True) if is_number(a) and is_number(b)]
    if not pairs:
        return None
    gain = gain_interval(*zip(*pairs, strict=True))
    return Gain(before, after, gain, len(pairs))


def figure_rows(run: RunData) -> list[tuple[Any, ...]]:
    """(title, unit, before, after) of each part of the reward and of FIGURES."""
    both = (run.before, run.after)
    keys = dict.fromkeys(key for entry in both for key in entry)
    parts = [k for k in keys if k.startswith("eval/rewards/") and k.endswith("/mean")]
    titles = {
        key: (f"Reward {key.removeprefix('eval/rewards/')[:-5]}", "on average") for key in parts
    }
    return [
        (title, unit, *(entry.get(key) for entry in both))
        for key, (title, unit) in (titles | FIGURES).items()
        if any(is_number(entry.get(key)) for entry in both)
    ]


def pair_samples(
    before: Sequence[dict[str, Any]], after: Sequence[dict[str, Any]]
) -> list[tuple[dict[str, Any] | None, dict[str, Any] | None]]:
    """Samples of the same prompt beside each other, in the order of `before`, then of `after`.

    A prompt that comes up several times is paired in that order.
    """
    waiting: dict[str, list[dict[str, Any]]] = {}
    for sample in after:
        waiting.setdefault(_key(sample), []).append(sample)
    pairs: list[tuple[dict[str, Any] | None, dict[str, Any] | None]] = []
    for sample in before:
        partners = waiting.get(_key(sample))
        pairs.append((sample, partners.pop(0) if partners else None))
    left = [id(sample) for samples in waiting.values() for sample in samples]
    return pairs + [(None, sample) for sample in after if id(sample) in left]


def _key(sample: dict[str, Any]) -> str:
    return json.dumps(sample.get("prompt"), sort_keys=True)
