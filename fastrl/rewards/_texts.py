"""The text in what reward functions are given: plain, or in chat messages."""

from collections.abc import Mapping, Sequence
from typing import Any


def text_of(completion: Any) -> str:
    """The text of a completion: as it is, or the contents of its messages, one after the other.

    Raises:
        TypeError: token ids, as there are without a tokenizer.
    """
    return _text(completion, "completions", "")


def prompt_text(prompt: Any) -> str:
    """The text of a prompt: as it is, or the contents of its messages, a line each.

    Raises:
        TypeError: token ids, as there are without a tokenizer.
    """
    return _text(prompt, "prompts", "\n")


def _text(given: Any, name: str, between: str) -> str:
    if isinstance(given, str):
        return given
    is_chat = isinstance(given, Sequence) and all(isinstance(x, Mapping) for x in given)
    if is_chat and all(isinstance(x.get("content"), str) for x in given):
        return between.join(message["content"] for message in given)
    raise TypeError(
        f"rewards: expected {name} of text or of chat messages with text, got "
        f"{type(given).__name__}. Pass the trainer a tokenizer."
    )
