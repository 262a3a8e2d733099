"""Trees of dicts and lists as JSON, with their tensors beside it.

A tensor stands in the JSON as {"$tensor": name}, a float that JSON does not know as
{"$float": "nan" | "inf" | "-inf"}, and a key that begins with $ has one more. A tensor's name is
its path: keys and indices with / between them, written as in a JSON pointer (RFC 6901).
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from torch import Tensor

Document = dict[str, Any]


def flatten(tree: Document) -> tuple[Document, dict[str, Tensor]]:
    """A tree's JSON, and its tensors by name; they are the tree's own, not copies.

    Raises:
        TypeError: a leaf is not a tensor, number, string, bool or None, or a key not a string.
    """
    tensors: dict[str, Tensor] = {}
    return _encode(tree, "", tensors), tensors


def unflatten(document: Document, read: Callable[[str], Tensor]) -> Document:
    """The tree again, with `read(name)` for each tensor; tuples have become lists.

    Raises:
        ValueError, KeyError: the document is not one of `flatten`, or read has no such tensor.
    """
    return _decode(document, read)


def _encode(node: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(node, dict):
        for key in node:
            if not isinstance(key, str):
                raise TypeError(
                    f"save: expected keys of the state {path or '/'} to be strings, got {key!r}. "
                    "Use str(key), and turn it back in load_state_dict."
                )
        return {
            "$" + key if key.startswith("$") else key: _encode(
                value, f"{path}/{_escaped(key)}", tensors
            )
            for key, value in node.items()
        }
    if isinstance(node, list | tuple):
        return [_encode(value, f"{path}/{i}", tensors) for i, value in enumerate(node)]
    if isinstance(node, Tensor):
        tensors[path[1:]] = node
        return {"$tensor": path[1:]}
    if isinstance(node, np.generic):
        node = node.item()
    if isinstance(node, float) and not math.isfinite(node):
        return {"$float": str(float(node))}
    if node is None or isinstance(node, str | bool | int | float):
        return node
    raise TypeError(
        f"save: expected the state {path or '/'} to be a tensor, number, string, bool, None, list "
        f"or dict, got {type(node).__name__}. Convert it in state_dict."
    )


def _decode(node: Any, read: Callable[[str], Tensor]) -> Any:
    if isinstance(node, list):
        return [_decode(value, read) for value in node]
    if not isinstance(node, dict):
        return node
    if "$tensor" in node:
        return read(node["$tensor"])
    if "$float" in node:
        return float(node["$float"])
    return {
        key[1:] if key.startswith("$") else key: _decode(value, read) for key, value in node.items()
    }


def _escaped(key: str) -> str:
    return key.replace("~", "~0").replace("/", "~1")
