"""States by name."""

from collections.abc import Collection, Mapping
from typing import Any


def check_keys(state: Any, expected: Collection[str], message: str) -> None:
    """Raise a ValueError that begins with `message` where the state has other names."""
    names = set(state) if isinstance(state, Mapping) else None
    if names != set(expected):
        got = type(state).__name__ if names is None else sorted(map(str, names))
        raise ValueError(
            f"{message} {sorted(expected)}, got {got}. Make it of the parts that the checkpoint "
            "was made with."
        )
