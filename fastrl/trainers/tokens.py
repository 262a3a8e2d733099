"""What the model says of tokens that were sampled, and means over them."""

from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from fastrl.models.protocol import PolicyModel
from fastrl.rollout import Rollout


@dataclass(frozen=True)
class ScoredTokens:
    """A rollout's N tokens under the policy as it is now.

    Attributes:
        hidden: [N, D], what predicted each.
        logprobs: [N] float32, nats.
        entropy: [N] float32, of the distribution that each was drawn from, nats.
        ref_logprobs: [N] float32, under the starting model, detached.
    """

    hidden: Tensor
    logprobs: Tensor
    entropy: Tensor
    ref_logprobs: Tensor


def score_tokens(
    policy: PolicyModel,
    reference: PolicyModel,
    rollout: Rollout,
    *,
    temperature: float,
    ops: ModuleType,
) -> ScoredTokens:
    """Score a rollout's tokens: no padding, and each prompt is read once by each model."""
    where = rollout.prompts, rollout.token_ids, rollout.cu_seqlens
    with torch.no_grad():
        logits = reference.lm_head(reference.completion_hidden_states(*where))
        ref_logprobs = ops.token_logprobs(logits, rollout.token_ids, temperature=temperature)
    hidden = policy.completion_hidden_states(*where)
    # Nothing else reads these logits, so their gradient may take their place.
    logits = policy.lm_head(hidden)
    logprobs, entropy = ops.token_logprobs(
        logits,
        rollout.token_ids,
        temperature=temperature,
        return_entropy=True,
        inplace_backward=True,
    )
    return ScoredTokens(hidden, logprobs, entropy, ref_logprobs)


def token_mean(values: Tensor, mask: Tensor) -> Tensor:
    """The mean of values [N] where mask [N] is True; 0 where it nowhere is."""
    return values.masked_fill(~mask, 0).sum() / mask.sum().clamp(min=1)


def kl_loss(
    tokens: ScoredTokens, mask: Tensor, *, coef: float, estimator: str, ops: ModuleType
) -> Tensor:
    """coef times the mean divergence from the starting model over the tokens in mask."""
    if coef == 0:
        return tokens.logprobs.new_zeros(())
    kl = ops.kl_penalty(tokens.logprobs, tokens.ref_logprobs, estimator=estimator)
    return coef * token_mean(kl, mask)


def rollout_metrics(rollout: Rollout, tokens: ScoredTokens, ops: ModuleType) -> dict[str, Tensor]:
    """Means over all tokens and completions of a rollout, 0-d each."""
    # k3 is unbiased and never negative, so it is what we report whatever is learned from.
    kl = ops.kl_penalty(tokens.logprobs.detach(), tokens.ref_logprobs, estimator="k3")
    return {
        "entropy": tokens.entropy.detach().mean(),
        "kl": kl.mean(),
        "completion_length": rollout.lengths.float().mean(),
        "ended": rollout.ended.float().mean(),
    }


def to_numbers(metrics: dict[str, Tensor]) -> dict[str, float]:
    """0-d tensors as floats, in one transfer."""
    values = torch.stack([value.detach().double() for value in metrics.values()])
    return dict(zip(metrics, values.tolist(), strict=True))
