"""What rides along with a run: parts that see each step's record, and whose state is saved."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from fastrl.rewards._states import load_states, stateful, states

Record = dict[str, float]
Part = Callable[[Record], None]


class StopTraining(Exception):
    """Raised by an attached part or a callback of `train`: the run ends here, without an error.

    `train` writes a checkpoint, where it writes any, and returns the records so far.
    """


class Attachments:
    """Parts by name, in the order in which they were attached."""

    def __init__(self) -> None:
        self._parts: dict[str, Part] = {}

    def __iter__(self) -> Iterator[Part]:
        return iter(self._parts.values())

    def get(self, name: str) -> Any:
        """The part of that name, or None."""
        return self._parts.get(name)

    def add(self, name: str, part: Part) -> None:
        """See `Trainer.attach`."""
        if not isinstance(name, str) or not callable(part):
            wanted = "a name that is a string" if callable(part) else "a part that can be called"
            got = name if callable(part) else part
            raise TypeError(
                f"attach: expected {wanted}, got {got!r}. Pass attach(name, part): part(record)."
            )
        if name in self._parts:
            raise ValueError(
                f"attach: expected a name that is free, got {name!r} for the second time. "
                "Choose another."
            )
        self._parts[name] = part

    @property
    def starts(self) -> list[Callable[[], None]]:
        """The methods `start` of the parts that have one."""
        return [part.start for part in self if hasattr(part, "start")]

    def state_dict(self) -> dict[str, Any]:
        """By name, the states of the parts that have state_dict and load_state_dict."""
        return states(self._parts)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Give the parts the states that `state_dict` had.

        Raises:
            ValueError: the parts with a state have other names.
        """
        parts = stateful(self._parts)
        if state.keys() != parts.keys():
            raise ValueError(
                f"attach: expected the parts {sorted(state)} of the checkpoint, got "
                f"{sorted(parts)}. Attach the same parts under the same names before resuming."
            )
        load_states(self._parts, state)
