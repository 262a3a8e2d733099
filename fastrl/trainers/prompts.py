"""The dataset as the trainers see it: examples with a prompt, its token ids and more columns."""

import functools
import hashlib
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from fastrl.rollout import completion_seeds
from fastrl.trainers._random_state import keeping_random_state, seed_generators

_DIGESTED = 100
_ORDER = 1  # a stream of random numbers apart from those of the completions

Messages = list[dict[str, Any]]


class Tokenizer(Protocol):
    """`tokenizers.Tokenizer` and the tokenizers of transformers are of this kind.

    Chat messages need a third method as well, transformers' `apply_chat_template`.
    """

    def encode(self, text: str, /) -> Any:
        """A list of ids, or an object that has it as `.ids`."""
        ...

    def decode(self, ids: list[int], /) -> Any:  # transformers: of lists of lists, a list
        """Text of the ids; called with skip_special_tokens if it has that argument: True for
        what people read, False to look for stop strings."""
        ...


@dataclass(frozen=True)
class Example:
    """One entry of a dataset.

    Attributes:
        prompt: what reward functions are given: the text or the chat messages as they stand in
            the dataset, or a list of ids where there is neither.
        token_ids: [P] int64.
        columns: the entry's further columns.
    """

    prompt: str | Messages | list[int]
    token_ids: Tensor
    columns: dict[str, Any]

    @property
    def is_chat(self) -> bool:
        """True where the prompt is chat messages; the completion is then a message, too."""
        return is_chat(self.prompt)


class PromptOrder:
    """Which entry stands at a position of the run: each once an epoch, in an order of its own.

    The order is a function of seed and epoch, so a resumed run needs only its step.

    Args:
        size: entries of the dataset.
        seed: the run's.
    """

    def __init__(self, size: int, seed: int) -> None:
        self.size = size
        self.seed = seed
        self._epoch = -1
        self._order: list[int] = []

    def __call__(self, position: int) -> int:
        epoch, offset = divmod(position, self.size)
        if self._epoch != epoch:
            seed = int(completion_seeds(self.seed, _ORDER, torch.tensor([epoch]), 1))
            generator = torch.Generator().manual_seed(seed)
            self._order = torch.randperm(self.size, generator=generator).tolist()
            self._epoch = epoch
        return self._order[offset]


