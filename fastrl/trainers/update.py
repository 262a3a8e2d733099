"""The update: epochs, minibatches and micro-batches over one experience, and what it reports."""

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fastrl.rollout import completion_seeds
from fastrl.trainers.experience import Experience, completions_with, scores
from fastrl.trainers.losses import Passed, clip_counts, micro_loss, token_weights
from fastrl.trainers.micro_batches import micro_batches
from fastrl.trainers.tokens import to_numbers, token_mean

if TYPE_CHECKING:
    from fastrl.trainers.trainer import Trainer

_MINIBATCHES = 3  # a stream of random numbers apart from the others


@dataclass
class Seen:
    """What the passes of one update have computed of the M tokens, for the metrics.

    Attributes:
        logprobs, entropy: [M], as each token was seen first; NaN where it was not.
        values: [M], likewise; NaN without a critic.
        is_first: [M] bool, seen before the first gradient step.
        clipped: how many tokens' ratios left their bounds: below, above; and of how many.
    """

    logprobs: Tensor
    entropy: Tensor
    values: Tensor
    is_first: Tensor
    clipped: Tensor

    @classmethod
    def nothing(cls, like: Tensor) -> "Seen":
        nan = torch.full_like(like, torch.nan)
        return cls(nan, nan.clone(), nan.clone(), nan > 0, like.new_zeros(3, dtype=torch.float64))

    def add(self, at: Tensor, passed: Passed, *, is_first: bool) -> None:
        """What a pass over the tokens `at` computed."""
        fresh = self.logprobs[at].isnan()
        new = at[fresh]
        self.logprobs[new], self.entropy[new] = passed.logprobs[fresh], passed.entropy[fresh]
        if passed.values is not None:
            self.values[new] = passed.values[fresh]
        self.is_first[new] = is_first


def learn(trainer: "Trainer", experience: Experience) -> tuple[dict[str, float], str | None]:
    """Gradient steps on an experience.

    Returns:
        numbers: "loss" and "grad_norm" (means over the gradient steps), "entropy", "logprob_gap",
            "clip_ratio/..." and the algorithm's own.
        problem: why an update was skipped, if one was; no further one is made then.
    """
    config = trainer.config
    seen = Seen.nothing(experience.old_logprobs)
    losses: list[float] = []
    norms: list[float] = []
    usable = bool(experience.rollout.loss_mask.any())
    problem = None if usable else "no completion with a usable reward"
    for epoch in range(config.epochs):
        for completions in _minibatches(trainer, experience, epoch):
            if problem is not None:
                break
            # What taught nothing has changed nothing: the first step is the first that saw tokens.
            is_first = bool(seen.logprobs.isnan().all())
            loss, norm, problem = _gradient_step(
                trainer, experience, completions, seen, is_first=is_first
            )
            losses.append(loss)
            norms.append(norm)
    if not bool(seen.is_first.any()):
        _look(trainer, experience, seen)
    numbers = {"loss": _mean(losses), "grad_norm": _mean(norms)}
    return numbers | _metrics(trainer, experience, seen), problem


def _minibatches(trainer: "Trainer", experience: Experience, epoch: int) -> list[Tensor]:
    """[C] bool each: the completions of some of the prompts, all of them in all together."""
    count, groups = trainer.config.minibatches, experience.rollout.group_ids
    if count == 1:
        return [torch.ones_like(groups, dtype=torch.bool)]
    names = groups.unique()
    key = torch.tensor([trainer.step * trainer.config.epochs + epoch])
    seed = int(completion_seeds(trainer.config.seed, _MINIBATCHES, key, 1))
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed))
    parts = names[order.to(names.device)].tensor_split(count)
    return [torch.isin(groups, part) for part in parts if len(part)]


