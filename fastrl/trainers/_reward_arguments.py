"""What reward functions are called with, as TRL calls them, and what they log on the way."""

from collections.abc import Sequence
from typing import Any

from fastrl.rollout import Rollout
from fastrl.trainers.prompts import Example, PromptDataset

GIVEN = {"prompts", "completions", "completion_ids", "is_target"}
GIVEN |= {"trainer_state", "log_metric", "log_extra"}


class RewardLog:
    """What the functions of one step log; a function that is late logs into its old step's."""

    def __init__(self) -> None:
        self._numbers: dict[str, list[float]] = {}
        self._values: dict[str, list[Any]] = {}

    def metric(self, name: str, value: float) -> None:
        """TRL's log_metric: a number under a name; the mean of those of one step is reported."""
        self._numbers.setdefault(name, []).append(float(value))

    def extra(self, column: str, values: Sequence[Any]) -> None:
        """TRL's log_extra: a further column of the table of samples."""
        self._values.setdefault(column, []).extend(values)

    def metrics(self) -> dict[str, float]:
        """The means, by name."""
        return {name: sum(values) / len(values) for name, values in list(self._numbers.items())}

    def columns(self, count: int) -> dict[str, list[Any]]:
        """The columns, each of `count` entries.

        Raises:
            ValueError: a column of another length.
        """
        for column, values in list(self._values.items()):
            if len(values) != count:
                raise ValueError(
                    f"Trainer: expected log_extra({column!r}, ...) with {count} values, one for "
                    f"each completion, got {len(values)}. Pass None where there is nothing."
                )
        return {column: list(values) for column, values in list(self._values.items())}


def check_columns(examples: list[Example]) -> dict[str, None]:
    """The names of their columns; ValueError where one has the name of another argument."""
    names = dict.fromkeys(name for example in examples for name in example.columns)
    taken = sorted(GIVEN & names.keys())
    if taken:
        raise ValueError(
            f"Trainer: expected dataset with columns of names other than {sorted(GIVEN)}, got "
            f"{taken}. Reward functions get something else under them: rename the columns."
        )
    return names


def reward_arguments(
    examples: list[Example],
    rollout: Rollout,
    completion_ids: list[list[int]],
    dataset: PromptDataset,
    eos_token_id: int | Sequence[int] | None,
) -> dict[str, Any]:
    """Prompts, completions and columns, one entry for each completion.

    Raises:
        ValueError: a column has the name of another argument.
    """
    names = check_columns(examples)
    of_completions = [examples[group] for group in rollout.group_ids.tolist()]
    arguments: dict[str, Any] = {
        name: [example.columns.get(name) for example in of_completions] for name in names
    }
    contents = [dataset.decode(ids, eos_token_id) for ids in completion_ids]
    arguments["prompts"] = [example.prompt for example in of_completions]
    arguments["completions"] = [
        [{"role": "assistant", "content": content}] if example.is_chat else content
        for example, content in zip(of_completions, contents, strict=True)
    ]
    arguments["completion_ids"] = completion_ids
    return arguments
