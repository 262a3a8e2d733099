"""What a checkpoint keeps of parts, by their names."""

from collections.abc import Collection, Mapping
from typing import Any

from fastrl.rewards._calling import unwrapped


def stateful(parts: Mapping[str, Any]) -> dict[str, Any]:
    """Those with state_dict and load_state_dict; of a functools.partial what it was made of."""
    plain = {name: unwrapped(part) for name, part in parts.items()}
    return {
        name: part
        for name, part in plain.items()
        if hasattr(part, "state_dict") and hasattr(part, "load_state_dict")
    }


def states(parts: Mapping[str, Any]) -> dict[str, Any]:
    """Of those that have one."""
    return {name: part.state_dict() for name, part in stateful(parts).items()}


def load_states(parts: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    """Give the parts what `states` had of them."""
    for name, part in stateful(parts).items():
        part.load_state_dict(state[name])


def check_keys(state: Any, expected: Collection[str], message: str) -> None:
    """Raise a ValueError that begins with `message` where the state has other names."""
    names = set(state) if isinstance(state, Mapping) else None
    if names != set(expected):
        got = type(state).__name__ if names is None else sorted(map(str, names))
        raise ValueError(
            f"{message} {sorted(expected)}, got {got}. Make it of the parts that the checkpoint "
            "was made with."
        )
