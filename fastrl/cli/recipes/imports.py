"""Python code by name: "package.module:name", "file.py:name", or a name alone of one package."""

import difflib
import importlib
import importlib.util
import os
import sys
import sysconfig
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any

import fastrl
from fastrl.cli.recipes.toml import RecipeError

# Where frames of a traceback are Python's, an installed package's or fastrl's.
_PACKAGES = {sysconfig.get_path(kind) for kind in ("stdlib", "platstdlib", "purelib", "platlib")}
_FOLDERS = (*_PACKAGES, Path(fastrl.__file__).parent)
_NOT_THEIRS = ("<frozen", *(f"{folder}{os.sep}" for folder in _FOLDERS))


def load_object(
    name: str,
    key: str,
    package: str | None = None,
    modules: dict[str, ModuleType] | None = None,
) -> Any:
    """What a name stands for.

    Modules are looked for in the current folder too, and what a file imports beside itself.

    Args:
        name: as above.
        key: of the recipe, for messages.
        package: where a name alone is looked for; None: it is an error.
        modules: those that were imported before, by name; names of one file share one module.
    Raises:
        RecipeError: no such module or name, or importing it raised.
    """
    module_name, colon, attribute = name.rpartition(":")
    if package is not None and name.isidentifier():
        module_name, colon, attribute = package, ":", name
    if not colon or not module_name or not attribute:
        raise RecipeError(
            f"train: expected {key} like package.module:function or "
            f"file.py:function, got {name}. The colon stands before the function."
        )
    modules = {} if modules is None else modules
    if module_name not in modules:
        modules[module_name] = _module(module_name, key)
    module = modules[module_name]
    value = getattr(module, attribute, None)
    if not callable(value):
        own = [each for each, found in vars(module).items() if callable(found)]
        near = difflib.get_close_matches(attribute, own, 1)
        remedy = f"Did you mean {near[0]}?" if near else "Define it there."
        raise RecipeError(f"train: expected {key} to name a function, got {name}. {remedy}")
    return value


def said(error: Exception) -> str:
    """What somebody's code raised: in our words alone, or with its kind and its own line."""
    frames = traceback.extract_tb(error.__traceback__)
    theirs = [f for f in frames if not f.filename.startswith(_NOT_THEIRS)]
    if ": expected " in str(error) or (isinstance(error, TypeError) and not theirs):
        return str(error)  # ours, or of arguments that the code does not take
    place = f" ({theirs[-1].filename}, line {theirs[-1].lineno})" if theirs else ""
    return f"{type(error).__name__}: {error}{place}"


def _module(name: str, key: str) -> ModuleType:
    path = Path(name)
    is_file = path.suffix == ".py"
    if is_file and not path.is_file():
        raise RecipeError(
            f"train: expected {key} to name a file that exists, got {path}. "
            "Check the path; it is relative to the recipe."
        )
    folder = str(path.absolute().parent if is_file else Path.cwd())
    if folder not in sys.path:
        sys.path.append(folder)
    try:
        return _module_of_file(path) if is_file else importlib.import_module(name)
    except Exception as error:  # whatever the user's module raises
        raise RecipeError(
            f"train: expected {key} to name a module that can be imported, got {name}, "
            f"which raised {said(error)}."
        ) from error


def _module_of_file(path: Path) -> ModuleType:
    """Each time the file as it is now."""
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
