"""Reward functions: called in TRL's way, checked, and summed into one reward per token."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from fastrl.rollout import Rollout
from fastrl.trainers.prompts import Example, PromptDataset

RewardFunction = Callable[..., Sequence[Any]]


class RewardFunctionError(RuntimeError):
    """A reward function raised; the cause stands in `__cause__`."""


@dataclass(frozen=True)
class Scores:
    """Rewards of one rollout, on the CPU.

    Attributes:
        rewards: [N] float32, following each token; 0 where a completion is not used.
        totals: [C] float32, each completion's sum over its tokens.
        is_used: [C] bool, False where a completion is not learned from.
        metrics: means over the completions, and counts, by name.
    """

    rewards: Tensor
    totals: Tensor
    is_used: Tensor
    metrics: dict[str, float]


class RewardScorer:
    """The weighted sum of reward functions.

    A function is called as `f(prompts=..., completions=..., completion_ids=..., **columns)`, each
    a list with one entry per completion, and gives a list with one entry per completion:

    - a float: the reward of the whole completion, which stands at its last token;
    - a list of floats, one per completion id, EOS included: an immediate reward for each token;
    - None: this function has no opinion on the completion, and adds nothing.

    A completion on which no function has an opinion, or whose reward is NaN or infinite, is not
    learned from; each kind is counted.

    Args:
        reward_functions: one function or a list of them.
        weights: a factor for each; None: 1 each.
    Raises:
        ValueError: no functions, or as many weights as functions are not given.
        TypeError: a function cannot be called.
    """

    def __init__(
        self,
        reward_functions: RewardFunction | Sequence[RewardFunction],
        weights: Sequence[float] | None = None,
    ) -> None:
        if callable(reward_functions):
            reward_functions = [reward_functions]
        self.functions = list(reward_functions)
        if not self.functions:
            raise ValueError(
                "Trainer: expected reward_functions with at least one function, got none. "
                "Pass a function f(prompts, completions, completion_ids, **columns) -> list."
            )
        for function in self.functions:
            if not callable(function):
                raise TypeError(
                    f"Trainer: expected reward_functions to be callable, got {function!r}. "
                    "Pass a function f(prompts, completions, completion_ids, **columns) -> list."
                )
        self.weights = [1.0] * len(self.functions) if weights is None else list(weights)
        if len(self.weights) != len(self.functions):
            raise ValueError(
                f"Trainer: expected reward_weights for {len(self.functions)} reward functions, "
                f"got {len(self.weights)}. Give one weight for each."
            )
        self.names = _distinct_names(self.functions)

    def __call__(
        self,
        examples: list[Example],
        rollout: Rollout,
        dataset: PromptDataset,
        eos_token_id: int | None,
    ) -> Scores:
        """Score a rollout whose prompts are those of `examples`.

        Raises:
            ValueError: a function's list, or an entry of it, is of the wrong length.
            TypeError: an entry is neither a number, nor a list of numbers, nor None.
            RewardFunctionError: a function raised.
        """
        lengths = rollout.lengths.cpu()
        completion_ids = [ids.tolist() for ids in rollout.token_ids.cpu().split(lengths.tolist())]
        arguments = _repeated(examples, len(completion_ids) // len(examples))
        arguments["completion_ids"] = completion_ids
        arguments["completions"] = [dataset.decode(ids, eos_token_id) for ids in completion_ids]

        owner = torch.repeat_interleave(torch.arange(len(completion_ids)), lengths)
        rewards = torch.zeros(owner.numel(), dtype=torch.float64)
        has_opinion = torch.zeros(len(completion_ids), dtype=torch.bool)
        metrics = {}
        for function, name, weight in zip(self.functions, self.names, self.weights, strict=True):
            result = _call(function, name, arguments)
            given, opinion = _per_token(result, name, completion_ids)
            rewards += weight * given
            has_opinion |= opinion
            metrics[f"rewards/{name}"] = _mean(_totals(given, owner, lengths)[opinion])

        rewards = rewards.float()
        totals = _totals(rewards, owner, lengths)
        # Of magnitudes: then every discounted partial sum is finite as well.
        is_finite = _totals(rewards.abs(), owner, lengths).isfinite()
        is_used = has_opinion & is_finite
        metrics["reward"] = _mean(totals[is_used])
        metrics["rewards/bad"] = int((~is_finite).sum())
        metrics["rewards/none"] = int((~has_opinion).sum())
        return Scores(rewards.masked_fill(~is_used[owner], 0.0), totals, is_used, metrics)


def _call(function: RewardFunction, name: str, arguments: dict[str, list[Any]]) -> Any:
    try:
        return function(**arguments)
    except Exception as error:
        raise RewardFunctionError(
            f"Trainer: reward function {name} raised {type(error).__name__}: {error}"
        ) from error


def _per_token(result: Any, name: str, completion_ids: list[list[int]]) -> tuple[Tensor, Tensor]:
    """What a function returned, as rewards [N] and where it had an opinion [C]."""
    result = result.tolist() if hasattr(result, "tolist") else result
    if not isinstance(result, Sequence) or len(result) != len(completion_ids):
        got = len(result) if isinstance(result, Sequence) else type(result).__name__
        raise ValueError(
            f"Trainer: expected reward function {name} to give a list of {len(completion_ids)} "
            f"rewards, one for each completion, got {got}. Return one entry for each completion."
        )
    rows = [
        _row(entry, name, index, len(ids))
        for index, (entry, ids) in enumerate(zip(result, completion_ids, strict=True))
    ]
    try:
        rewards = torch.tensor(list(chain.from_iterable(rows)), dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"Trainer: expected reward function {name} to give numbers for the tokens, got "
            f"{error}. Return floats; None stands only for a whole completion."
        ) from error
    return rewards, torch.tensor([entry is not None for entry in result])


def _row(entry: Any, name: str, index: int, length: int) -> Sequence[float]:
    """One completion's rewards, by token."""
    entry = entry.tolist() if hasattr(entry, "tolist") else entry
    if entry is None:
        return [0.0] * length
    if isinstance(entry, int | float):
        return [0.0] * (length - 1) + [entry]
    if not isinstance(entry, Sequence) or isinstance(entry, str):
        raise TypeError(
            f"Trainer: expected reward function {name} to give floats, lists of floats or None, "
            f"got {type(entry).__name__} for completion {index}. Return a number."
        )
    if len(entry) != length:
        raise ValueError(
            f"Trainer: expected reward function {name} to give {length} rewards for completion "
            f"{index}, one for each of its completion_ids, got {len(entry)}. "
            "Count the EOS too, or return one float."
        )
    return entry


def _repeated(examples: list[Example], count: int) -> dict[str, list[Any]]:
    """Prompts and columns, each entry once for each of its prompt's completions."""
    names = dict.fromkeys(name for example in examples for name in example.columns)
    repeated = [example for example in examples for _ in range(count)]
    columns = {name: [example.columns.get(name) for example in repeated] for name in names}
    return {**columns, "prompts": [example.prompt for example in repeated]}


def _totals(rewards: Tensor, owner: Tensor, lengths: Tensor) -> Tensor:
    return rewards.new_zeros(lengths.numel()).index_add_(0, owner, rewards)


def _mean(values: Tensor) -> float:
    """The mean of the finite values; NaN where there are none."""
    return float(values[values.isfinite()].double().mean())


def _distinct_names(functions: Sequence[RewardFunction]) -> list[str]:
    names = [getattr(f, "__name__", type(f).__name__) for f in functions]
    return [
        name if names.count(name) == 1 else f"{name}_{names[: index + 1].count(name)}"
        for index, name in enumerate(names)
    ]
