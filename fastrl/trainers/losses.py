"""One micro-batch's loss: an algorithm's own, with what all of them share around it."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastrl.layout import PackedBatch
from fastrl.trainers.experience import Experience
from fastrl.trainers.tokens import autocast
from fastrl.trainers.trajectories import Trajectories

if TYPE_CHECKING:
    from fastrl.trainers.trainer import Trainer


@dataclass(frozen=True)
class Passed:
    """One pass over a micro-batch of n targets.

    Attributes:
        loss: 0-d, the micro-batch's part of the loss, with a graph.
        logprobs, entropy: [n], detached, nats.
        values: [n], detached; None without a critic.
    """

    loss: Tensor
    logprobs: Tensor
    entropy: Tensor
    values: Tensor | None = None


def micro_loss(trainer: "Trainer", micro: PackedBatch, known: Experience) -> Passed:
    """The loss over a micro-batch's n targets, with a graph.

    Args:
        known: of these targets alone, token_weights included.
    """
    policy, ops = trainer.policy, trainer.ops
    with autocast(trainer.device, trainer.config.precision):
        hidden = policy.packed_hidden(micro)
    head = policy.head
    hidden = hidden.to(head.weight.dtype)
    arguments = head.arguments(trainer.temperature)
    if trainer.is_per_token:

        def loss_fn(logprobs: Tensor, entropy: Tensor, rows: Tensor) -> Tensor:
            return token_losses(trainer, logprobs, entropy, known.at(rows))

        # The gradients form in the forward pass: three products, no logits kept.
        loss, logprobs, entropy = ops.linear_token_loss(
            hidden, head.weight, micro.target_ids, loss_fn, **arguments
        )
    else:
        logprobs, entropy = ops.linear_token_logprobs(
            hidden, head.weight, micro.target_ids, return_entropy=True, **arguments
        )
        loss = token_losses(
            trainer, logprobs, entropy, known, cu_seqlens=micro.completion_cu_seqlens
        ).sum()
    values = trainer.values(micro, hidden)
    if values is not None:
        assert known.token_weights is not None
        losses = trainer.critic_losses(values, known) * known.token_weights
        loss = loss + trainer.config.critic_coef * losses.sum()
        values = values.detach()
    return Passed(loss, logprobs.detach(), entropy.detach(), values)


def token_losses(
    trainer: "Trainer",
    logprobs: Tensor,
    entropy: Tensor,
    known: Experience,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """[n]: w (policy loss + kl_coef KL - entropy_coef entropy) of each token; 0 of the others."""
    losses = trainer.policy_losses(logprobs, known, cu_seqlens)
    kl_coef, entropy_coef = trainer.kl.coef, trainer.entropy.coef
    if kl_coef and trainer.config.kl_in == "loss":
        kl = trainer.ops.kl_penalty(
            logprobs, known.ref_logprobs, estimator=trainer.config.kl_estimator
        )
        # A mean over tokens as the policy samples them; an entropy is one over all of them already.
        losses = losses + kl_coef * (kl if known.weights is None else kl * known.weights)
    if entropy_coef:
        losses = losses - entropy_coef * entropy
    assert known.token_weights is not None
    return (losses * known.token_weights).masked_fill(~known.is_learned, 0)


def token_weights(trainer: "Trainer", experience: Experience, counted: Tensor) -> Tensor:
    """[M]: what the reduction of the loss weighs each token with, on all its paths together."""
    paths = Trajectories(experience.rollout)
    return paths.sum(path_weights(trainer, paths, counted))


def path_weights(trainer: "Trainer", paths: Trajectories, counted: Tensor) -> Tensor:
    """[P]: what the reduction of the loss weighs each token of each trajectory with.

    The derivative of the reduced loss in each token's own: so the weights of completions that are
    not computed, or are in another micro-batch, are in the denominators, by the one definition.

    Args:
        counted: [M] bool; a trajectory counts where all its targets do.
    """
    whole = paths.whole(counted)
    reduction, normalizer = trainer.reduction, None
    if reduction == "token_sum":
        reduction, normalizer = "token_mean", whole.sum() * trainer.config.max_new_tokens
    mask = paths.over(whole)
    with torch.enable_grad():
        losses = torch.zeros(mask.shape, device=mask.device, requires_grad=True)
        total = trainer.ops.policy_gradient_loss(
            losses,
            -torch.ones_like(losses),
            loss_mask=mask,
            reduction=reduction,
            normalizer=normalizer,
            cu_seqlens=paths.cu_seqlens,
        )
        return torch.autograd.grad(total, losses)[0]


def clip_counts(
    trainer: "Trainer", logprobs: Tensor, known: Experience, cu_seqlens: Tensor
) -> Tensor:
    """[3] float64: how many of n tokens' ratios left their bounds below, above; and n."""
    if not trainer.has_bounds:
        return logprobs.new_zeros(3, dtype=torch.float64)
    counted, advantages = known.is_learned, known.advantages
    log_ratio = (logprobs - known.old_logprobs).masked_fill(~counted, 0)
    if not trainer.is_per_token:  # a sequence's ratio is that of each of its tokens
        lengths = cu_seqlens.diff().long()
        sums = torch.segment_reduce(
            torch.stack([log_ratio, counted.to(log_ratio)], 1), "sum", lengths=lengths, unsafe=True
        )
        means = sums[:, 0] / sums[:, 1].clamp(min=1)
        log_ratio = means.repeat_interleave(lengths, output_size=len(log_ratio))
    ratio = log_ratio.exp()
    low = counted & (ratio < 1 - trainer.config.clip_low) & (advantages < 0)
    high = counted & (ratio > 1 + trainer.config.clip_high) & (advantages > 0)
    return torch.stack([low.sum(), high.sum(), counted.sum()]).double()
