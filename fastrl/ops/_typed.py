"""An op has the type of its definition in fastrl.reference, where the overloads stand."""

from collections.abc import Callable
from typing import Any, TypeVar, cast

Definition = TypeVar("Definition", bound=Callable[..., Any])


def typed_as(definition: Definition) -> Callable[[Callable[..., Any]], Definition]:
    """For type checkers: the op comes back as it is. A test holds the signatures together."""
    return lambda op: cast(Definition, op)