def _gradient_step(
    trainer: "Trainer",
    whole: Experience,
    completions: Tensor,
    seen: Seen,
    *,
    is_first: bool,
) -> tuple[float, float, str | None]:
    """One step of the optimizer; the loss, the gradient's norm, and why it was skipped."""
    config = trainer.config
    in_batch = completions.repeat_interleave(whole.rollout.lengths)
    counted = whole.is_learned & in_batch
    if not bool(counted.any()):
        return 0.0, 0.0, None  # all of them truncated, or without another to compare with
    weighted = replace(whole, token_weights=token_weights(trainer, whole, counted))
    # What has no gradient is not computed: its weight in the denominators is in token_weights.
    active = completions_with(whole.rollout, counted & trainer.teaches(whole))
    trainer.optimizer.zero_grad()
    total = whole.old_logprobs.new_zeros((), dtype=torch.float64)
    if bool(active.any()):
        part, of_part = weighted.take(active) if not bool(active.all()) else (weighted, None)
        trainer.set_learning(True)
        try:
            for micro, at in micro_batches(part.rollout.batch, config.micro_batch_tokens):
                known = part.at(at)
                passed = micro_loss(trainer, micro, known)
                passed.loss.backward()
                total += passed.loss.detach()
                seen.add(at if of_part is None else of_part[at], passed, is_first=is_first)
                bounds = micro.completion_cu_seqlens
                seen.clipped += clip_counts(trainer, passed.logprobs, known, bounds)
        finally:
            trainer.set_learning(False)
    limit = math.inf if config.max_grad_norm is None else config.max_grad_norm
    norm = nn.utils.clip_grad_norm_(trainer.parameters, limit)
    loss_number, norm_number = torch.stack([total, norm.to(total)]).tolist()
    problem = None
    if not (math.isfinite(loss_number) and math.isfinite(norm_number)):
        problem = f"loss {loss_number:g} with gradient norm {norm_number:g}"
    else:
        trainer.optimizer.step()
    trainer.optimizer.zero_grad()
    return loss_number, norm_number, problem


def _look(trainer: "Trainer", experience: Experience, seen: Seen) -> None:
    """Where all was skipped, at one prompt's completions: each step tells its gap and entropy."""
    rollout = experience.rollout
    if not len(rollout.logprobs):
        return
    part = rollout.take(rollout.group_ids == rollout.group_ids[0])
    at = part.batch.source_targets  # type: ignore[attr-defined]
    seen.logprobs[at], seen.entropy[at] = scores(trainer, trainer.policy, part)
    seen.is_first[at] = True


def _metrics(trainer: "Trainer", experience: Experience, seen: Seen) -> dict[str, float]:
    """Means over the tokens that count, as they were seen first."""
    known = ~seen.logprobs.isnan()
    if bool((known & experience.is_learned).any()):
        known &= experience.is_learned
    first = known & seen.is_first
    if experience.is_fresh is not None:
        first &= experience.is_fresh
    gap = (seen.logprobs - experience.rollout.logprobs).abs()[first]
    metrics = {
        "entropy": token_mean(seen.entropy, known),
        "logprob_gap": gap.max() if len(gap) else gap.new_tensor(math.nan),
    }
    low, high, count = seen.clipped
    if trainer.has_bounds:
        for name, number in (("low", low), ("high", high), ("region", low + high)):
            metrics[f"clip_ratio/{name}_mean"] = number / count.clamp(min=1)
    if experience.returns is not None:
        metrics |= _critic_metrics(experience.returns, seen.values, known)
    return to_numbers(metrics)


def _critic_metrics(returns: Tensor, values: Tensor, known: Tensor) -> dict[str, Tensor]:
    error = returns - values
    mean = token_mean(returns, known)
    spread = token_mean((returns - mean).square(), known)
    left = token_mean((error - token_mean(error, known)).square(), known)
    return {
        "value": token_mean(values, known),
        "value_error": token_mean(error.square(), known),
        # Of the returns' variance; below 0 the critic is worse than their mean.
        "explained_variance": 1 - left / spread,
    }


def _mean(numbers: list[float]) -> float:
    return sum(numbers) / len(numbers) if numbers else 0.0
