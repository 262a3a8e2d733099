"""A weight for each part: a number, or a schedule."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fastrl.rewards._states import check_keys, load_states, stateful, states
from fastrl.rewards.composition.schedules import SaturationSchedule

Weight = float | Callable[[float], float]


class Weights:
    """The weights of a composition's parts, by step.

    Args:
        op: the composition's class, for messages.
        parts: names.
        weights: a weight for each part, in their order or by name; None: 1 each.
    Raises:
        ValueError: other names, or another number of weights; a number is not finite; two parts
            share a schedule that remembers.
        TypeError: a weight is neither a number nor callable.
    """

    def __init__(
        self,
        op: str,
        parts: Sequence[str],
        weights: Mapping[str, Weight] | Sequence[Weight] | None,
    ) -> None:
        self._op = op
        if weights is None:
            weights = [1.0] * len(parts)
        by_name = (
            weights if isinstance(weights, Mapping) else dict(zip(parts, weights, strict=False))
        )
        if len(weights) != len(parts) or by_name.keys() != set(parts):
            got = list(weights)
            raise ValueError(
                f"{op}: expected weights for the parts {list(parts)}, got {got}. Give one weight "
                "for each."
            )
        self._weights: dict[str, Weight] = {name: by_name[name] for name in parts}
        for name, weight in self._weights.items():
            if not callable(weight):
                self._check(name, weight)
        owners = list(map(id, stateful(self._weights).values()))
        if len(set(owners)) < len(owners):
            raise ValueError(
                f"{op}: expected weights with a schedule of its own for each part, got one that "
                "remembers for several. Make one for each."
            )

    def __call__(self, step: float | None) -> dict[str, float]:
        """The weights in a step.

        Raises:
            ValueError: a schedule needs the step, and it is None; it gave no finite number.
        """
        return {name: self._at(name, weight, step) for name, weight in self._weights.items()}

    def observe(self, part: str, mean: float) -> None:
        """A part's mean in this call, NaN if there is none, for schedules that follow it."""
        weight = self._weights[part]
        if isinstance(weight, SaturationSchedule) and math.isfinite(mean):
            weight.observe(mean)

    def state_dict(self) -> dict[str, Any]:
        return states(self._weights)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        expected = f"{self._op}: expected states of the schedules of the parts"
        check_keys(state, stateful(self._weights), expected)
        load_states(self._weights, state)

    def _at(self, name: str, weight: Weight, step: float | None) -> float:
        if not callable(weight):
            return float(weight)
        if isinstance(weight, SaturationSchedule):
            return weight(step)
        if step is None:
            raise ValueError(
                f"{self._op}: expected trainer_state with global_step for the weight of part "
                f"{name}, got none. Call it in a trainer, or give a number."
            )
        return self._check(name, weight(step))

    def _check(self, name: str, weight: Any) -> float:
        weight = weight.item() if hasattr(weight, "item") else weight
        if not isinstance(weight, int | float):
            raise TypeError(
                f"{self._op}: expected a number or a function of the step as the weight of part "
                f"{name}, got {weight!r}. Pass a number, StepSchedule or SaturationSchedule."
            )
        if not math.isfinite(weight):
            raise ValueError(
                f"{self._op}: expected a finite weight of part {name}, got {weight}. Pass 0 to "
                "leave its rewards out."
            )
        return float(weight)
