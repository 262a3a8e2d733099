"""The update: epochs, minibatches and micro-batches over one experience, and what it reports."""

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fastrl._transfer import on_device
from fastrl.rollout import completion_seeds
from fastrl.trainers.experience import Experience, completions_with, scores
from fastrl.trainers.losses import Passed, clip_counts, micro_loss, token_weights
from fastrl.trainers.micro_batches import micro_batches
from fastrl.trainers.processes import Processes
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
        is_nothing: no token was seen yet.
        clipped: how many tokens' ratios left their bounds: below, above; and of how many.
    """

    logprobs: Tensor
    entropy: Tensor
    values: Tensor
    is_first: Tensor
    clipped: Tensor
    is_nothing: bool = True

    @classmethod
    def nothing(cls, like: Tensor) -> "Seen":
        nan = torch.full_like(like, torch.nan)
        return cls(nan, nan.clone(), nan.clone(), nan > 0, like.new_zeros(3, dtype=torch.float64))

    def add(self, at: Tensor, passed: Passed) -> None:
        """What a pass over the tokens `at` computed, which no other pass of the step has."""
        self.logprobs[at], self.entropy[at] = passed.logprobs, passed.entropy
        if passed.values is not None:
            self.values[at] = passed.values.to(self.values.dtype)

    def share(self, processes: Processes) -> None:
        """Put together what the processes have seen in a step, of different tokens."""
        if processes.count == 1:
            return
        known = ~self.logprobs.isnan()
        found = torch.stack([self.logprobs, self.entropy, self.values]).masked_fill(~known, 0)
        counts = known.to(found.dtype)
        processes.add(found, counts, self.clipped)
        self.logprobs, self.entropy, self.values = found.masked_fill(counts == 0, torch.nan)

    def take(self, later: "Seen", *, is_first: bool) -> None:
        """What a step saw, as far as no step before it has."""
        fresh = self.logprobs.isnan()  # selecting these would wait for the device
        if is_first:
            self.is_first |= fresh & ~later.logprobs.isnan()
        for name in ("logprobs", "entropy", "values"):
            setattr(self, name, getattr(later, name).where(fresh, getattr(self, name)))
        self.clipped += later.clipped
        self.is_nothing = False


def learn(
    trainer: "Trainer", experience: Experience, metrics: dict[str, Tensor] | None = None
) -> tuple[dict[str, float], str | None]:
    """Gradient steps on an experience.

    Args:
        metrics: 0-d, known already; they come to the host with the others.
    Returns:
        numbers: these, "loss" and "grad_norm" (means over the gradient steps), "entropy",
            "logprob_gap", "clip_ratio/..." and the algorithm's own.
        problem: why an update was skipped, if one was; no further one is made then.
    """
    config, metrics = trainer.config, metrics or {}
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
            loss, norm, problem = _gradient_step(
                trainer, experience, completions, seen, is_first=seen.is_nothing
            )
            losses.append(loss)
            norms.append(norm)
    if seen.is_nothing:
        _look(trainer, experience, seen)
    found = to_numbers(metrics | _metrics(trainer, experience, seen))
    known = {name: found.pop(name) for name in metrics}
    return known | {"loss": _mean(losses), "grad_norm": _mean(norms)} | found, problem


def _minibatches(trainer: "Trainer", experience: Experience, epoch: int) -> list[Tensor]:
    """[C] bool each: the completions of some of the prompts, all of them in all together."""
    count, groups = trainer.config.minibatches, experience.rollout.group_ids
    if count == 1:
        return [torch.ones_like(groups, dtype=torch.bool)]
    groups = groups.cpu()
    names = groups.unique()
    key = torch.tensor([trainer.step * trainer.config.epochs + epoch])
    seed = int(completion_seeds(trainer.config.seed, _MINIBATCHES, key, 1))
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed))
    parts = names[order].tensor_split(count)
    masks = [torch.isin(groups, part) for part in parts if len(part)]
    return on_device(masks, experience.rollout.group_ids.device)


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
    counted = whole.is_learned & whole.rollout.over_targets(completions)
    # What has no gradient is not computed: its weight in the denominators is in token_weights.
    active = completions_with(whole.rollout, counted & trainer.teaches(whole))
    # The first process's: an advantage of 0 in one may be rounded to another number elsewhere.
    *host, counts = trainer.processes.on_first(
        "a gradient step", lambda: torch.cat([active, counted.any()[None]]).tolist()
    )
    if not counts:
        return 0.0, 0.0, None  # all of them truncated, or without another to compare with
    active = torch.tensor(host, dtype=torch.bool, device="cpu")
    own = trainer.processes.own(whole.rollout.batch, active)
    weighted = replace(whole, token_weights=token_weights(trainer, whole, counted))
    _clear_gradients(trainer)
    total = whole.old_logprobs.new_zeros((), dtype=torch.float64)
    now = Seen.nothing(whole.old_logprobs)
    if bool(own.any()):
        part, of_part = weighted.take(own) if not bool(own.all()) else (weighted, None)
        trainer.set_learning(True)
        try:
            for micro, at in micro_batches(part.rollout.batch, config.micro_batch_tokens):
                known = part.at(at)
                passed = micro_loss(trainer, micro, known)
                passed.loss.backward()
                total += passed.loss.detach()
                now.add(at if of_part is None else of_part[at], passed)
                bounds = micro.completion_cu_seqlens
                now.clipped += clip_counts(trainer, passed.logprobs, known, bounds)
        finally:
            trainer.set_learning(False)
    if bool(active.any()):
        trainer.processes.meet("the gradients")
        now.share(trainer.processes)
        seen.take(now, is_first=is_first)
        trainer.processes.add(total)
        trainer.processes.add_gradients(trainer.parameters)
    limit = math.inf if config.max_grad_norm is None else config.max_grad_norm
    norm = nn.utils.clip_grad_norm_(trainer.parameters, limit)
    loss_number, norm_number = torch.stack([total, norm.to(total)]).tolist()
    problem = None
    if not (math.isfinite(loss_number) and math.isfinite(norm_number)):
        problem = f"loss {loss_number:g} with gradient norm {norm_number:g}"
    else:
        trainer.optimizer.step()
        trainer.processes.give_stepped(trainer.parameters)
    _clear_gradients(trainer)
    return loss_number, norm_number, problem


def _clear_gradients(trainer: "Trainer") -> None:
    """The optimizer of one of several processes has a part of the parameters."""
    for parameter in trainer.parameters:
        parameter.grad = None


def _look(trainer: "Trainer", experience: Experience, seen: Seen) -> None:
    """Where all was skipped, at one prompt's completions: each step tells its gap and entropy."""
    rollout = experience.rollout
    if not len(rollout.logprobs):
        return
    part = rollout.take(rollout.group_ids == rollout.group_ids[0])
    at = part.batch.source_targets  # type: ignore[attr-defined]
    seen.logprobs[at], seen.entropy[at] = scores(trainer, trainer.policy, part)
    seen.is_first[at], seen.is_nothing = True, False


def _metrics(trainer: "Trainer", experience: Experience, seen: Seen) -> dict[str, Tensor]:
    """Means over the tokens that count, as they were seen first."""
    known = ~seen.logprobs.isnan()
    learned = known & experience.is_learned
    known = learned.where(learned.any(), known)
    first = known & seen.is_first
    if experience.is_fresh is not None:
        first &= experience.is_fresh
    gap = (seen.logprobs - experience.rollout.logprobs).abs().masked_fill(~first, -math.inf)
    largest = gap.max() if len(gap) else gap.new_full((), math.nan)
    metrics = {
        "entropy": token_mean(seen.entropy, known),
        "logprob_gap": largest.masked_fill(~first.any(), math.nan),
    }
    low, high, count = seen.clipped
    if trainer.has_bounds:
        for name, number in (("low", low), ("high", high), ("region", low + high)):
            metrics[f"clip_ratio/{name}_mean"] = number / count.clamp(min=1)
    if experience.returns is not None:
        metrics |= _critic_metrics(experience.returns, seen.values, known)
    return metrics


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
