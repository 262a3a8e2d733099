"""Advantage actor-critic with immediate rewards."""

from typing import ClassVar

from torch import Tensor, nn

from fastrl.models import ActorCritic, PolicyModel
from fastrl.rollout import Rollout
from fastrl.trainers.config import ActorCriticConfig, TrainerConfig
from fastrl.trainers.tokens import ScoredTokens, kl_loss, token_mean
from fastrl.trainers.trainer import Trainer


class ActorCriticTrainer(Trainer):
    """A2C: per step, one gradient step on the loss

        mean over tokens of  -log pi(w_t) (R_t - V_t) + critic_coef (R_t - V_t)^2
                             + kl_coef KL_t - entropy_coef H_t

    with V_t = V(w_1:t-1) detached in the first term, and R_t the discounted rewards from t on, or
    with advantage "gae" the lambda-return, whose R_t - V_t is the GAE advantage. See `Trainer` for
    what a step is, and for the arguments; the model is an `ActorCritic`.
    Reference: Mnih et al. 2016, arXiv:1602.01783; Schulman et al. 2016, arXiv:1506.02438.
    """

    config_class: ClassVar[type[TrainerConfig]] = ActorCriticConfig

    def _policy_of(self, model: nn.Module) -> PolicyModel:
        if not isinstance(model, ActorCritic):
            raise TypeError(
                f"ActorCriticTrainer: expected model ActorCritic, got {type(model).__name__}. "
                "Wrap the language model: ActorCritic(model)."
            )
        return model.language_model

    def _loss(
        self, rollout: Rollout, tokens: ScoredTokens
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        config, ops, is_learned = self.config, self.ops, rollout.loss_mask
        values = self.model.values(tokens.hidden)
        returns = self._returns(values.detach(), rollout)
        advantages = returns - values.detach()
        if config.whiten_advantages:
            advantages = ops.whiten(advantages, is_learned)
            loss = (
                ops.policy_gradient_loss(tokens.logprobs, advantages, loss_mask=is_learned)
                + config.critic_coef * ops.value_loss(values, returns, loss_mask=is_learned)
                - config.entropy_coef * token_mean(tokens.entropy, is_learned)
            )
        else:
            loss = ops.actor_critic_loss(
                tokens.logprobs,
                values,
                returns,
                critic_coef=config.critic_coef,
                entropy=tokens.entropy,
                entropy_coef=config.entropy_coef,
                loss_mask=is_learned,
            )
        loss = loss + kl_loss(
            tokens, is_learned, coef=config.kl_coef, estimator=config.kl_estimator, ops=ops
        )
        error = (returns - values.detach()).square()
        metrics = {
            "value": token_mean(values, is_learned),
            "value_error": token_mean(error, is_learned),
        }
        return loss, is_learned, metrics

    def _returns(self, values: Tensor, rollout: Rollout) -> Tensor:
        """What the critic learns; its distance from the values is the actor's advantage."""
        if self.config.advantage == "gae":
            _, returns = self.ops.gae(
                rollout.rewards,
                values,
                gamma=self.config.gamma,
                gae_lambda=self.config.gae_lambda,
                cu_seqlens=rollout.cu_seqlens,
            )
            return returns
        return self.ops.discounted_returns(
            rollout.rewards, gamma=self.config.gamma, cu_seqlens=rollout.cu_seqlens
        )
