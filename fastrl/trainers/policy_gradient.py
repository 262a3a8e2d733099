"""REINFORCE with immediate rewards."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fastrl.models import ActorCritic, PolicyModel
from fastrl.rollout import Rollout
from fastrl.trainers.baselines import RunningMean, leave_one_out
from fastrl.trainers.config import PolicyGradientConfig, TrainerConfig
from fastrl.trainers.tokens import ScoredTokens, kl_loss, token_mean
from fastrl.trainers.trainer import Trainer


class PolicyGradientTrainer(Trainer):
    """REINFORCE with discounted reward-to-go: per step, one gradient step on the loss

        mean over tokens of  -log pi(w_t) (G_t - b_t) + kl_coef KL_t - entropy_coef H_t
        G_t = r_t + gamma G_{t+1},  0 after the last token

    gamma = 0 without a baseline is the purely immediate -mean(log pi · r). See `Trainer` for what
    a step is, and for the arguments; the model is a language model.
    Reference: Williams 1992, Machine Learning 8; Kool et al. 2019 (baseline "rloo").
    """

    config_class: ClassVar[type[TrainerConfig]] = PolicyGradientConfig

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._running_mean = RunningMean(
            self.config.max_new_tokens, self.config.baseline_decay, self.device
        )

    def _policy_of(self, model: nn.Module) -> PolicyModel:
        if isinstance(model, ActorCritic) or not isinstance(model, PolicyModel):
            raise TypeError(
                "PolicyGradientTrainer: expected model a language model such as "
                f"LSTMLanguageModel, got {type(model).__name__}. Pass an ActorCritic's "
                ".language_model, or use ActorCriticTrainer."
            )
        return model

    def _loss(
        self, rollout: Rollout, tokens: ScoredTokens
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        config, ops = self.config, self.ops
        returns = ops.discounted_returns(
            rollout.rewards, gamma=config.gamma, cu_seqlens=rollout.cu_seqlens
        )
        baseline, is_known = self._baseline(returns, rollout)
        is_learned = rollout.loss_mask & is_known
        advantages = returns - baseline
        loss = ops.policy_gradient_loss(tokens.logprobs, advantages, loss_mask=is_learned)
        loss = loss + kl_loss(
            tokens, is_learned, coef=config.kl_coef, estimator=config.kl_estimator, ops=ops
        )
        if config.entropy_coef > 0:
            loss = loss - config.entropy_coef * token_mean(tokens.entropy, is_learned)
        return loss, is_learned, {"advantage": token_mean(advantages, is_learned)}

    def _baseline(self, returns: Tensor, rollout: Rollout) -> tuple[Tensor, Tensor]:
        if self.config.baseline == "rloo":
            return leave_one_out(returns, rollout)
        if self.config.baseline == "running_mean":
            return self._running_mean(returns, rollout), rollout.loss_mask
        return torch.zeros_like(returns), rollout.loss_mask

    def state_tensors(self) -> dict[str, Tensor]:
        return self._running_mean.tensors()
