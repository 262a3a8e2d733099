"""Calls that Dynamo cannot trace, where it may look on: a loss of the caller's, and process groups,
in whose functions it does not come to an end.

In a file of its own: torch.compiler.disable imports Dynamo, which takes more than a second.
"""

from collections.abc import Callable
from typing import Any

import torch


@torch.compiler.disable(
    reason="fastrl: linear_token_loss, group= and others that stay in Python break the graph here"
)
def call(function: Callable[..., Any], *args: Any, **options: Any) -> Any:
    return function(*args, **options)
