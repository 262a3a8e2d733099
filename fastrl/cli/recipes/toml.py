"""Reading and writing TOML, and `--set key=value`."""

import json
import math
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")


class RecipeError(ValueError):
    """A recipe, or a --set beside it, cannot work; the message says what and where."""


def read_toml(path: Path) -> dict[str, Any]:
    """The document of a file.

    Raises:
        RecipeError: no such file, not UTF-8, or not TOML, with line and column.
    """
    try:
        return tomllib.loads(path.read_bytes().decode("utf-8"))
    except OSError as error:
        raise RecipeError(
            f"train: expected recipe {path} to be a file that can be read, got "
            f"{error.strerror}. Check the path."
        ) from error
    except ValueError as error:  # of UTF-8 or of TOML
        raise RecipeError(
            f"train: expected recipe {path} in TOML, got {error}. Texts stand in quotes: "
            'algorithm = "grpo".'
        ) from error


def parse_set(text: str) -> tuple[list[str], Any]:
    """`a.b=VALUE` as the key's parts and the value: TOML, or else the text as it stands.

    Raises:
        RecipeError: there is no key.
    """
    key, equals, value = text.partition("=")
    parts = [part.strip() for part in key.split(".")]
    if not equals or not all(parts):
        raise RecipeError(
            f"train: expected --set section.key=value, got {text!r}. For example: "
            "--set train.learning_rate=1e-5"
        )
    try:
        document = tomllib.loads(f"value = {value}")
    except tomllib.TOMLDecodeError:
        return parts, value.strip()  # a shell eats the quotes that TOML wants
    return parts, document["value"] if document.keys() == {"value"} else value.strip()


def apply_set(document: dict[str, Any], parts: Sequence[str], value: Any) -> None:
    """Put a value into a document, in place; tables on the way are made.

    Raises:
        RecipeError: something on the way is no table.
    """
    table: Any = document
    for depth, part in enumerate(parts[:-1], 1):
        table = table.setdefault(part, {})
        if not isinstance(table, dict):
            raise RecipeError(
                f"train: expected --set {'.'.join(parts)} to lead through tables, got "
                f"{'.'.join(parts[:depth])} = {table!r}. Set that key as a whole."
            )
    table[parts[-1]] = value


def write_toml(document: dict[str, Any]) -> str:
    """A document whose tables are at most one deep under a header; None is left out.

    Raises:
        TypeError: a value that TOML does not have.
    """
    plain = {key: value for key, value in document.items() if not isinstance(value, dict)}
    lines = _entries(plain)
    for key, table in document.items():
        if isinstance(table, dict):
            lines += ["", f"[{_key(key)}]", *_entries(table)]
    return "\n".join(lines).lstrip("\n") + "\n"


def _entries(table: dict[str, Any]) -> list[str]:
    return [f"{_key(key)} = {_value(value)}" for key, value in table.items() if value is not None]


def _key(key: str) -> str:
    return key if _BARE_KEY.fullmatch(key) else _text(key)


def _text(text: str) -> str:
    # JSON's escapes are TOML's, but for one character that JSON leaves as it is.
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)  # nan, inf and -inf, as in TOML
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_value, value)) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(_entries(value)) + "}"
    raise TypeError(f"write_toml: expected TOML's types, got {type(value).__name__}.")


def flattened(document: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values of a document by keys with dots in them; tuples become lists."""
    found: dict[str, Any] = {}
    for key, value in document.items():
        if isinstance(value, dict):
            found |= flattened(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = list(value) if isinstance(value, tuple) else value
    return found