class PromptDataset:
    """Anything with `len` and whole-number indices, or a pandas table, read an entry at a time.

    A text becomes `tokenizer.encode(text)`, special tokens included, as in TRL; if it begins with
    the text of BOS itself, the second BOS is dropped. Chat messages become
    `tokenizer.apply_chat_template(messages, add_generation_prompt=True)`, and nothing is added.

    Args:
        dataset: entries are texts, lists of chat messages {"role": ..., "content": ...}, [P] int64
            tensors, lists of ids, or dicts that have one of these as "prompt"; a dict's other
            columns go to the reward functions.
        vocab_size: ids have to be below it.
        tokenizer: for texts and chat messages.
        max_prompt_tokens: a longer prompt is an error, and is never cut; None: any length.
        chat_template_kwargs: further arguments of `apply_chat_template`.
    Raises:
        ValueError: the dataset is empty; later, an entry without tokens, with too many, or with
            ids out of range.
        TypeError: the dataset has no len, or is a dict; later, an entry of another type.
    """

    def __init__(
        self,
        dataset: Any,
        vocab_size: int,
        tokenizer: Tokenizer | None = None,
        *,
        max_prompt_tokens: int | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        if isinstance(dataset, Mapping):
            raise TypeError(
                "Trainer: expected dataset with an entry for each prompt, got a "
                f"{type(dataset).__name__} of {', '.join(map(str, dataset))}. Pass one split of "
                "it, or a list of dicts where these are columns."
            )
        if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
            raise TypeError(
                "Trainer: expected dataset with len() and whole-number indices, got "
                f"{type(dataset).__name__}. Pass a list, or list(...) of an iterable."
            )
        if len(dataset) == 0:
            raise ValueError(
                "Trainer: expected dataset with at least one prompt, got none. Pass prompts."
            )
        if max_prompt_tokens is not None and max_prompt_tokens < 1:
            raise ValueError(
                f"Trainer: expected max_prompt_tokens >= 1, got {max_prompt_tokens}. "
                "Pass None for prompts of any length."
            )
        self.dataset = dataset
        self.vocab_size = vocab_size
        self.tokenizer = tokenizer
        self.max_prompt_tokens = max_prompt_tokens
        self.chat_template_kwargs = dict(chat_template_kwargs or {})
        self._decode_options = _decode_options(tokenizer)

    def __len__(self) -> int:
        return len(self.dataset)

    @functools.cached_property
    def digest(self) -> str:
        """Of the prompts of at most 100 entries, evenly from all: a resume tells others by it."""
        count = min(len(self), _DIGESTED)
        found = hashlib.sha256()
        with keeping_random_state():  # of a dataset that draws
            seed_generators(0)
            for index in range(count):
                entry = self._entry(index * len(self) // count)
                found.update(
                    canonical(entry.get("prompt") if isinstance(entry, Mapping) else entry)
                )
        return found.hexdigest()[:16]

    def _entry(self, index: int) -> Any:
        # A pandas table has its rows there; in brackets it has its columns.
        entry = getattr(self.dataset, "iloc", self.dataset)[index]
        return entry.to_dict() if hasattr(entry, "to_dict") else entry

    def __getitem__(self, index: int) -> Example:
        entry = self._entry(index)
        columns: dict[str, Any] = {}
        if isinstance(entry, Mapping):
            if "prompt" not in entry:
                raise ValueError(
                    f'Trainer: expected dataset[{index}] to have "prompt", got columns '
                    f"{sorted(map(str, entry))}. Rename the column that holds the prompt."
                )
            columns = {name: value for name, value in entry.items() if name != "prompt"}
            entry = entry["prompt"]
        if not isinstance(entry, Tensor) and hasattr(entry, "tolist"):
            entry = entry.tolist()  # numpy's, as tables read from files have them
        if isinstance(entry, str):
            token_ids = self._checked(self._encoded(entry, index), index)
            return Example(entry, token_ids, columns)
        if is_chat(entry):
            token_ids = self._checked(self._templated(entry, index), index)
            return Example(list(entry), token_ids, columns)
        token_ids = self._checked(entry, index)
        return Example(token_ids.tolist(), token_ids, columns)

    def decode(
        self, completion_ids: list[int], eos_token_id: int | Sequence[int] | None
    ) -> str | list[int]:
        """A completion as reward functions see it: its text, or all its ids without a tokenizer.

        The text is without the EOS at its end and without the special tokens that the tokenizer
        knows.
        """
        if self.tokenizer is None:
            return completion_ids
        eos = [eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id or ())
        has_eos = bool(completion_ids) and completion_ids[-1] in eos
        ids = completion_ids[:-1] if has_eos else completion_ids
        return self.tokenizer.decode(ids, **self._decode_options)

    def _encoded(self, text: str, index: int) -> list[int]:
        if self.tokenizer is None:
            raise ValueError(
                f"Trainer: expected tokenizer for the text in dataset[{index}], got None. "
                "Pass tokenizer=, or prompts of token ids."
            )
        encoded = self.tokenizer.encode(text)
        ids = list(getattr(encoded, "ids", encoded))
        bos = getattr(self.tokenizer, "bos_token_id", None)
        return ids[1:] if bos is not None and ids[:2] == [bos, bos] else ids

    def _templated(self, messages: Sequence[Any], index: int) -> list[int]:
        tokenizer: Any = self.tokenizer
        if not hasattr(tokenizer, "apply_chat_template"):
            raise ValueError(
                "Trainer: expected tokenizer with apply_chat_template for the chat messages in "
                f"dataset[{index}], got {type(tokenizer).__name__}. Pass a tokenizer of "
                "transformers, or prompts of text."
            )
        if getattr(tokenizer, "chat_template", "") is None:
            raise ValueError(
                "Trainer: expected tokenizer with a chat template for the chat messages in "
                f"dataset[{index}], got chat_template=None. Set tokenizer.chat_template."
            )
        options = {"add_generation_prompt": True, **self.chat_template_kwargs}
        encoded = tokenizer.apply_chat_template(
            list(messages), tokenize=True, return_dict=True, **options
        )
        return list(encoded["input_ids"])

    def _checked(self, entry: Any, index: int) -> Tensor:
        """The entry's token ids, [P] int64."""
        if isinstance(entry, Sequence) and all(isinstance(token, int) for token in entry):
            entry = torch.tensor(entry, dtype=torch.int64)
        if not isinstance(entry, Tensor) or entry.dtype != torch.int64:
            kind = entry.dtype if isinstance(entry, Tensor) else type(entry).__name__
            raise TypeError(
                f"Trainer: expected dataset[{index}] a text, chat messages, an int64 tensor or a "
                f'list of ids, got {kind}. Dicts have it as "prompt", messages a "role" each.'
            )
        if entry.dim() != 1 or entry.numel() == 0:
            raise ValueError(
                f"Trainer: expected a prompt [P] with P >= 1 in dataset[{index}], got "
                f"{tuple(entry.shape)}. Start an empty prompt with a BOS token, or drop it."
            )
        if self.max_prompt_tokens is not None and entry.numel() > self.max_prompt_tokens:
            raise ValueError(
                f"Trainer: expected at most max_prompt_tokens = {self.max_prompt_tokens} tokens in "
                f"dataset[{index}], got {entry.numel()}. Shorten the prompt or leave it out."
            )
        low, high = int(entry.min()), int(entry.max())
        if low < 0 or high >= self.vocab_size:
            raise ValueError(
                f"Trainer: expected prompt ids in [0, {self.vocab_size}) in dataset[{index}], "
                f"got ids from {low} to {high}. Use the tokenizer that the model was built for."
            )
        return entry


def canonical(value: Any) -> bytes:
    """As JSON, for a digest: tensors and arrays as lists, others as the name of their kind."""
    try:
        text = json.dumps(value, sort_keys=True, default=_plain)
    except TypeError:  # keys that JSON does not know, or that have no order
        text = json.dumps(_with_text_keys(value), sort_keys=True, default=_plain)
    return text.encode()


def _plain(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else type(value).__name__


def _with_text_keys(value: Any) -> Any:
    if isinstance(value, dict):
        return {repr(key): _with_text_keys(each) for key, each in value.items()}
    return [_with_text_keys(each) for each in value] if isinstance(value, list | tuple) else value


def is_chat(prompt: Any) -> bool:
    """Whether it is a list of chat messages: dicts that have a role."""
    return (
        isinstance(prompt, Sequence)
        and len(prompt) > 0
        and all(isinstance(message, Mapping) and "role" in message for message in prompt)
    )


def decode_all(tokenizer: Any) -> Callable[[list[int]], str]:
    """Ids to text with the special tokens in it, as a stop string may be one."""
    return functools.partial(tokenizer.decode, **_decode_options(tokenizer, skip=False))


def _decode_options(tokenizer: Any, *, skip: bool = True) -> dict[str, bool]:
    """transformers keeps special tokens in a text unless it is told otherwise, tokenizers not."""
    if tokenizer is None:
        return {}
    knows = "skip_special_tokens" in inspect.signature(tokenizer.decode).parameters
    return {"skip_special_tokens": skip} if knows else {}
