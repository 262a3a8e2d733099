"""From TOML to a `Recipe`; what is unknown, missing or of a wrong type is an error with a place."""

import dataclasses
import difflib
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastrl.cli.recipes.checks import Where, check_values, wrong
from fastrl.cli.recipes.schema import CONFIGS, FOLDS, PREFERENCE, SAID_ELSEWHERE, SECTIONS, Recipe
from fastrl.cli.recipes.toml import RecipeError, apply_set, parse_set, read_toml

PATHS = (
    "model.path", "model.tokenizer", "model.critic",
    "data.prompts", "data.eval", "data.pairs", "data.eval_pairs",
)  # fmt: skip
ONLY_PATHS = ("model.start", "data.folder")  # nothing but paths, whether or not they exist
# Names of Python code: "file.py:function" is a path as well.
CODE = (
    "rewards.functions[]", "data.builder", "over_optimization.gold", "over_optimization.proxy",
)  # fmt: skip
ALGORITHMS = tuple(name for config in CONFIGS for name in config.ALGORITHMS)
TABLES = ("train", PREFERENCE, *SECTIONS, *(f"train.{name}" for name in ALGORITHMS))


def read_recipe(path: Path, sets: Sequence[str] = ()) -> Recipe:
    """Read a recipe, with the values of --set in place of its own; nothing takes a key out.

    Raises:
        RecipeError: it cannot be read, a key is unknown or missing, or a value is of another type.
    """
    document: dict[str, Any] = _resolved("", read_toml(path), path.absolute().parent)
    set_keys = []
    taken_out: dict[str, list[str]] = {}  # the parts of keys
    for text in sets:
        parts, value = parse_set(text)
        key = ".".join(parts)
        is_taken_out = text.partition("=")[2].strip() == ""
        if is_taken_out and key in TABLES:
            outer = document if len(parts) == 1 else document.get(parts[0], {})
            outer.pop(parts[-1], None)
            continue
        apply_set(document, parts, _resolved(key, value, Path.cwd()))
        if parts[0] == "train" and len(parts) == 2 and parts[1] not in ALGORITHMS:
            _forget(document["train"], parts[1])
        set_keys.append(key)
        taken_out.pop(key, None)
        if is_taken_out:
            taken_out[key] = parts

    def where(key: str) -> str:
        return f"--set {key}" if key in set_keys else f"{key} in {path}"

    _check_keys(document, where)
    for parts in taken_out.values():
        table = document
        for part in parts[:-1]:
            table = table[part]
        del table[parts[-1]]
    algorithm = str(document.get("algorithm"))
    sections: dict[str, Any] = {}
    for name, section in SECTIONS.items():
        values = document.get(name, {})
        for key, hint in typing.get_type_hints(section).items():
            if key in values and not _fits(values[key], hint):
                raise wrong(where(f"{name}.{key}"), f"to be {_words(hint)}", values[key])
        sections[name] = section(**values)
    recipe = Recipe(
        source=str(path),
        algorithm=algorithm,
        train=_fields_for(algorithm, document.get("train", {})),
        preference=document.get("preference", {}),
        **sections,
    )
    check_values(recipe, where)
    recipe.config()
    return recipe


def _forget(train: dict[str, Any], name: str) -> None:
    """What --set says of all algorithms goes before what the recipe says of one."""
    for algorithm in ALGORITHMS:
        if isinstance(train.get(algorithm), dict):
            train[algorithm].pop(name, None)


def _fields_for(algorithm: str, train: dict[str, Any]) -> dict[str, Any]:
    """Those of [train] for all algorithms, and those of the algorithm's own table."""
    common = {name: value for name, value in train.items() if name not in ALGORITHMS}
    return {**common, **train.get(algorithm, {})}


def _check_keys(document: dict[str, Any], where: Where) -> None:
    """Raise where a key is not one of a recipe's, or a table is none."""
    algorithm = document.get("algorithm")
    tables = ["train", "preference", *SECTIONS]
    for name, table in document.items():
        if name != "algorithm" and not isinstance(table, dict):
            if name in tables:
                raise wrong(where(name), "to be a table", table)
            raise _unknown(where(name), name, ["algorithm", *tables])
    if algorithm not in (*ALGORITHMS, PREFERENCE):
        near = difflib.get_close_matches(str(algorithm), (*ALGORITHMS, PREFERENCE), 1)
        remedy = f"Did you mean {near[0]}?" if near else "It chooses the trainer."
        expected = f"to be one of {', '.join((*ALGORITHMS, PREFERENCE))}"
        raise wrong(where("algorithm"), expected, algorithm or "nothing", remedy)
    known = {name: [f.name for f in dataclasses.fields(cls)] for name, cls in SECTIONS.items()}
    dotted = [f"{name}.{key}" for name, keys in known.items() for key in keys]
    for name, table in document.items():
        if name in known:
            for key in table:
                if key not in known[name]:
                    raise _unknown(where(f"{name}.{key}"), f"{name}.{key}", dotted)
        elif name not in ("algorithm", *tables):
            raise _unknown(where(name), name, ["algorithm", *tables])
    if algorithm != PREFERENCE:
        train = document.get("train", {})
        _check_fields("train", {k: v for k, v in train.items() if k not in ALGORITHMS}, where,
                      str(algorithm), dotted)  # fmt: skip
        for name in ALGORITHMS:
            if name in train:
                if not isinstance(train[name], dict):
                    raise wrong(where(f"train.{name}"), "to be a table", train[name])
                _check_fields(f"train.{name}", train[name], where, name, dotted)
    else:
        _check_preference(document, where)


