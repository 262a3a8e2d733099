"""Rows of prompts and references as packed batches of bounded size, in a random order."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fastrl.layout import PackedBatch

Group = tuple[list[int], list[list[int]]]  # a prompt, its references


def encoded(rows: Sequence[dict[str, Any]], tokenizer: Any, ends: list[int]) -> list[Group]:
    """Token ids of rows; those with the same prompt are one group, in the order of the first.

    Args:
        rows: with texts "prompt" and "reference"; rows without tokens to learn are left out.
        ends: is appended to each reference.
    """
    prompts = tokenizer([row["prompt"] for row in rows])["input_ids"]
    texts = [row["reference"] for row in rows]
    references = tokenizer(texts, add_special_tokens=False)["input_ids"]
    groups: dict[tuple[int, ...], list[list[int]]] = {}
    for prompt, reference in zip(prompts, references, strict=True):
        if prompt and (reference or ends):
            groups.setdefault(tuple(prompt), []).append([*reference, *ends])
    return [(list(prompt), found) for prompt, found in groups.items()]


class RowBatches:
    """Batches of groups, each of as many as fit; every epoch has its own random order.

    Args:
        groups: all that there are.
        size: most tokens in a batch; a longer group is cut, and one longer row stands alone.
        seed: of the order.
    """

    def __init__(self, groups: Sequence[Group], size: int, seed: int) -> None:
        self.groups = [part for group in groups for part in _parts(group, size)]
        self.size, self.seed = size, seed
        self._epoch, self._position = 0, 0  # which batch of which epoch is next
        self._batches: list[list[Group]] = []

    @property
    def epochs(self) -> float:
        """How often all rows were seen."""
        return self._epoch + self._position / max(1, len(self._batches))

    def next(self) -> list[Group]:
        """The next batch."""
        if not self._batches:
            self._batches = list(self.epoch(self._epoch))
        batch = self._batches[self._position]
        self._position += 1
        if self._position == len(self._batches):
            self._epoch, self._position, self._batches = self._epoch + 1, 0, []
        return batch

    def epoch(self, number: int) -> Iterator[list[Group]]:
        """The batches of an epoch."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + number)
        batch: list[Group] = []
        tokens = 0
        for index in torch.randperm(len(self.groups), generator=generator).tolist():
            group = self.groups[index]
            if batch and tokens + _size(group) > self.size:
                yield batch
                batch, tokens = [], 0
            batch.append(group)
            tokens += _size(group)
        yield batch

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self._epoch, "position": self._position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._epoch, self._position, self._batches = state["epoch"], state["position"], []
        if self._position:
            self._batches = list(self.epoch(self._epoch))


def packed(groups: Sequence[Group], prompt_weight: float) -> tuple[PackedBatch, Tensor]:
    """One batch of groups, and the weight [M] float32 of each of its targets in the loss.

    Targets are the references' tokens, and with a weight those of prompts but their first.
    """
    segments: list[list[int]] = []
    parents: list[int] = []
    weights: list[list[float]] = []
    for prompt, references in groups:
        of_prompt = [0.0] + [prompt_weight] * (len(prompt) - 1)
        if len(references) == 1:  # one segment is quicker than two
            segments.append(prompt + references[0])
            parents.append(-1)
            weights.append(of_prompt + [1.0] * len(references[0]))
            continue
        root = len(segments)
        segments += [prompt, *references]
        parents += [-1] + [root] * len(references)
        weights += [of_prompt, *([1.0] * len(reference) for reference in references)]
    per_token = [torch.tensor(each) for each in weights]
    batch = PackedBatch.from_segments(
        [torch.tensor(ids) for ids in segments], parents, [each > 0 for each in per_token]
    )
    joined = torch.cat(per_token)  # segments stand in depth-first order already
    return batch, joined[joined > 0]


def _size(group: Group) -> int:
    prompt, references = group
    return len(prompt) + sum(map(len, references))


def _parts(group: Group, size: int) -> list[Group]:
    """A prompt with its references, as many at a time as fit with it."""
    prompt, references = group
    parts: list[Group] = [(prompt, [])]
    for reference in references:
        if parts[-1][1] and _size(parts[-1]) + len(reference) > size:
            parts.append((prompt, []))
        parts[-1][1].append(reference)
    return parts
