"""Reward functions: called in TRL's way, checked, and summed into one reward per token."""

import math
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastrl.rewards._calling import (
    Call,
    Caller,
    accepted,
    distinct_names,
    own_arguments,
    parameters_of,
)
from fastrl.rewards._states import load_states, stateful, states
from fastrl.rollout import Rollout
from fastrl.trainers._given_rewards import CompletionTokens
from fastrl.trainers._reward_arguments import RewardLog, reward_arguments
from fastrl.trainers.prompts import Example, PromptDataset

RewardFunction = Callable[..., Any]


class RewardFunctionError(RuntimeError):
    """A reward function raised; the cause stands in `__cause__`."""


@dataclass(frozen=True)
class Scores:
    """Rewards of one rollout, on the CPU.

    Attributes:
        rewards: [M] float32, following each target; 0 where a completion is not used.
        totals: [C] float32, each completion's sum over its targets.
        is_used: [C] bool, False where a completion is not learned from.
        metrics: means and standard deviations over the completions, and counts, by name.
        columns: for tables of samples, C entries each: by a function's name what it gave each
            completion in all, None where it had no opinion; and what functions sent to log_extra.
    """

    rewards: Tensor
    totals: Tensor
    is_used: Tensor
    metrics: dict[str, float]
    columns: dict[str, list[Any]]


