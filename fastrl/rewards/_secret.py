"""The key of a service: read from the environment for each call, and kept nowhere."""

import base64
import json
import os
import re
import string
import urllib.parse

_NAME = re.compile(r"[A-Z_][A-Z0-9_]*")
_KEY = re.compile(r"[!-~]+")  # what may stand in a header
_LOWER = str.maketrans(string.ascii_uppercase, string.ascii_lowercase)  # keeps the length
_FRAGMENT = 8  # a part of a key of this length is hidden too


def check_key_variable(name: str | None, owner: str) -> None:
    """Raises ValueError unless it can be the name of a variable; who passes a key finds out here.

    What was passed is not in the message.
    """
    if name is not None and not (isinstance(name, str) and _NAME.fullmatch(name)):
        raise ValueError(
            f"{owner}: expected key_variable with the name of an environment variable in capital "
            "letters, digits and underscores, got something else, which is not shown. Put the "
            'key into the environment and pass the name of its variable, such as "JUDGE_KEY".'
        )


def key_from_environment(name: str, owner: str) -> str:
    """The key in the environment variable `name`.

    Raises:
        ValueError: there is none, or it cannot stand in a header; the key is not in the message.
    """
    key = os.environ.get(name, "").strip()
    if not key:
        raise ValueError(
            f"{owner}: expected the key in the environment variable {name}, got none. Set it, or "
            "pass key_variable = None for a service without keys."
        )
    if not _KEY.fullmatch(key):
        raise ValueError(
            f"{owner}: expected the key in the environment variable {name} to be of printable "
            "ASCII characters without spaces, got others. Set it again."
        )
    return key


def without_key(text: str, key: str | None) -> str:
    """The text with the key, and any 8 characters in a row of it, replaced by [key].

    The key is also found in other case, and URL-encoded, escaped in JSON or in base64.
    """
    if not key:
        return text
    forms = {
        key,
        urllib.parse.quote(key, safe=""),
        json.dumps(key)[1:-1],
        base64.b64encode(key.encode()).decode().rstrip("="),
    }
    lowered = text.translate(_LOWER)
    is_key = [False] * len(text)
    for form in forms:
        width = min(len(form), _FRAGMENT)
        parts = {form[i : i + width].translate(_LOWER) for i in range(len(form) - width + 1)}
        for start in range(len(text) - width + 1):
            if lowered[start : start + width] in parts:
                is_key[start : start + width] = [True] * width
    pieces = []
    for i, char in enumerate(text):
        if not is_key[i]:
            pieces.append(char)
        elif i == 0 or not is_key[i - 1]:
            pieces.append("[key]")
    return "".join(pieces)
