"""What an algorithm is made of, to the trainer that runs it."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastrl.layout import PackedBatch
from fastrl.rollout import Rollout
from fastrl.trainers.experience import Experience
from fastrl.trainers.schedules import EntropyController, KLController


class Objective(ABC):
    """Advantages and losses; without a critic and replay unless a trainer says otherwise."""

    config: Any
    kl: KLController
    entropy: EntropyController

    @property
    @abstractmethod
    def reduction(self) -> str:
        """How the losses of tokens add up; see `fastrl.trainers.algorithms.Algorithm`."""

    @property
    @abstractmethod
    def has_bounds(self) -> bool:
        """Whether the loss bounds the ratio to the policy that sampled."""

    @property
    def is_per_token(self) -> bool:
        """Whether a token's loss depends on that token alone."""
        return True

    @abstractmethod
    def _checked_model(self, model: Any) -> nn.Module:
        """The model as a policy or an actor-critic; TypeError for one of another kind."""

    @abstractmethod
    def advantages(self, rollout: Rollout, known: Experience) -> Experience:
        """What is known, with advantages (and for a critic returns and old_values)."""

    @abstractmethod
    def policy_losses(
        self, logprobs: Tensor, known: Experience, cu_seqlens: Tensor | None
    ) -> Tensor:
        """[n]: the policy's loss at each token."""

    def values(self, micro: PackedBatch, hidden: Tensor) -> Tensor | None:
        """[n] of a micro-batch's targets, from the policy's hidden states; None: no critic."""
        return None

    def values_while_sampling(self) -> Callable[[Tensor], Tensor] | None:
        """What `fastrl.rollout.generate` takes as value_fn."""
        return None

    def critic_losses(self, values: Tensor, known: Experience) -> Tensor:
        """[n]: the critic's loss at each token."""
        raise NotImplementedError(f"{type(self).__name__} has no critic.")

    def with_replayed(self, rollout: Rollout) -> tuple[Rollout, Tensor | None]:
        """The rollout with earlier ones, and which tokens are its own, [M] bool."""
        return rollout, None

    def teaches(self, known: Experience) -> Tensor:
        """[M] bool: the tokens whose loss has a gradient, or whose entropy steers its coefficient:
        at 0 too, or it would be that of the prompts whose completions still differ alone."""
        kl_loss = self.kl.coef > 0 and self.config.kl_in == "loss"
        if kl_loss or self.entropy.coef > 0 or self.config.entropy_target is not None:
            return torch.ones_like(known.is_learned)
        return known.advantages != 0
