"""The dataset as the trainers see it: examples with a prompt, its token ids and more columns."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from fastrl.rollout import completion_seeds

_ORDER = 1  # a stream of random numbers apart from those of the completions


class Tokenizer(Protocol):
    """`tokenizers.Tokenizer` and the tokenizers of transformers are of this kind."""

    def encode(self, text: str) -> Any:
        """A list of ids, or an object that has it as `.ids`."""
        ...

    def decode(self, ids: list[int]) -> str:
        """Text of the ids."""
        ...


@dataclass(frozen=True)
class Example:
    """One entry of a dataset.

    Attributes:
        prompt: what reward functions are given: the text, or a list of ids where there is none.
        token_ids: [P] int64.
        columns: the entry's further columns.
    """

    prompt: str | list[int]
    token_ids: Tensor
    columns: dict[str, Any]


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
    """Anything with `len` and whole-number indices, read one entry at a time.

    Args:
        dataset: entries are texts, [P] int64 tensors, lists of ids, or dicts that have one of
            these as "prompt"; a dict's other columns go to the reward functions.
        vocab_size: ids have to be below it.
        tokenizer: for texts.
    Raises:
        ValueError: the dataset is empty; later, an entry without tokens or with ids out of range.
        TypeError: the dataset has no len; later, an entry of another type.
    """

    def __init__(self, dataset: Any, vocab_size: int, tokenizer: Tokenizer | None = None) -> None:
        if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
            raise TypeError(
                "Trainer: expected dataset with len() and whole-number indices, got "
                f"{type(dataset).__name__}. Pass a list, or list(...) of an iterable."
            )
        if len(dataset) == 0:
            raise ValueError(
                "Trainer: expected dataset with at least one prompt, got none. Pass prompts."
            )
        self.dataset = dataset
        self.vocab_size = vocab_size
        self.tokenizer = tokenizer

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Example:
        entry = self.dataset[index]
        columns: dict[str, Any] = {}
        if isinstance(entry, Mapping):
            if "prompt" not in entry:
                raise ValueError(
                    f'Trainer: expected dataset[{index}] to have "prompt", got columns '
                    f"{sorted(map(str, entry))}. Rename the column that holds the prompt."
                )
            columns = {name: value for name, value in entry.items() if name != "prompt"}
            entry = entry["prompt"]
        prompt = entry if isinstance(entry, str) else None
        token_ids = self._token_ids(entry, index)
        return Example(token_ids.tolist() if prompt is None else prompt, token_ids, columns)

    def decode(self, completion_ids: list[int], eos_token_id: int | None) -> str | list[int]:
        """A completion as reward functions see it: text without the EOS, or all ids."""
        if self.tokenizer is None:
            return completion_ids
        has_eos = bool(completion_ids) and completion_ids[-1] == eos_token_id
        return self.tokenizer.decode(completion_ids[:-1] if has_eos else completion_ids)

    def _token_ids(self, entry: Any, index: int) -> Tensor:
        if isinstance(entry, str):
            if self.tokenizer is None:
                raise ValueError(
                    f"Trainer: expected tokenizer for the text in dataset[{index}], got None. "
                    "Pass tokenizer=, or prompts of token ids."
                )
            encoded = self.tokenizer.encode(entry)
            entry = list(getattr(encoded, "ids", encoded))
        if isinstance(entry, Sequence) and all(isinstance(token, int) for token in entry):
            entry = torch.tensor(entry, dtype=torch.int64)
        if not isinstance(entry, Tensor) or entry.dtype != torch.int64:
            kind = entry.dtype if isinstance(entry, Tensor) else type(entry).__name__
            raise TypeError(
                f"Trainer: expected dataset[{index}] a text, an int64 tensor or a list of ids, "
                f'got {kind}. Dicts have it as "prompt".'
            )
        if entry.dim() != 1 or entry.numel() == 0:
            raise ValueError(
                f"Trainer: expected a prompt [P] with P >= 1 in dataset[{index}], got "
                f"{tuple(entry.shape)}. Start an empty prompt with a BOS token, or drop it."
            )
        low, high = int(entry.min()), int(entry.max())
        if low < 0 or high >= self.vocab_size:
            raise ValueError(
                f"Trainer: expected prompt ids in [0, {self.vocab_size}) in dataset[{index}], "
                f"got ids from {low} to {high}. Use the tokenizer that the model was built for."
            )
        return entry
