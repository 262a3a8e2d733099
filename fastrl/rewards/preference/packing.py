"""Completions packed behind their prompts, each prompt and each completion once in a pass."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fastrl.layout import PackedBatch, pack_groups
from fastrl.rewards.preference.texts import Ids


@dataclass(frozen=True)
class Item:
    """Completions of one prompt that have to be in one pass: a pair, or one by itself."""

    prompt: Ids
    completions: tuple[Ids, ...]


@dataclass(frozen=True)
class Pass:
    """Some of the items, packed.

    Attributes:
        batch: each completion has one more token behind it, which no value looks at: the rows of
            hidden states that predict the targets are then those after 0, 1, ..., T of its tokens.
        items: which items, by number.
        starts: for each of them the row after 0 tokens of each of its completions.
    """

    batch: PackedBatch
    items: list[int]
    starts: list[tuple[int, ...]]


def passes(items: Sequence[Item], max_tokens: int | None, device: torch.device) -> list[Pass]:
    """Passes of at most max_tokens tokens; an item that is longer has one by itself.

    Items of one prompt stand together, in the order in which their prompts came first.

    Args:
        max_tokens: >= 1; None: all in one pass.
    """
    by_prompt: dict[Ids, list[int]] = {}
    for index, item in enumerate(items):
        by_prompt.setdefault(item.prompt, []).append(index)
    made: list[Pass] = []
    filling = _Filling(items)
    for indices in by_prompt.values():
        for index in indices:
            if max_tokens is not None and filling.indices:
                if filling.size + filling.cost(index) > max_tokens:
                    made.append(filling.packed(device))
                    filling = _Filling(items)
            filling.add(index)
    return [*made, filling.packed(device)] if filling.indices else made


class _Filling:
    """A pass while items are put into it."""

    def __init__(self, items: Sequence[Item]) -> None:
        self.items = items
        self.indices: list[int] = []
        self.size = 0  # tokens
        self.groups: dict[Ids, dict[Ids, None]] = {}  # completions of each prompt, in order

    def cost(self, index: int) -> int:
        item = self.items[index]
        group = self.groups.get(item.prompt)
        new = set(item.completions) - set(group or ())
        prompt = len(item.prompt) if group is None else 0
        return prompt + sum(len(completion) + 1 for completion in new)

    def add(self, index: int) -> None:
        self.size += self.cost(index)
        item = self.items[index]
        group = self.groups.setdefault(item.prompt, {})
        group.update(dict.fromkeys(item.completions))
        self.indices.append(index)

    def packed(self, device: torch.device) -> Pass:
        prompts = [_tensor(prompt) for prompt in self.groups]
        completions = [[_tensor((*ids, 0)) for ids in group] for group in self.groups.values()]
        starts: dict[tuple[Ids, Ids], int] = {}
        row = 0
        for prompt, group in self.groups.items():
            for ids in group:
                starts[prompt, ids] = row
                row += len(ids) + 1
        of_items = [
            tuple(starts[self.items[i].prompt, ids] for ids in self.items[i].completions)
            for i in self.indices
        ]
        return Pass(pack_groups(prompts, completions).to(device), self.indices, of_items)


def _tensor(ids: Ids) -> torch.Tensor:
    return torch.tensor(ids, dtype=torch.int64)
