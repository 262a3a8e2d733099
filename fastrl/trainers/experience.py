"""What a step learns from: a rollout, and what is known of each of its tokens."""

from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastrl.rollout import Rollout
from fastrl.trainers.engines import importance, sampling_metrics
from fastrl.trainers.tokens import token_mean, token_scores
from fastrl.trainers.trajectories import Trajectories

if TYPE_CHECKING:
    from fastrl.trainers.trainer import Trainer


@dataclass(frozen=True, kw_only=True)
class Experience:
    """M tokens that the policy wrote, for the losses; all are detached.

    Attributes:
        rollout: the tokens.
        old_logprobs: [M] float32, under the policy before the update, nats.
        advantages: [M] float32.
        is_learned: [M] bool, the tokens that count.
        returns: [M], what the critic learns; None without one.
        old_values: [M], of the critic before the update; None without one.
        ref_logprobs: [M], under the starting model; None where nothing asks for them.
        weights: [M], bounded importance of tokens that another policy sampled; None: 1 each.
        is_fresh: [M] bool, False where an earlier policy sampled; None: nowhere.
        token_weights: [M], a token's weight in the loss: what the reduction makes of it. None
            until it is known what is learned from together.
    """

    rollout: Rollout
    old_logprobs: Tensor
    advantages: Tensor
    is_learned: Tensor
    returns: Tensor | None = None
    old_values: Tensor | None = None
    ref_logprobs: Tensor | None = None
    weights: Tensor | None = None
    is_fresh: Tensor | None = None
    token_weights: Tensor | None = None

    def take(self, completions: Tensor) -> "tuple[Experience, Tensor]":
        """Some of the completions, [C] bool, and which of the M targets they hold."""
        rollout = self.rollout.take(completions)
        at = rollout.batch.source_targets  # type: ignore[attr-defined]
        return replace(self.at(at), rollout=rollout), at

    def at(self, tokens: Tensor) -> "Experience":
        """What is known of some of the tokens, indices [n]; the rollout stays whole."""
        cut: dict[str, Any] = {
            field.name: getattr(self, field.name)[tokens]
            for field in fields(self)
            if field.name != "rollout" and getattr(self, field.name) is not None
        }
        return replace(self, **cut)


def completions_with(rollout: Rollout, tokens: Tensor) -> Tensor:
    """[C] bool: the completions with one of these tokens, [M] bool."""
    if not len(rollout.lengths):
        return rollout.lengths.bool()
    return rollout.per_completion(tokens.double(), "max", initial=0) > 0


def gather(trainer: "Trainer", rollout: Rollout) -> tuple[Experience, dict[str, Tensor]]:
    """What is known of a rewarded rollout's tokens before the update, and metrics of it (0-d)."""
    config = trainer.config
    metrics: dict[str, Tensor] = {}
    rollout, is_fresh = trainer.with_replayed(rollout)
    is_learned, weights = rollout.loss_mask, None
    if config.mask_truncated:
        is_learned = is_learned & rollout.over_targets(rollout.ended)
    paths = Trajectories(rollout)  # a turn of which no path can be learned from is not either
    is_learned = paths.any(paths.over(paths.whole(is_learned)))
    old = _old_logprobs(trainer, rollout, is_fresh)
    if trainer.rollout_function is not None or is_fresh is not None:
        weights = importance(old, rollout.logprobs, config.importance_cap)
    if trainer.rollout_function is not None:
        assert weights is not None
        metrics = sampling_metrics(old, rollout.logprobs, weights, is_fresh)
    known = Experience(
        rollout=rollout,
        old_logprobs=old,
        advantages=torch.zeros_like(old),
        is_learned=is_learned,
        weights=weights,
        is_fresh=is_fresh,
    )
    is_due = config.kl_every > 0 and trainer.step % config.kl_every == 0
    if trainer.kl.coef > 0 or is_due:
        reference = scores(trainer, trainer.reference, rollout)[0]
        known = replace(known, ref_logprobs=reference)
        # k3 is unbiased and never negative, so it is what we report whatever is learned from.
        kl = trainer.ops.kl_penalty(old, reference, estimator="k3")
        metrics["kl"] = token_mean(
            kl, torch.ones_like(is_learned) if is_fresh is None else is_fresh
        )
        if trainer.kl.coef > 0 and config.kl_in == "reward":
            penalty = trainer.ops.kl_penalty(old, reference, estimator=config.kl_estimator)
            assert rollout.rewards is not None
            rollout = replace(rollout, rewards=rollout.rewards - trainer.kl.coef * penalty)
    known = trainer.advantages(rollout, known)
    metrics["advantage"] = token_mean(known.advantages, known.is_learned)
    return known, metrics


def _old_logprobs(trainer: "Trainer", rollout: Rollout, is_fresh: Tensor | None) -> Tensor:
    """[M], under the policy as it is now: those of its own sampling, the others computed."""
    if trainer.rollout_function is not None:
        return scores(trainer, trainer.policy, rollout)[0]
    if is_fresh is None:
        return rollout.logprobs
    old = rollout.logprobs.clone()
    replayed = rollout.take(completions_with(rollout, ~is_fresh))
    old[replayed.batch.source_targets] = scores(trainer, trainer.policy, replayed)[0]  # type: ignore
    return old


def scores(trainer: "Trainer", policy: Any, rollout: Rollout) -> tuple[Tensor, Tensor]:
    """Log-probability and entropy [M] of a rollout's tokens under a policy, without gradients."""
    return token_scores(
        policy,
        rollout.batch,
        temperature=trainer.temperature,
        ops=trainer.ops,
        precision=trainer.config.precision,
        max_tokens=trainer.config.micro_batch_tokens,
        processes=trainer.processes,
    )
