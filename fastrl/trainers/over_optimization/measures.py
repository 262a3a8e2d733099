"""What the policy as it is now does on held-out prompts, without touching the run."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastrl.layout import PackedBatch
from fastrl.rollout import Rollout
from fastrl.trainers.evaluation import Drawn, draw, score
from fastrl.trainers.micro_batches import micro_batches
from fastrl.trainers.prompts import PromptDataset
from fastrl.trainers.scoring import RewardScorer, Scores
from fastrl.trainers.tokens import autocast, most_at_once

if TYPE_CHECKING:
    from fastrl.trainers.trainer import Trainer

_LOGITS = 1 << 24  # of each of the two models at a time


@dataclass(frozen=True)
class Measures:
    """One evaluation on n prompts.

    Attributes:
        gold, proxy: [n] float64, the means over a prompt's usable completions; NaN without one.
        numbers: by the names of the record; NaN where a figure does not exist.
    """

    gold: Tensor
    proxy: Tensor
    numbers: dict[str, float]


def measure(
    trainer: "Trainer",
    prompts: PromptDataset,
    reference: Any,
    gold: RewardScorer,
    proxy: RewardScorer | None,
    disagreement: RewardScorer | None,
    *,
    proxy_weights: Sequence[float],
    completions_per_prompt: int,
    seed: int,
) -> Measures:
    """Sample completions of each prompt at the config's temperature, and score them.

    Args:
        reference: whose divergence "kl" is.
        proxy: None: the trainer's own.
        proxy_weights: of the trainer's reward functions, whatever theirs are at the moment.
        seed: decides everything that is drawn.
    """
    temperature = trainer.config.temperature
    drawn = draw(trainer, prompts, None, completions_per_prompt, temperature, seed)
    if proxy is not None:
        proxies = score(trainer, proxy, drawn, seed)
    else:
        with weighing(trainer.scorer, proxy_weights):
            proxies = score(trainer, trainer.scorer, drawn, seed)
    golds = score(trainer, gold, drawn, seed)
    gold_means, proxy_means = (_by_prompt(scores, len(prompts)) for scores in (golds, proxies))
    numbers = _mean("gold/gold", gold_means) | _mean("gold/proxy", proxy_means)
    if len(gold.names) > 1:
        numbers |= {f"gold/gold/{n}": golds.metrics[f"rewards/{n}/mean"] for n in gold.names}
    numbers |= _of_the_policy(trainer, reference, drawn, len(prompts))
    if disagreement is not None:
        found = score(trainer, disagreement, drawn, seed)
        numbers |= _mean("gold/disagreement", _by_prompt(found, len(prompts)))
    return Measures(gold_means, proxy_means, numbers)


@contextmanager
def weighing(scorer: RewardScorer, weights: Sequence[float]) -> Iterator[None]:
    """The scorer with other weights for a while."""
    own, scorer.weights = scorer.weights, list(weights)
    try:
        yield
    finally:
        scorer.weights = own


def distinct_2(rollout: Rollout) -> float:
    """Different pairs of neighbouring tokens over all such pairs, in all completions together.

    Of pairs that the policy wrote: what an environment answers is not its own variety.
    """
    together = torch.cat(
        [
            torch.stack([ids[:-1], ids[1:]], 1)[own[:-1] & own[1:]]
            for ids, own in zip(rollout.completion_ids, rollout.is_target, strict=True)
        ]
    )
    return len(together.unique(dim=0)) / len(together) if len(together) else math.nan


@torch.no_grad()
def divergence(trainer: "Trainer", reference: Any, batch: PackedBatch) -> Tensor:
    """[M], nats: KL(policy | reference) of the next token at each target, over the vocabulary.

    Summed over a completion its mean is the divergence of completions, as that of the log-ratios
    of the tokens that were drawn is; but it is never below 0, and no rare token outweighs the rest.
    Logits are float32 as in the update, of 16-bit weights too.
    """
    config, device = trainer.config, batch.token_ids.device
    policies = trainer.policy, reference
    result = torch.empty(len(batch.target_ids), dtype=torch.float64, device=device)
    at_once = max(1, min(len(result), _LOGITS // trainer.policy.vocab_size))
    logits_of = [policy.head.for_sampling(at_once) for policy in policies]
    for micro, targets in micro_batches(batch, config.micro_batch_tokens or most_at_once(batch)):
        with autocast(device, config.precision):
            hidden = [policy.packed_hidden(micro) for policy in policies]
        for rows in torch.arange(len(targets), device=device).split(at_once):
            ours, theirs = (
                logits(states[rows]).div(config.temperature).log_softmax(-1)
                for logits, states in zip(logits_of, hidden, strict=True)
            )
            gain = (ours.exp() * (ours - theirs)).masked_fill(ours == -torch.inf, 0)
            # Rounding can take a sum of 0 below it.
            result[targets[rows]] = gain.sum(-1, dtype=torch.float64).clamp(min=0)
    return result


def _of_the_policy(
    trainer: "Trainer", reference: Any, drawn: Drawn, num_prompts: int
) -> dict[str, float]:
    lengths = drawn.rollout.lengths
    (of_tokens,) = trainer.processes.computed(
        drawn.rollout.batch, lambda part: (divergence(trainer, reference, part),), 1
    )
    kl = torch.segment_reduce(of_tokens, "sum", lengths=lengths, initial=0)
    return {
        **_mean("gold/kl", kl.view(num_prompts, -1).mean(1).cpu()),
        "gold/entropy": float(drawn.entropy.double().mean()),
        "gold/distinct_2": distinct_2(drawn.rollout),
        "gold/length": float(lengths.double().mean()),
    }


def _by_prompt(scores: Scores, num_prompts: int) -> Tensor:
    totals = scores.totals.double().where(scores.is_used, torch.nan)
    return totals.view(num_prompts, -1).nanmean(1)


def _mean(name: str, by_prompt: Tensor) -> dict[str, float]:
    """Over the prompts that have a value, and its standard error."""
    known = by_prompt[by_prompt.isfinite()]
    mean = float(known.mean()) if len(known) else math.nan
    error = float(known.std()) / math.sqrt(len(known)) if len(known) > 1 else math.nan
    return {name: mean, f"{name}_stderr": error}