class RewardScorer:
    """The weighted sum of reward functions.

    A function is called as TRL calls it, f(prompts=..., completions=..., completion_ids=...,
    **columns), each a list with one entry per completion. Prompts are as they stand in the
    dataset; completions are texts, or [{"role": "assistant", "content": text}] where the prompt
    is chat messages, or ids where there is no tokenizer. Further arguments: is_target, for each
    completion a list of bools, one per id: False where the policy did not write it;
    log_metric(name, number), log_extra(column, list), and trainer_state if the caller has one; a
    trainer's has global_step, max_steps and epoch as TRL's, and is_evaluation: True in
    `Trainer.evaluate`, but for that of `fastrl eval`. A function without **kwargs gets those
    arguments that it names, and each lists and dicts of its own. It gives a list with one entry
    per completion:

    - a float: the reward of the whole completion, which stands at its last target;
    - a list of floats, one per completion id, EOS and tokens that the policy did not write
      included: an immediate reward for each token. Those of tokens that are no targets are
      dropped, whatever they are: put a tool's reward where the policy called it;
    - None: this function has no opinion on the completion, and adds nothing.

    A completion on which no function has an opinion, or whose reward is NaN or infinite, is not
    learned from; nor is one for which a function took too long or, with errors="mask", raised.
    Each kind is counted: "rewards/none", "rewards/bad", "rewards/timeouts", "rewards/errors".

    Async functions run beside each other in one event loop in a thread of its own. With a
    timeout, the others run in a thread too, one after the other; without one, in the caller's.

    Args:
        reward_functions: one function or a list of them.
        weights: a factor for each; None: 1 each.
        timeout: seconds that a function may take; None: any time. One that takes longer goes on
            in its thread, and is not called again before it is done.
        errors: what a function's exception does: "raise" it, or "mask" the completions.
    Raises:
        ValueError: no functions; as many weights as functions are not given; a timeout that is
            not above 0.
        TypeError: a function cannot be called, or is a model.
    """

    def __init__(
        self,
        reward_functions: RewardFunction | Sequence[RewardFunction],
        weights: Sequence[float] | None = None,
        *,
        timeout: float | None = None,
        errors: str = "raise",
    ) -> None:
        if callable(reward_functions) or isinstance(reward_functions, str):
            reward_functions = [reward_functions]  # type: ignore[list-item]
        self.functions = list(reward_functions)
        _check(self.functions, weights, timeout, errors)
        self.weights = [1.0] * len(self.functions) if weights is None else list(weights)
        self.timeout, self.errors = timeout, errors
        self.names = distinct_names(self.functions)
        self._parameters = [parameters_of(function) for function in self.functions]
        self._caller = Caller(self.functions, timeout)

    def __call__(
        self,
        examples: list[Example],
        rollout: Rollout,
        dataset: PromptDataset,
        eos_token_id: int | Sequence[int] | None,
        *,
        trainer_state: Any = None,
    ) -> Scores:
        """Score a rollout whose prompts are those of `examples`, as its group_ids count them.

        Args:
            trainer_state: handed to the functions, in TRL an object with global_step, max_steps
                and more; None: it is not passed.
        Raises:
            ValueError: a function's list, or an entry of it, is of the wrong length.
            TypeError: an entry is neither a number, nor a list of numbers, nor None.
            RewardFunctionError: a function raised, with errors="raise".
        """
        tokens, log = CompletionTokens(rollout), RewardLog()
        arguments = reward_arguments(examples, rollout, tokens.ids, dataset, eos_token_id)
        arguments |= {"log_metric": log.metric, "log_extra": log.extra}
        arguments["is_target"] = tokens.is_target
        if trainer_state is not None:
            arguments["trainer_state"] = trainer_state
        own = [own_arguments(accepted(arguments, names)) for names in self._parameters]
        calls = self._caller(own)
        return self._scores(calls, tokens, log)

    def state_dict(self) -> dict[str, Any]:
        """By name, the states of the functions that have state_dict and load_state_dict."""
        return states(self._by_name())

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Give the functions the states that `state_dict` had.

        Raises:
            ValueError: the functions with a state are others.
        """
        functions = stateful(self._by_name())
        if state.keys() != functions.keys():
            raise ValueError(
                f"Trainer: expected states of the reward functions {sorted(functions)}, got "
                f"{sorted(state)}. Pass the reward functions that the checkpoint was made with."
            )
        load_states(functions, state)

    def _by_name(self) -> dict[str, RewardFunction]:
        return dict(zip(self.names, self.functions, strict=True))

    def _scores(self, calls: list[Call], tokens: CompletionTokens, log: RewardLog) -> Scores:
        rewards = torch.zeros(int(tokens.lengths.sum()), dtype=torch.float64)
        totals = torch.zeros(len(tokens), dtype=torch.float64)
        has_opinion = torch.zeros(len(tokens), dtype=torch.bool)
        metrics, columns, num_failed = log.metrics(), log.columns(len(tokens)), Counter[str]()
        for call, name, weight in zip(calls, self.names, self.weights, strict=True):
            failure = self._failure(call, name, len(tokens))
            if failure is not None:
                num_failed[failure] = len(tokens)
            result = call.result if failure is None else [math.nan] * len(tokens)
            given = tokens.given(result, name)
            rewards += weight * given.rewards
            totals += weight * given.sums
            has_opinion |= given.has_opinion
            mean, std = _mean_and_std(given.sums[given.has_opinion])
            metrics |= {f"rewards/{name}/mean": mean, f"rewards/{name}/std": std}
            opinions = zip(given.sums.tolist(), given.has_opinion.tolist(), strict=True)
            columns[name] = [total if is_one else None for total, is_one in opinions]

        rewards, totals = rewards.float(), totals.float()
        owner = torch.arange(len(tokens)).repeat_interleave(tokens.lengths)
        # Of magnitudes: then every discounted partial sum is finite as well.
        magnitudes = torch.zeros(len(tokens)).index_add_(0, owner, rewards.abs())
        is_finite = magnitudes.isfinite() & totals.isfinite()
        is_used = has_opinion & is_finite
        metrics["reward"], metrics["reward_std"] = _mean_and_std(totals[is_used])
        metrics["rewards/bad"] = 0 if num_failed else int((~is_finite).sum())
        metrics["rewards/none"] = int((~has_opinion).sum())
        metrics["rewards/timeouts"] = num_failed["timeout"]
        metrics["rewards/errors"] = num_failed["error"]
        rewards = rewards.masked_fill(~is_used[owner], 0.0)
        return Scores(rewards, totals, is_used, metrics, columns)

    def _failure(self, call: Call, name: str, count: int) -> str | None:
        """Why there is no result, with a warning: "timeout", "error"; None if there is one."""
        masked = f"{count} completions are not learned from in this step."
        if call.is_late:
            done = "were not asked for, as its call of an earlier step still runs"
            late = f"did not come within timeout = {self.timeout} s"
            self._warn(
                f"Trainer: the rewards of function {name} {done if call.was_busy else late}; "
                f"{masked} Make it faster, let it give up by itself, or allow it more time."
            )
            return "timeout"
        if call.error is None:
            return None
        raised = f"Trainer: reward function {name} raised {type(call.error).__name__}: {call.error}"
        if self.errors == "raise":
            raise RewardFunctionError(raised) from call.error
        self._warn(f'{raised}; {masked} Repair it, or set errors="raise" to see where.')
        return "error"

    @staticmethod
    def _warn(message: str) -> None:
        warnings.warn(message, RuntimeWarning, stacklevel=5)  # where the scorer was called


def _check(
    functions: list[Any], weights: Sequence[float] | None, timeout: float | None, errors: str
) -> None:
    wanted = "Pass a function f(prompts, completions, completion_ids, **columns) -> list."
    if not functions:
        raise ValueError(
            "Trainer: expected reward_functions with at least one function, got none. " + wanted
        )
    for function in functions:
        if isinstance(function, str | nn.Module):
            got = repr(function) if isinstance(function, str) else type(function).__name__
            raise TypeError(
                f"Trainer: expected reward_functions to be functions, got {got}. A preference "
                "model becomes one as fastrl.rewards.PreferenceReward(model or folder); wrap any "
                "other in a function that calls it."
            )
        if not callable(function):
            raise TypeError(
                f"Trainer: expected reward_functions to be callable, got {function!r}. {wanted}"
            )
    if weights is not None and len(weights) != len(functions):
        raise ValueError(
            f"Trainer: expected reward_weights for {len(functions)} reward functions, "
            f"got {len(weights)}. Give one weight for each."
        )
    if timeout is not None and not timeout > 0:
        raise ValueError(
            f"Trainer: expected timeout of reward functions above 0 seconds, got {timeout}. "
            "Pass None to wait for any time."
        )
    if errors not in ("raise", "mask"):
        raise ValueError(
            f'Trainer: expected errors of reward functions "raise" or "mask", got {errors!r}. '
            'Pass "mask" to go on without the completions.'
        )


def _mean_and_std(values: Tensor) -> tuple[float, float]:
    """Of the finite values; NaN for the mean of none, and the deviation of fewer than two."""
    values = values[values.isfinite()].double()
    return float(values.mean()), float(values.std()) if len(values) > 1 else math.nan
