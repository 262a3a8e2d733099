"""Scoring a model on prompts, without learning and without touching the run."""

import copy
from typing import TYPE_CHECKING, Any

import torch

from fastrl.rollout import completion_seeds
from fastrl.trainers._random_state import keeping_random_state, seed_generators
from fastrl.trainers.metrics import rollout_metrics
from fastrl.trainers.sampling import EVALUATION, sample
from fastrl.trainers.tokens import token_scores

if TYPE_CHECKING:
    from fastrl.trainers.trainer import Trainer


@torch.no_grad()
def evaluate(
    trainer: "Trainer",
    dataset: Any,
    *,
    completions_per_prompt: int,
    temperature: float,
    seed: int,
) -> dict[str, Any]:
    """See `Trainer.evaluate`."""
    config = trainer.config
    prompts = trainer.prompts(dataset)
    examples = [prompts[index] for index in range(len(prompts))]
    rows = config.prompts_per_step * config.completions_per_prompt  # as many as in training
    rollout = sample(
        trainer,
        [example.token_ids.to(trainer.device) for example in examples],
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
    }
    logprobs, entropy = token_scores(trainer.policy, rollout.batch, **scoring)
    kl = torch.full_like(entropy, torch.nan)
    if trainer.reference is not None:
        reference, _ = token_scores(trainer.reference, rollout.batch, **scoring)
        kl = trainer.ops.kl_penalty(logprobs, reference, estimator="k3")
    # A reward function may draw random numbers, and remember: ours to seed, the run's to keep.
    remembered = copy.deepcopy(trainer.scorer.state_dict())
    try:  # also where a signal ends it: what is saved then is the run's
        with keeping_random_state():
            seed_generators(seed)
            scores = trainer.scored(examples, rollout, prompts)
    finally:
        trainer.scorer.load_state_dict(remembered)

    totals = scores.totals.where(scores.is_used, torch.nan).view(len(examples), -1)
    ids = [completion.tolist() for completion in rollout.completion_ids]
    texts = [prompts.decode(completion, trainer.eos_token_ids) for completion in ids]
    return {
        **scores.metrics,
        **rollout_metrics(rollout),
        "entropy": float(entropy.mean()),
        "kl": float(kl.mean()),
        "prompt_rewards": totals.nanmean(1).tolist(),
        "completions": _by_prompt(texts, completions_per_prompt),
        "completion_ids": _by_prompt(ids, completions_per_prompt),
    }


def _by_prompt(entries: list[Any], count: int) -> list[list[Any]]:
    return [entries[start : start + count] for start in range(0, len(entries), count)]
