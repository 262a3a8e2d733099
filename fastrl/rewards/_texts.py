"""The text in what reward functions are given: plain, or in chat messages."""

from collections.abc import Mapping, Sequence
from typing import Any


def text_of(completion: Any) -> str:
    """The text of a completion: as it is, or the contents of its messages, one after the other.

    Raises:
        TypeError: token ids, as there are without a tokenizer; a message without text.
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
    if isinstance(given, Sequence) and all(isinstance(x, Mapping) for x in given):
        contents = [_content(message) for message in given]
        if None not in contents:
            return between.join(map(str, contents))
    raise TypeError(
        f"rewards: expected {name} of text or of chat messages with text, got "
        f"{type(given).__name__}. Pass the trainer a tokenizer; images are not read."
    )


def _content(message: Mapping[str, Any]) -> str | None:
    """The text of a message, in one or in parts; "" of one that only calls tools; else None."""
    content = message.get("content")
    if content is None and message.get("tool_calls"):
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not all(isinstance(x, Mapping) for x in content):
        return None
    texts = [part.get("text") for part in content]
    return "".join(map(str, texts)) if all(isinstance(x, str) for x in texts) else None
