"""Weights that change over training."""

import math
from bisect import bisect_right
from collections.abc import Sequence
from typing import Any

_SHAPES = ("linear", "cosine", "constant")


class StepSchedule:
    """A weight by step, between points (step_i, weight_i).

        f = (step - step_i) / (step_{i+1} - step_i),   step_i <= step < step_{i+1}
        linear: w_i + f (w_{i+1} - w_i)
        cosine: w_i + (1 - cos π f) / 2 (w_{i+1} - w_i)
        constant: w_i

    Before the first point it is the first weight, after the last one the last; at each point its
    weight to the bit.

    Args:
        points: (step, weight) pairs, steps rising; steps count from 0, as trainer_state.global_step
            does.
        shape: "linear", "cosine" or "constant".
    Raises:
        ValueError: no points; steps do not rise; a number is not finite; the shape is another.
    """

    def __init__(self, points: Sequence[Sequence[float]], shape: str = "linear") -> None:
        points = [tuple(point) for point in points]
        steps = [point[0] for point in points if len(point) == 2]
        is_finite = all(math.isfinite(x) for point in points for x in point)
        rises = all(a < b for a, b in zip(steps, steps[1:], strict=False))
        if not steps or len(steps) != len(points) or not is_finite or not rises:
            raise ValueError(
                "StepSchedule: expected points of finite (step, weight) pairs, steps rising, got "
                f"{points}. Give at least one pair."
            )
        if shape not in _SHAPES:
            raise ValueError(
                f"StepSchedule: expected shape one of {', '.join(map(repr, _SHAPES))}, got "
                f"{shape!r}. Choose one of these."
            )
        self.steps, self.weights = steps, [float(point[1]) for point in points]
        self.shape = shape

    def __call__(self, step: float) -> float:
        """The weight in a step."""
        index = bisect_right(self.steps, step) - 1
        if index < 0 or index == len(self.steps) - 1:
            return self.weights[max(index, 0)]
        start, end = self.weights[index : index + 2]
        done = (step - self.steps[index]) / (self.steps[index + 1] - self.steps[index])
        if self.shape == "constant":
            return start
        if self.shape == "cosine":
            done = (1 - math.cos(math.pi * done)) / 2
        return start + done * (end - start)


class SaturationSchedule:
    """A weight that moves as its part nears the most that it can give, so that others matter more.

        m = the first call's mean, then m <- decay m + (1 - decay) mean
        f = min(1, max(0, (m - at) / (ceiling - at)))
        weight = start + f (end - start)

    `mean` is that of the part's totals in a call, before any normalisation, over completions with
    a finite one; a call without any changes nothing. The weight of a call is made of the calls
    before it, so that it does not depend on the rewards it weighs; in the first one it is `start`.
    Where m falls again, the weight moves back.

    Args:
        start, end: weights, up to `at` and from `ceiling` on.
        at: mean at which the weight begins to move.
        decay: in [0, 1): how slowly m follows, by call.
        ceiling: mean at which it arrives: the most that the part can give.
    Raises:
        ValueError: a number is not finite or out of its range; at is not below the ceiling.
    """

    def __init__(
        self,
        start: float,
        end: float,
        at: float = 0.9,
        decay: float = 0.9,
        *,
        ceiling: float = 1.0,
    ) -> None:
        if not all(map(math.isfinite, (start, end, at, ceiling))) or not at < ceiling:
            raise ValueError(
                "SaturationSchedule: expected start, end and at < ceiling finite, got "
                f"start = {start}, end = {end}, at = {at}, ceiling = {ceiling}. Pass the most "
                "that the part can give as the ceiling."
            )
        if not 0 <= decay < 1:
            raise ValueError(
                f"SaturationSchedule: expected decay in [0, 1), got {decay}. Pass 0 to follow the "
                "last call alone."
            )
        self.start, self.end, self.at, self.ceiling = start, end, at, ceiling
        self.decay = decay
        self.mean: float | None = None

    def __call__(self, step: float | None = None) -> float:
        """The weight of the next call, whatever the step."""
        done = 0.0 if self.mean is None else (self.mean - self.at) / (self.ceiling - self.at)
        if done >= 1:
            return self.end
        return self.start + max(0.0, done) * (self.end - self.start)

    def observe(self, mean: float) -> None:
        """Take in the part's mean of a call; finite."""
        is_first = self.mean is None
        self.mean = mean if is_first else self.decay * self.mean + (1 - self.decay) * mean  # type: ignore[operator]

    def state_dict(self) -> dict[str, Any]:
        return {"mean": self.mean}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.mean = None if state["mean"] is None else float(state["mean"])
