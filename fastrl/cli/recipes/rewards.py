"""Reward functions by name: "package.module:function" or "file.py:function"."""

import difflib
import importlib
import importlib.util
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from fastrl.cli.recipes.toml import RecipeError


def load_reward_functions(names: Sequence[str]) -> list[Callable[..., Any]]:
    """The functions, imported; of a class, an object of it.

    Modules are looked for in the current folder too, and what a file imports beside itself.

    Raises:
        RecipeError: no such module, file or function, or importing it raised.
    """
    modules: dict[str, ModuleType] = {}
    functions = []
    for name in names:
        module_name, colon, attribute = name.rpartition(":")
        if not colon or not module_name or not attribute:
            raise RecipeError(
                "train: expected rewards.functions like package.module:function or "
                f"file.py:function, got {name}. The colon stands before the function."
            )
        if module_name not in modules:
            modules[module_name] = _module(module_name)
        functions.append(_function(modules[module_name], attribute, name))
    return functions


def _module(name: str) -> ModuleType:
    path = Path(name)
    is_file = path.suffix == ".py"
    if is_file and not path.is_file():
        raise RecipeError(
            f"train: expected rewards.functions to name a file that exists, got {path}. "
            "Check the path; it is relative to the recipe."
        )
    folder = str(path.absolute().parent if is_file else Path.cwd())
    if folder not in sys.path:
        sys.path.append(folder)
    try:
        return _module_of_file(path) if is_file else importlib.import_module(name)
    except Exception as error:  # whatever the user's module raises
        raise RecipeError(
            f"train: expected rewards.functions to name a module that can be imported, got {name}, "
            f"which raised {type(error).__name__}: {error}."
        ) from error


def _module_of_file(path: Path) -> ModuleType:
    name = f"recipe:{path.absolute()}"  # no name that another module can have
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None, "a .py file has a loader"
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses in it look themselves up
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _function(module: ModuleType, attribute: str, name: str) -> Callable[..., Any]:
    value = getattr(module, attribute, None)
    if isinstance(value, type):
        value = value()
    if not callable(value):
        own = [each for each in vars(module) if not each.startswith("_")]
        near = difflib.get_close_matches(attribute, own, 1)
        remedy = f"Did you mean {near[0]}?" if near else "Define it there."
        raise RecipeError(
            f"train: expected rewards.functions to name a function, got {name}. {remedy}"
        )
    return value
