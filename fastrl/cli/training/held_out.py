"""What a model is worth on held-out text, and whether it got better."""

import math
import re
from collections.abc import Sequence
from typing import Any

from fastrl.cli.training.perplexity import perplexity
from fastrl.cli.training.text_data import TextData
from fastrl.rewards import ContinuationReward
from fastrl.trainers.trainer import Trainer

EVALUATION_SEED = 12345  # the same for every model, so that differences are paired


def evaluate(
    trainer: Trainer, data: TextData, reward: ContinuationReward, completions_per_prompt: int
) -> dict[str, Any]:
    """Evaluate a trainer's model on the held-out text; JSON types only.

    Every model is given the same prompts and the same random numbers to sample with. "overlap" is
    the part of the reward that the penalties are taken off.
    """
    result = trainer.evaluate(
        data.held_out_prompts, completions_per_prompt=completions_per_prompt, seed=EVALUATION_SEED
    )
    texts = [text for group in result["completions"] for text in group]
    return {
        "reward": result["reward"],
        "overlap": _mean_overlap(data, reward, result["completion_ids"]),
        "prompt_rewards": result["prompt_rewards"],
        "perplexity": perplexity(trainer.policy, data.held_out, trainer.ops),
        "entropy": result["entropy"],
        "kl": result["kl"],
        "distinct_1": distinct_n(texts, 1),
        "distinct_2": distinct_n(texts, 2),
        "completion_length": result["completions/mean_length"],
        "samples": [group[0] for group in result["completions"]],
    }


def _mean_overlap(
    data: TextData, reward: ContinuationReward, completion_ids: list[list[list[int]]]
) -> float:
    overlaps = [
        reward.overlap(prompt["prompt"].tolist(), ids, prompt["reference"])
        for prompt, group in zip(data.held_out_prompts, completion_ids, strict=True)
        for ids in group
    ]
    return math.fsum(overlaps) / len(overlaps)


def distinct_n(texts: Sequence[str], n: int) -> float:
    """Different runs of n words over all runs of n words, in all texts together; 0 without any."""
    runs: list[tuple[str, ...]] = []
    for text in texts:
        words = re.findall(r"\w+", text.casefold())
        runs.extend(tuple(words[i : i + n]) for i in range(len(words) - n + 1))
    return len(set(runs)) / len(runs) if runs else 0.0
