"""Prompts and completions as token ids: what a policy would have read and written."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from fastrl.ops._checks import fail, wrong_type
from fastrl.rewards._texts import text_of

_OP = "PreferenceModel"

Ids = tuple[int, ...]


class Encoder:
    """Texts, chat messages and ids as ids.

    A prompt's text is encoded with the tokenizer's special tokens, chat messages by its template
    with the generation prompt. A completion's text is encoded by itself and without special
    tokens, as a policy goes on after its prompt, and the end token stands behind it. Ids stay as
    they are.

    Args:
        tokenizer: with `encode`; None: for ids alone.
        vocab_size: ids are below it.
        eos_token_id: behind the text of each completion; None: nothing is.
    """

    def __init__(self, tokenizer: Any, vocab_size: int, eos_token_id: int | None) -> None:
        self.tokenizer, self.vocab_size, self.eos_token_id = tokenizer, vocab_size, eos_token_id

    def prompt(self, prompt: Any, name: str = "prompts") -> Ids:
        """Raises:
        ValueError: no tokenizer, or none with a template; no tokens; an id outside the vocabulary.
        TypeError: something else than a text, messages or ids.
        """
        if isinstance(prompt, str):
            given = self._encode(prompt, name)
            bos = getattr(self.tokenizer, "bos_token_id", None)
            # Of a text that has the template's BOS already.
            given = given[1:] if bos is not None and given[:2] == [bos, bos] else given
        else:
            given = self._templated(prompt, name) if is_chat(prompt) else prompt
        ids = self._checked(given, name)
        if not ids:
            remedy = "Start an empty prompt with a BOS token, or drop it."
            raise fail(_OP, f"{name} of at least one token", "none", remedy)
        return ids

    def completion(self, completion: Any, name: str = "completions") -> Ids:
        """As `prompt`; chat messages are one message, and no tokens are allowed."""
        if isinstance(completion, str) or is_chat(completion):
            if not isinstance(completion, str) and len(completion) != 1:
                got, remedy = f"{len(completion)} messages", "Move the others into the prompt."
                raise fail(_OP, f"{name} of one message each", got, remedy)
            text = self._encode(text_of(completion), name, add_special_tokens=False)
            end = [] if self.eos_token_id is None else [self.eos_token_id]
            return self._checked([*text, *end], name)
        return self._checked(completion, name)

    def _encode(self, text: str, name: str, **options: Any) -> list[int]:
        if self.tokenizer is None:
            remedy = "Pass tokenizer=, or token ids."
            raise fail(_OP, f"a tokenizer for {name} of text", "None", remedy)
        known = inspect.signature(self.tokenizer.encode).parameters
        options = {key: value for key, value in options.items() if key in known}
        encoded = self.tokenizer.encode(text, **options)
        return list(getattr(encoded, "ids", encoded))

    def _templated(self, messages: Sequence[Any], name: str) -> list[int]:
        if getattr(self.tokenizer, "chat_template", None) is None:
            got = "None" if self.tokenizer is None else f"{type(self.tokenizer).__name__} without"
            remedy = "Set tokenizer.chat_template, or pass text."
            raise fail(_OP, f"a tokenizer with a chat template for {name} of messages", got, remedy)
        encoded = self.tokenizer.apply_chat_template(
            list(messages), tokenize=True, return_dict=True, add_generation_prompt=True
        )
        return list(encoded["input_ids"])

    def _checked(self, ids: Any, name: str) -> Ids:
        ids = ids.tolist() if hasattr(ids, "tolist") else ids
        is_list = isinstance(ids, Sequence) and not isinstance(ids, str)
        if not is_list or not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
            got = type(ids).__name__
            remedy = "Pass one of these for each completion."
            raise wrong_type(_OP, f"{name} of text, chat messages or token ids", got, remedy)
        if ids and not 0 <= min(ids) <= max(ids) < self.vocab_size:
            got, remedy = f"{min(ids)} to {max(ids)}", "Use the tokenizer of the model."
            raise fail(_OP, f"{name} with ids in [0, {self.vocab_size})", got, remedy)
        return tuple(ids)


def is_chat(given: Any) -> bool:
    """Whether it is a list of chat messages."""
    is_list = isinstance(given, Sequence) and not isinstance(given, str) and len(given) > 0
    return is_list and all(isinstance(message, Mapping) for message in given)


def same_tokenizer(one: Any, other: Any) -> bool:
    """Whether the ids of one are those of the other: the same token behind each."""
    if one is other:
        return True
    if hasattr(one, "get_vocab") and hasattr(other, "get_vocab"):
        return one.get_vocab() == other.get_vocab()
    return type(one) is type(other) and bool(one == other)
