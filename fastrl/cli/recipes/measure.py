"""What a model is worth on prompts, for `fastrl eval`."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fastrl.cli.console import say
from fastrl.cli.intervals import mean_interval
from fastrl.trainers import PolicyGradientConfig, PolicyGradientTrainer
from fastrl.trainers.scoring import RewardScorer, Scores


class KeepingScorer(RewardScorer):
    """Remembers what it gave: an evaluation returns means, and intervals and samples need more.

    Attributes:
        measures: the functions are there for an evaluation; so people are asked as well.
    """

    last: Scores
    measures = False

    def __call__(self, *args: Any, trainer_state: Any = None, **kwargs: Any) -> Scores:
        if self.measures:
            trainer_state.is_evaluation = False
        self.last = super().__call__(*args, trainer_state=trainer_state, **kwargs)
        return self.last


def measure(
    policy: Any,
    reward_functions: Sequence[Callable[..., Any]],
    prompts: Any,
    *,
    tokenizer: Any,
    config: PolicyGradientConfig,
    reference: Any = None,
    temperature: float = 1.0,
    seed: int = 0,
) -> dict[str, Any]:
    """Sample from each prompt and score what comes.

    Args:
        policy, reference: on one device; what is measured, and what its KL divergence is from.
        reward_functions, prompts, tokenizer: as for a trainer.
        config: how completions are sampled and rewarded.
        temperature: in place of the config's; 0 takes the likeliest tokens.
    Returns:
        "reward" and "rewards/<function>": {"mean", "half_width", "prompts"}, over prompts, each
        with the mean of its completions, half_width NaN of one prompt; "entropy", and "kl" where
        there is a reference, nats per token; "completions/..." and counts as in training; "ended",
        the share that said EOS; how it was sampled, and "prompt_rewards".
    Raises:
        ValueError, TypeError: an argument does not fit.
    """
    trainer = _evaluator(policy, reward_functions, prompts, config, tokenizer)
    trainer.reference, count = reference, config.completions_per_prompt
    scorer = trainer.scorer
    found = trainer.evaluate(
        prompts, completions_per_prompt=count, temperature=temperature, seed=seed
    )
    intervals = {"reward": _interval(found["prompt_rewards"])}
    for name in scorer.names:
        column = scorer.last.columns[name]
        intervals[f"rewards/{name}"] = _interval(_by_prompt(column, count))
    return {
        **intervals,
        **_plain(found, has_reference=reference is not None),
        "ended": 1.0 - found["completions/clipped_ratio"],
        "num_prompts": len(prompts),
        "completions_per_prompt": count,
        "max_new_tokens": config.max_new_tokens,
        "temperature": temperature,
        "seed": seed,
        "prompt_rewards": found["prompt_rewards"],
    }


def _evaluator(
    policy: Any,
    reward_functions: Sequence[Callable[..., Any]],
    prompts: Any,
    config: PolicyGradientConfig,
    tokenizer: Any,
) -> Any:
    """A trainer that trains nothing; its optimizer holds nothing yet."""
    # The optimizer wants weights, and an adapter that was loaded has none that are trained.
    policy.requires_grad_(True)
    functions = list(reward_functions)
    trainer = PolicyGradientTrainer(
        policy, functions, prompts, replace(config, kl_every=0), tokenizer=tokenizer
    )
    keep_scores(trainer, functions).measures = True
    return trainer


def keep_scores(trainer: Any, functions: Sequence[Callable[..., Any]]) -> KeepingScorer:
    """Give a trainer at its start a scorer that keeps its last scores; returns it."""
    config = trainer.config
    scorer = KeepingScorer(
        functions,
        config.reward_weights,
        timeout=config.reward_timeout,
        errors=config.reward_errors,
    )
    trainer.scorer = scorer
    return scorer


def _plain(found: dict[str, Any], *, has_reference: bool) -> dict[str, float]:
    """The figures of an evaluation that have no interval."""
    return {
        name: value
        for name, value in found.items()
        if isinstance(value, int | float)
        and name not in ("reward", "reward_std")
        and not (name.startswith("rewards/") and name.endswith(("/mean", "/std")))
        and (name != "kl" or has_reference)
    }


def show_measured(console: Console, result: dict[str, Any]) -> None:
    """Print what `measure` gave."""
    say(
        console,
        f"{result['model']}: {result['num_prompts']} prompts, "
        f"{result['completions_per_prompt']} completions each",
    )
    table = Table(box=box.SIMPLE_HEAD, show_header=False)
    table.add_column("figure", no_wrap=True)
    table.add_column("value", justify="right", no_wrap=True)
    hidden = ("num_prompts", "completions_per_prompt", "seed")
    for name, value in result.items():
        if isinstance(value, dict):
            width = "" if math.isnan(value["half_width"]) else f" ± {value['half_width']:.4f}"
            table.add_row(Text(name), f"{value['mean']:.4f}{width}")
        elif isinstance(value, int | float) and name not in hidden:
            table.add_row(Text(name), f"{value:,.4g}")
    console.print(table)
    say(
        console,
        "± is a 95 % interval over prompts: 1.96 standard errors. Entropy and KL are per token.",
    )


def _interval(prompt_means: Sequence[float | None]) -> dict[str, float]:
    """Of the prompts that have one; NaN where none has."""
    finite = [mean for mean in prompt_means if mean is not None and math.isfinite(mean)]
    mean, half_width = mean_interval(finite)
    return {"mean": mean, "half_width": half_width, "prompts": len(finite)}


def _by_prompt(values: Sequence[float | None], count: int) -> list[float | None]:
    """The mean of each prompt's completions that have a value; None where none has."""
    means: list[float | None] = []
    for start in range(0, len(values), count):
        own = [v for v in values[start : start + count] if v is not None and math.isfinite(v)]
        means.append(math.fsum(own) / len(own) if own else None)
    return means
