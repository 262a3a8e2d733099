"""Checks of arguments that several rewards have."""

from typing import Any


def check_whole(owner: str, name: str, value: Any, least: int, remedy: str | None = None) -> None:
    """Raise a ValueError where an argument is not an integer >= least."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(
            f"{owner}: expected {name} to be an integer >= {least}, got {value!r}. "
            f"{remedy or f'Pass {least} or more.'}"
        )
