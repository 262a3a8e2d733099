"""What a reward function returned, checked, as rewards of the tokens that the policy wrote."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, compress
from typing import Any

import torch
from torch import Tensor

from fastrl.rewards._calling import as_float
from fastrl.rollout import Rollout


@dataclass(frozen=True)
class GivenRewards:
    """One function's rewards, before its weight.

    Attributes:
        rewards: [M] float64, following each target; 0 where there is no opinion.
        sums: [C] float64, of each completion; that of a completion without targets as well, if
            it was given as one number.
        has_opinion: [C] bool.
    """

    rewards: Tensor
    sums: Tensor
    has_opinion: Tensor


class CompletionTokens:
    """The token ids of a rollout's completions, and which of them are targets, on the host.

    Attributes:
        ids: C lists, those included that the policy did not write.
        is_target: C lists of bools, one for each of the ids.
        lengths: [C] int64, targets of each.
    """

    def __init__(self, rollout: Rollout) -> None:
        ids = rollout.completion_ids
        ends = list(accumulate(map(len, ids), initial=0))
        # All at once: from a GPU, every copy waits. What is a target stands on the host as well.
        flat_ids = torch.cat(ids).tolist()
        batch = rollout.batch
        segments = batch.layout.unpack(batch._host_is_target)
        is_target = [segments[s] for s in batch._host_completion_segments.tolist()]
        flat_targets = torch.cat(is_target).tolist()
        spans = [slice(*span) for span in zip(ends, ends[1:], strict=False)]
        self.ids: list[list[int]] = [flat_ids[span] for span in spans]
        self.is_target: list[list[bool]] = [flat_targets[span] for span in spans]
        self.lengths = torch.tensor([sum(is_target) for is_target in self.is_target])

    def __len__(self) -> int:
        return len(self.ids)

    def given(self, result: Any, name: str) -> GivenRewards:
        """The rewards in what function `name` returned.

        Raises:
            ValueError: the list, or an entry of it, is of the wrong length.
            TypeError: an entry is neither a number, nor a list of numbers, nor None.
        """
        result = result.tolist() if hasattr(result, "tolist") else result
        if not isinstance(result, Sequence) or isinstance(result, str) or len(result) != len(self):
            is_list = isinstance(result, Sequence) and not isinstance(result, str)
            got = len(result) if is_list else type(result).__name__
            raise ValueError(
                f"Trainer: expected reward function {name} to give a list of {len(self)} "
                f"rewards, one for each completion, got {got}. Return one entry for each "
                "completion."
            )
        entries = [as_float(e.tolist() if hasattr(e, "tolist") else e) for e in result]
        rewards: list[float] = []
        sums: list[float] = []
        for index, entry in enumerate(entries):
            row = self._row(entry, name, index)
            rewards += row
            is_number = isinstance(entry, int | float)
            sums.append(float(entry) if is_number else _sum(row))
        opinions = [entry is not None for entry in entries]
        return GivenRewards(_float64(rewards), _float64(sums), torch.tensor(opinions))

    def _row(self, entry: Any, name: str, index: int) -> list[float]:
        """One completion's rewards, by target."""
        is_target = self.is_target[index]
        number = sum(is_target)
        if entry is None or (isinstance(entry, int | float) and number == 0):
            return [0.0] * number
        if isinstance(entry, int | float):
            return [0.0] * (number - 1) + [float(entry)]
        if not isinstance(entry, Sequence) or isinstance(entry, str):
            raise TypeError(
                f"Trainer: expected reward function {name} to give floats, lists of floats or "
                f"None, got {type(entry).__name__} for completion {index}. Return a number."
            )
        if len(entry) != len(is_target):
            raise ValueError(
                f"Trainer: expected reward function {name} to give {len(is_target)} rewards for "
                f"completion {index}, one for each of its completion_ids, got {len(entry)}. "
                "Count the EOS and the tokens of tools too, or return one float."
            )
        try:
            return [float(as_float(value)) for value in compress(entry, is_target)]
        except (TypeError, ValueError) as error:
            raise TypeError(
                f"Trainer: expected reward function {name} to give numbers for the tokens of "
                f"completion {index}, got {error}. Return floats; None stands only for a whole "
                "completion."
            ) from error


def _sum(row: list[float]) -> float:
    """Its sum; inf or NaN as IEEE has it."""
    try:
        return math.fsum(row) if all(map(math.isfinite, row)) else sum(row)
    except OverflowError:  # of finite numbers
        return sum(row)


def _float64(numbers: list[float]) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)
