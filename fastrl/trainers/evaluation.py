"""Scoring a model on prompts, without learning and without touching the run."""

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastrl.rollout import Rollout, completion_seeds
from fastrl.trainers._random_state import keeping_random_state, seed_generators
from fastrl.trainers.metrics import rollout_metrics
from fastrl.trainers.prompts import Example, PromptDataset
from fastrl.trainers.sampling import EVALUATION, sample
from fastrl.trainers.scoring import RewardScorer, Scores
from fastrl.trainers.tokens import token_scores

if TYPE_CHECKING:
    from fastrl.trainers.trainer import Trainer


@dataclass(frozen=True)
class Drawn:
    """Completions of a dataset's prompts: C of them, M tokens.

    Attributes:
        prompts: the dataset.
        examples: its entries.
        rollout: without rewards.
        logprobs, entropy: [M], nats.
        ref_logprobs: [M], under the reference; NaN without one.
    """

    prompts: PromptDataset
    examples: list[Example]
    rollout: Rollout
    logprobs: Tensor
    entropy: Tensor
    ref_logprobs: Tensor


def evaluate(
    trainer: "Trainer",
    dataset: Any,
    *,
    completions_per_prompt: int,
    temperature: float,
    seed: int,
) -> dict[str, Any]:
    """See `Trainer.evaluate`."""
    prompts = trainer.prompts(dataset)
    trainer.processes.check_dataset(prompts)
    drawn = draw(trainer, prompts, trainer.reference, completions_per_prompt, temperature, seed)
    scores = score(trainer, trainer.scorer, drawn, seed, is_evaluation=True)
    kl = trainer.ops.kl_penalty(drawn.logprobs, drawn.ref_logprobs, estimator="k3")
    rollout = drawn.rollout
    totals = scores.totals.where(scores.is_used, torch.nan).view(len(drawn.examples), -1)
    ids = [completion.tolist() for completion in rollout.completion_ids]
    texts = [prompts.decode(completion, trainer.eos_token_ids) for completion in ids]
    return {
        **scores.metrics,
        **rollout_metrics(rollout),
        "entropy": float(drawn.entropy.mean()),
        "kl": float(kl.mean()),
        "prompt_rewards": totals.nanmean(1).tolist(),
        "completions": _by_prompt(texts, completions_per_prompt),
        "completion_ids": _by_prompt(ids, completions_per_prompt),
    }


@torch.no_grad()
def draw(
    trainer: "Trainer",
    prompts: PromptDataset,
    reference: Any,
    completions_per_prompt: int,
    temperature: float,
    seed: int,
) -> Drawn:
    """Sample from the policy as it is; the seed alone decides what is drawn."""
    config = trainer.config
    examples = trainer.processes.examples(prompts, list(range(len(prompts))))
    rows = config.prompts_per_step * config.completions_per_prompt  # as many as in training
    rollout = sample(
        trainer,
        examples,
        completion_seeds(seed, EVALUATION, torch.arange(len(examples)), completions_per_prompt),
        completions_per_prompt=completions_per_prompt,
        temperature=temperature,
        max_rows=config.max_rows or rows,
    )
    # Greedy tokens have the log-probabilities of temperature 1, as in sample_tokens.
    scoring: dict[str, Any] = {
        "temperature": temperature if temperature > 0 else 1.0,
        "ops": trainer.ops,
        "precision": config.precision,
        "max_tokens": config.micro_batch_tokens,
        "processes": trainer.processes,
    }
    logprobs, entropy = token_scores(trainer.policy, rollout.batch, **scoring)
    ref_logprobs = torch.full_like(logprobs, torch.nan)
    if reference is not None:
        ref_logprobs, _ = token_scores(reference, rollout.batch, **scoring)
    return Drawn(prompts, examples, rollout, logprobs, entropy, ref_logprobs)


@torch.no_grad()
def score(
    trainer: "Trainer",
    scorer: RewardScorer,
    drawn: Drawn,
    seed: int,
    *,
    is_evaluation: bool = False,
) -> Scores:
    """Score what was drawn, and leave the scorer and all random numbers as they were.

    A reward function may draw random numbers, and remember: ours to seed, the run's to keep.

    Args:
        is_evaluation: what functions are told: True of `Trainer.evaluate`, False of a monitor,
            whose own functions are for nothing else.
    """
    remembered = copy.deepcopy(scorer.state_dict())
    try:  # also where a signal ends it: what is saved then is the run's
        with keeping_random_state():
            seed_generators(seed)
            return trainer.scored(
                drawn.examples, drawn.rollout, drawn.prompts, scorer, is_evaluation=is_evaluation
            )
    finally:
        scorer.load_state_dict(remembered)


def _by_prompt(entries: list[Any], count: int) -> list[list[Any]]:
    return [entries[start : start + count] for start in range(0, len(entries), count)]
