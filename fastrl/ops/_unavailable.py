"""Functions of the contract that only fastrl.reference has in this version."""

import functools
from collections.abc import Callable
from typing import NoReturn

NAMES: list[str] = []  # `fastrl info` lists them


def unavailable(definition: Callable[..., object]) -> Callable[..., NoReturn]:
    """The same name, signature and documentation; a call refuses instead of being slow unasked."""
    name = definition.__name__
    NAMES.append(name)

    @functools.wraps(definition)
    def refuse(*args: object, **kwargs: object) -> NoReturn:
        raise NotImplementedError(
            f"{name}: expected a fast implementation, got none in this version. "
            f"Use fastrl.reference.{name}, which has the same signature."
        )

    return refuse
