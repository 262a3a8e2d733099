"""What a monitor can be built with."""

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

from fastrl.trainers.over_optimization.sequential_test import fewest_prompts
from fastrl.trainers.scoring import RewardFunction, RewardScorer

if TYPE_CHECKING:
    from fastrl.trainers.prompts import PromptDataset
    from fastrl.trainers.trainer import Trainer

ACTIONS = ("warn", "lower", "stop")


def check_arguments(
    trainer: "Trainer",
    every: int,
    completions_per_prompt: int,
    alpha: float,
    action: str,
    kl_budget: float | None,
    kl_start: float,
) -> None:
    """Raise a ValueError where one is out of its range, or "lower" has no reference."""
    for name, value in (("every", every), ("completions_per_prompt", completions_per_prompt)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise wrong(f"{name} a whole number >= 1", value, "Leave it out for the default.")
    if not 0 < alpha < 1:
        raise wrong("alpha in (0, 1)", alpha, "It is the chance of a false alarm.")
    if action not in ACTIONS:
        raise wrong(f"action one of {', '.join(map(repr, ACTIONS))}", repr(action), "Choose one.")
    if kl_budget is not None and not kl_budget > 0:
        raise wrong("kl_budget above 0 nats", kl_budget, "Pass None for no budget.")
    if not kl_start > 0:
        raise wrong("kl_start above 0", kl_start, "Leave it out for the default.")
    if action == "lower" and trainer.reference is None:
        expected = 'a trainer with a reference for action "lower"'
        raise wrong(expected, "none", "Set kl_every or kl_coef in its config.")


def check_prompts(number: int, planned: int, alpha: float) -> None:
    """Raise a ValueError where no alarm would be possible."""
    least = fewest_prompts(planned, alpha)
    if number < least:
        raise wrong(
            f"at least {least} held-out prompts for alpha = {alpha:g} over {planned} evaluations",
            number,
            "With fewer no alarm is possible: add prompts, or evaluate less often.",
        )


def digest(prompts: "PromptDataset") -> str:
    """Of the prompts' tokens, in their order: evaluations are compared prompt by prompt."""
    found = hashlib.sha256()
    for index in range(len(prompts)):
        found.update(f"{prompts[index].token_ids.tolist()}\n".encode())
    return found.hexdigest()


def scorer_of(
    trainer: "Trainer", functions: RewardFunction | Sequence[RewardFunction]
) -> RewardScorer:
    """Of reward functions, as patient as the trainer's."""
    config = trainer.config
    return RewardScorer(functions, timeout=config.reward_timeout, errors=config.reward_errors)


def wrong(expected: str, got: object, remedy: str) -> ValueError:
    return ValueError(f"OverOptimizationMonitor: expected {expected}, got {got}. {remedy}")
