"""Reward functions of a recipe: by name, or a class by name with its arguments."""

import difflib
import inspect
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any

from fastrl.cli.recipes.imports import load_object, said
from fastrl.cli.recipes.toml import RecipeError

PACKAGE = "fastrl.rewards"  # of names alone
KEY = "rewards.functions"
# Arguments whose texts are names too: those of our classes, and what others may call so.
NAMES_OF_FUNCTIONS = ("part", "parts", "function", "functions", "reward_function", "potential")
Entry = str | dict[str, Any]
Provided = Mapping[str, Callable[[], Any]]  # what the recipe has for a parameter of that name


def load_reward_functions(
    entries: Sequence[Entry], provided: Provided | None = None, key: str = KEY
) -> list[Callable[..., Any]]:
    """The functions; of a class, an object of it.

    Args:
        entries: "package.module:name", "file.py:name" or "Name" of fastrl.rewards, or tables with
            such a name in `use` and keyword arguments.
        provided: arguments that classes and factories get where they have such a parameter and
            the table does not say it.
        key: of the recipe, for messages.
    Raises:
        RecipeError: no such module, file or function, arguments that it does not take, or
            importing or building it raised.
    """
    loader = _Loader(provided or {}, key)
    return [loader.load(entry) for entry in entries]


class _Loader:
    """What functions of one list share: the modules, and what the recipe provides."""

    def __init__(self, provided: Provided, key: str) -> None:
        self.provided, self.key = provided, key
        self._modules: dict[str, ModuleType] = {}

    def load(self, entry: Entry) -> Callable[..., Any]:
        function = self._loaded(entry)
        if not callable(function):
            name = entry if isinstance(entry, str) else entry["use"]
            raise RecipeError(
                f"train: expected {self.key} {name} to make a function, got "
                f"{type(function).__name__}. A function itself is written as a text."
            )
        return function

    def _loaded(self, entry: Entry) -> Any:
        if isinstance(entry, str):
            value = self._named(entry)
            return self._built(value, entry, {}) if isinstance(value, type) else value
        name = entry.get("use")
        if not isinstance(name, str):
            raise RecipeError(
                f"train: expected each table of {self.key} to name a class or factory in use, got "
                f'{entry}. For example {{use = "ChrF"}}.'
            )
        given = {k: self._argument(k, v) for k, v in entry.items() if k != "use"}
        return self._built(self._named(name), name, given)

    def _named(self, name: str) -> Any:
        return load_object(name, self.key, PACKAGE, self._modules)

    def _argument(self, name: str, value: Any) -> Any:
        """What stands in tables with `use` is built too, wherever it is: functions, schedules."""
        if isinstance(value, dict):
            if "use" in value:
                return self._loaded(value)
            return {each: self._argument(name, entry) for each, entry in value.items()}
        if isinstance(value, list):
            return [self._argument(name, entry) for entry in value]
        is_name = isinstance(value, str) and name in NAMES_OF_FUNCTIONS
        return self._loaded(value) if is_name else value

    def _built(self, value: Callable[..., Any], name: str, given: dict[str, Any]) -> Any:
        """What the class or factory makes of its arguments."""
        parameters = inspect.signature(value).parameters
        takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        for argument in given:
            if argument not in parameters and not takes_all:
                near = difflib.get_close_matches(argument, parameters, 1)
                remedy = f"Did you mean {near[0]}?" if near else f"It has {', '.join(parameters)}."
                raise RecipeError(
                    f"train: expected {self.key} {name} with arguments that it has, got "
                    f"{argument}. {remedy}"
                )
        for argument, make in self.provided.items():
            if argument in parameters and argument not in given:
                given = {**given, argument: make()}
        try:
            return value(**given)
        except RecipeError:
            raise
        except Exception as error:  # whatever the user's class raises
            raise RecipeError(f"train: in {self.key}, {name}: {said(error)}") from error
