"""From TOML to a `Recipe`; what is unknown, missing or of a wrong type is an error with a place."""

import dataclasses
import difflib
import types
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fastrl.cli.recipes.schema import CONFIGS, SAID_ELSEWHERE, SECTIONS, Recipe
from fastrl.cli.recipes.toml import RecipeError, apply_set, parse_set, read_toml
from fastrl.trainers import ActorCriticConfig

PATHS = ("model.path", "model.tokenizer", "model.critic", "data.prompts", "data.eval")
Where = Callable[[str], str]  # of a key: where its value was said


def read_recipe(path: Path, sets: Sequence[str] = ()) -> Recipe:
    """Read a recipe, with the values of --set in place of its own.

    Raises:
        RecipeError: it cannot be read, a key is unknown or missing, or a value is of another type.
    """
    document: dict[str, Any] = _resolved("", read_toml(path), path.absolute().parent)
    set_keys = []
    for text in sets:
        parts, value = parse_set(text)
        key = ".".join(parts)
        apply_set(document, parts, _resolved(key, value, Path.cwd()))
        set_keys.append(key)

    def where(key: str) -> str:
        return f"--set {key}" if key in set_keys else f"{key} in {path}"

    _check_keys(document, where)
    algorithm = document.get("algorithm")
    sections: dict[str, Any] = {}
    for name, section in SECTIONS.items():
        values = document.get(name, {})
        for key, hint in typing.get_type_hints(section).items():
            if key in values and not _fits(values[key], hint):
                raise _wrong(where(f"{name}.{key}"), f"to be {_words(hint)}", values[key])
        sections[name] = section(**values)
    recipe = Recipe(
        source=str(path), algorithm=str(algorithm), train=document.get("train", {}), **sections
    )
    _check_values(recipe, where)
    recipe.config()
    return recipe


def _check_keys(document: dict[str, Any], where: Where) -> None:
    """Raise where a key is not one of a recipe's, or a table is none."""
    algorithms = [name for config in CONFIGS for name in config.ALGORITHMS]
    algorithm = document.get("algorithm")
    for name, table in document.items():
        if name != "algorithm" and not isinstance(table, dict):
            if name in SECTIONS or name == "train":
                raise _wrong(where(name), "to be a table", table)
            raise _unknown(where(name), name, ["algorithm", "train", *SECTIONS])
    if algorithm not in algorithms:
        near = difflib.get_close_matches(str(algorithm), algorithms, 1)
        remedy = f"Did you mean {near[0]}?" if near else "It chooses the trainer."
        expected = f"to be one of {', '.join(algorithms)}"
        raise _wrong(where("algorithm"), expected, algorithm or "nothing", remedy)
    config = next(c for c in CONFIGS if algorithm in c.ALGORITHMS)
    known = {name: [f.name for f in dataclasses.fields(cls)] for name, cls in SECTIONS.items()}
    known["train"] = [f.name for f in dataclasses.fields(config) if f.name not in SAID_ELSEWHERE]
    dotted = [f"{name}.{key}" for name, keys in known.items() for key in keys]
    for name, table in document.items():
        if name == "algorithm":
            continue
        if name not in known:
            raise _unknown(where(name), name, ["algorithm", *known])
        for key in table:
            if name == "train" and key in SAID_ELSEWHERE:
                raise RecipeError(
                    f"train: expected no {where(f'train.{key}')}: it is {SAID_ELSEWHERE[key]}."
                )
            if key not in known[name]:
                raise _unknown(where(f"{name}.{key}"), f"{name}.{key}", dotted)


def _check_values(recipe: Recipe, where: Where) -> None:
    model, data, rewards = recipe.model, recipe.data, recipe.rewards
    sources = [key for key in ("path", "random", "lstm") if getattr(model, key) is not None]
    if len(sources) != 1:
        expected = "to have exactly one of path, random and lstm"
        got = " and ".join(sources) or "none"
        raise _wrong(f"[model] in {recipe.source}", expected, got, "It says which model to train.")
    if model.path is None and model.tokenizer is None:
        remedy = 'tokenizer = "bytes" needs no file.'
        raise _wrong(where("model.tokenizer"), f"with model.{sources[0]}", "nothing", remedy)
    if model.lora is not None and model.lstm is not None:
        raise _wrong(where("model.lora"), "with a model of transformers", "an LSTM")
    if model.critic is not None and recipe.config_class is not ActorCriticConfig:
        remedy = f"Actor-critic is {', '.join(ActorCriticConfig.ALGORITHMS)}."
        raise _wrong(where("model.critic"), "with actor-critic", recipe.algorithm, remedy)
    if model.dtype not in ("float32", "bfloat16", "float16"):
        raise _wrong(where("model.dtype"), "to be float32, bfloat16 or float16", model.dtype)
    if not data.prompts:
        raise _wrong(where("data.prompts"), "to name the prompts", "nothing")
    if not rewards.functions:
        expected, remedy = "to name at least one function", 'For example "rewards.py:correct".'
        raise _wrong(where("rewards.functions"), expected, "none", remedy)
    if rewards.weights is not None and len(rewards.weights) != len(rewards.functions):
        expected = f"to have a weight for each of {len(rewards.functions)} functions"
        raise _wrong(where("rewards.weights"), expected, rewards.weights)
    least = {"data.limit": 1, "data.eval_limit": 1, "log.samples_every": 0, "log.samples_shown": 0}
    least |= {"eval.every": 0, "eval.completions_per_prompt": 1, "eval.temperature": 0}
    for key, low in least.items():
        section, _, name = key.partition(".")
        value = getattr(getattr(recipe, section), name)
        if value is not None and not value >= low:
            raise _wrong(where(key), f">= {low}", value)


def _resolved(key: str, value: Any, base: Path) -> Any:
    """A value with its paths absolute: what stands in base, or can be nothing but a path."""
    if isinstance(value, dict) and key in ("", *SECTIONS):
        return {k: _resolved(f"{key}.{k}" if key else k, v, base) for k, v in value.items()}
    if key == "rewards.functions" and isinstance(value, list):
        return [_resolved(f"{key}[]", entry, base) for entry in value]
    if not isinstance(value, str):
        return value
    if key == "rewards.functions[]":
        file, colon, name = value.rpartition(":")
        return str((base / file).absolute()) + colon + name if file.endswith(".py") else value
    if key not in PATHS or not value:
        return value
    path = base / Path(value).expanduser()
    is_path = value.startswith((".", "/", "~")) or path.suffix in (".jsonl", ".json", ".txt")
    return str(path.absolute()) if is_path or path.exists() else value


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


def _wrong(where: str, expected: str, got: Any, remedy: str = "") -> RecipeError:
    shown = got if isinstance(got, str) else repr(got)
    advice = remedy or "`fastrl train --help` says what it is."
    return RecipeError(f"train: expected {where} {expected}, got {shown}. {advice}")
