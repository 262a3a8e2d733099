"""Actor-critic: A2C, PPO and V-trace with replay."""

from dataclasses import replace
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fastrl.layout import PackedBatch
from fastrl.models import ActorCritic
from fastrl.rollout import Rollout
from fastrl.trainers.config import ActorCriticConfig, TrainerConfig
from fastrl.trainers.experience import Experience
from fastrl.trainers.losses import path_weights
from fastrl.trainers.micro_batches import micro_batches
from fastrl.trainers.replay import ReplayBuffer, joined
from fastrl.trainers.tokens import autocast
from fastrl.trainers.trainer import Trainer
from fastrl.trainers.trajectories import Trajectories


class ActorCriticTrainer(Trainer):
    """A value for every token; per step the loss

        mean over tokens of  l_t + critic_coef (R_t - V_t)^2 + kl_coef KL_t - entropy_coef H_t

    with V_t = V(w_1:t-1) and the advantage A_t = R_t - V_t detached in the actor's part,

        a2c, vtrace:  l_t = -log pi(w_t) A_t        ppo:  l_t = the clipped surrogate of A_t.

    R_t are the discounted rewards from t on, with advantage "gae" the lambda-return (A_t is then
    the GAE advantage), and for vtrace the V-trace target, with its own advantage. Advantages and
    returns are formed once a step, from the values of the sampling critic. See `Trainer` for what
    a step is, and for the arguments; the model is an `ActorCritic`.
    Reference: Mnih et al. 2016, arXiv:1602.01783; Schulman et al. 2016, arXiv:1506.02438, and 2017,
    arXiv:1707.06347; Espeholt et al. 2018, arXiv:1802.01561.
    """

    config_class: ClassVar[type[TrainerConfig]] = ActorCriticConfig

    @cached_property
    def replay(self) -> ReplayBuffer:
        return ReplayBuffer(self.config.replay_size, self.config.seed)

    def _checked_model(self, model: Any) -> nn.Module:
        if not isinstance(model, ActorCritic):
            raise TypeError(
                f"ActorCriticTrainer: expected model ActorCritic, got {type(model).__name__}. "
                "Wrap the language model: ActorCritic(model)."
            )
        return model

    @property
    def reduction(self) -> str:
        return "token_mean"

    @property
    def has_bounds(self) -> bool:
        return self.config.algorithm == "ppo"

    def values(self, micro: PackedBatch, hidden: Tensor) -> Tensor | None:
        if self.model.critic is not None:
            with autocast(self.device, self.config.precision):
                hidden = self.model.critic.packed_hidden(micro)
        return self._values_of(hidden)

    def values_while_sampling(self) -> Any:
        return self._values_of if self.model.critic is None else None

    def _values_of(self, hidden: Tensor) -> Tensor:
        """In the head's own precision, under autocast too."""
        with autocast(self.device, "float32"):
            return self.model.values(hidden.to(self.model.value_head.weight.dtype))

    def with_replayed(self, rollout: Rollout) -> tuple[Rollout, Tensor | None]:
        count = self.config.replay_per_step
        drawn = self.replay.draw(self.step, count) if self.replay.size else []
        self.replay.add(rollout)
        if not drawn:
            return rollout, None
        fresh = torch.zeros(
            sum(len(r.logprobs) for r in (rollout, *drawn)), dtype=torch.bool, device=self.device
        )
        fresh[: len(rollout.logprobs)] = True
        return joined([rollout, *drawn]), fresh

    def advantages(self, rollout: Rollout, known: Experience) -> Experience:
        assert rollout.rewards is not None
        config, ops, paths = self.config, self.ops, Trajectories(rollout)
        values = self._values_before(rollout)
        along = {
            "rewards": paths.along(rollout.rewards),
            "gamma": config.gamma,
            "cu_seqlens": paths.cu_seqlens,
        }
        v = paths.along(values)
        if config.advantage == "vtrace":
            log_ratio = paths.along(known.old_logprobs - rollout.logprobs)
            advantages, returns = ops.vtrace(
                values=v, log_ratio=log_ratio, rho_clip=config.rho_clip, c_clip=config.c_clip,
                gae_lambda=config.gae_lambda, **along,
            )  # fmt: skip
        elif config.advantage == "gae":
            advantages, returns = ops.gae(values=v, gae_lambda=config.gae_lambda, **along)
        else:
            returns = ops.discounted_returns(**along)
            advantages = returns - v
        if config.whiten_advantages:
            advantages = ops.whiten(advantages, paths.over(paths.whole(known.is_learned)))
        weights = path_weights(self, paths, known.is_learned)
        return replace(
            known,
            advantages=paths.mean(advantages, weights),
            returns=paths.mean(returns, weights),
            old_values=values,
        )

    @torch.no_grad()
    def _values_before(self, rollout: Rollout) -> Tensor:
        """[M], of the critic as it samples: recorded while sampling, or computed now."""
        if rollout.values is not None:
            return rollout.values
        return self.processes.computed(rollout.batch, self._values_of_batch, 1)[0].float()

    def _values_of_batch(self, batch: PackedBatch) -> tuple[Tensor]:
        found = torch.empty(len(batch.target_ids), device=self.device)
        reader = self.policy if self.model.critic is None else self.model.critic
        for micro, at in micro_batches(batch, self.config.micro_batch_tokens):
            with autocast(self.device, self.config.precision):
                hidden = reader.packed_hidden(micro)
            found[at] = self._values_of(hidden).float()
        return (found,)

    def policy_losses(
        self, logprobs: Tensor, known: Experience, cu_seqlens: Tensor | None
    ) -> Tensor:
        config, ops = self.config, self.ops
        rest: dict[str, Any] = {"loss_mask": known.is_learned, "reduction": "none"}
        # V-trace's advantages have their importance weights within them.
        weights = None if config.algorithm == "vtrace" else known.weights
        if config.algorithm != "ppo":
            return ops.policy_gradient_loss(logprobs, known.advantages, weights=weights, **rest)
        return ops.ppo_loss(
            logprobs,
            known.old_logprobs,
            known.advantages,
            clip_low=config.clip_low,
            clip_high=config.clip_high,
            dual_clip=config.dual_clip,
            weights=weights,
            **rest,
        )

    def critic_losses(self, values: Tensor, known: Experience) -> Tensor:
        assert known.returns is not None
        clip = self.config.value_clip
        return self.ops.value_loss(
            values,
            known.returns,
            old_values=None if clip is None else known.old_values,
            clip=clip,
            loss_mask=known.is_learned,
            reduction="none",
        )

    def teaches(self, known: Experience) -> Tensor:
        return torch.ones_like(known.is_learned)  # the critic learns from each token

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"replay": self.replay.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.replay.load_state_dict(state["replay"], self.device)