def _check_preference(document: dict[str, Any], where: Where) -> None:
    if document.get("train"):
        raise wrong(where("train"), "without algorithm preference", "both", "See [preference].")
    from fastrl.rewards.preference import PreferenceConfig

    known = [f.name for f in dataclasses.fields(PreferenceConfig)] + [FOLDS]
    for key, value in document.get("preference", {}).items():
        if key not in known:
            fitting = [f"preference.{name}" for name in known]
            raise _unknown(where(f"preference.{key}"), f"preference.{key}", fitting)
        if key == FOLDS and (not _fits(value, int) or value == 1 or value < 0):
            raise wrong(where(f"preference.{key}"), "to be 0, or a whole number >= 2", value)


def _check_fields(
    table: str, fields: dict[str, Any], where: Where, algorithm: str, others: list[str]
) -> None:
    """Raise where a field is none of the algorithm's config."""
    config = next(c for c in CONFIGS if algorithm in c.ALGORITHMS)
    known = [f.name for f in dataclasses.fields(config) if f.name not in SAID_ELSEWHERE]
    for key in fields:
        if key in SAID_ELSEWHERE:
            raise RecipeError(
                f"train: expected no {where(f'{table}.{key}')}: it is {SAID_ELSEWHERE[key]}."
            )
        if key in known:
            continue
        for other in CONFIGS:
            if key in [f.name for f in dataclasses.fields(other)]:
                expected = f"with an algorithm of {other.ALGORITHMS}"
                remedy = f"Say it in [train.{other.ALGORITHMS[0]}] or its like."
                raise wrong(where(f"{table}.{key}"), expected, algorithm, remedy)
        fitting = [f"{table}.{name}" for name in known] + others
        raise _unknown(where(f"{table}.{key}"), f"{table}.{key}", fitting)


def _resolved(key: str, value: Any, base: Path) -> Any:
    """A value with its paths absolute: what stands in base, or can be nothing but a path."""
    if isinstance(value, dict) and key in ("", *SECTIONS):
        return {k: _resolved(f"{key}.{k}" if key else k, v, base) for k, v in value.items()}
    if key == "rewards.functions" and isinstance(value, list):
        return [_resolved(f"{key}[]", entry, base) for entry in value]
    if key in CODE:
        return _resolved_code(value, base)
    if not isinstance(value, str) or not value:
        return value
    if key in ONLY_PATHS:
        return str((base / Path(value).expanduser()).absolute())
    if key not in PATHS:
        return value
    path = base / Path(value).expanduser()
    is_path = value.startswith((".", "/", "~")) or path.suffix in (".jsonl", ".json", ".txt")
    return str(path.absolute()) if is_path or path.exists() else value


def _resolved_code(value: Any, base: Path) -> Any:
    """Names of code, and tables of functions: "file.py:name" with its path absolute.

    Of a table's arguments also a text with a / in it, where there is such a file or folder.
    """
    if isinstance(value, list):
        return [_resolved_code(entry, base) for entry in value]
    if isinstance(value, dict):
        return {name: _resolved_code(entry, base) for name, entry in value.items()}
    if not isinstance(value, str):
        return value
    file, colon, name = value.rpartition(":")
    if file.endswith(".py"):
        return str((base / file).absolute()) + colon + name
    path = base / Path(value).expanduser()
    return str(path.absolute()) if "/" in value and path.exists() else value


def _fits(value: Any, hint: Any) -> bool:
    if isinstance(hint, types.UnionType):
        return any(_fits(value, each) for each in typing.get_args(hint))
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is list:
        return isinstance(value, list) and all(_fits(entry, arguments[0]) for entry in value)
    if origin is dict:
        return isinstance(value, dict) and _is_plain(value)
    if isinstance(value, bool):
        return hint is bool
    return isinstance(value, int | float) if hint is float else isinstance(value, hint)


def _is_plain(value: Any) -> bool:
    """Free tables are handed on to other libraries: no dates, which TOML has as well."""
    if isinstance(value, dict | list):
        return all(map(_is_plain, value.values() if isinstance(value, dict) else value))
    return isinstance(value, str | int | float)


def _words(hint: Any) -> str:
    """A type as people say it."""
    names = {str: "a text", int: "a whole number", float: "a number", bool: "true or false"}
    if isinstance(hint, types.UnionType):
        each = [a for a in typing.get_args(hint) if a is not types.NoneType]
        return " or ".join(map(_words, each))
    if typing.get_origin(hint) is list:
        return f"a list, each entry {_words(typing.get_args(hint)[0])}"
    return names.get(hint, "a table")


def _unknown(where: str, key: str, known: Sequence[str]) -> RecipeError:
    near = difflib.get_close_matches(key, known, 1, 0.0)
    return RecipeError(
        f"train: expected a key that recipes have, got {where}. The nearest is {near[0]}; "
        "`fastrl train --help` lists them."
    )
