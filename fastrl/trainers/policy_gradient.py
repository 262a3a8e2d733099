"""Policy gradient: REINFORCE, RLOO, GRPO, Dr. GRPO, DAPO, GSPO and CISPO."""

from dataclasses import replace
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fastrl.models import ActorCritic, as_policy
from fastrl.rollout import Rollout
from fastrl.trainers.baselines import RunningMean, leave_one_out
from fastrl.trainers.config import PolicyGradientConfig, TrainerConfig
from fastrl.trainers.experience import Experience
from fastrl.trainers.losses import path_weights
from fastrl.trainers.trainer import Trainer
from fastrl.trainers.trajectories import Trajectories


class PolicyGradientTrainer(Trainer):
    """Policy gradient without a critic; per step the loss

        sum over tokens of  w_t (l_t + kl_coef KL_t - entropy_coef H_t)

    whose parts `fastrl.trainers.algorithms` lists. "reinforce" takes the discounted reward-to-go,

        l_t = -log pi(w_t) (G_t - b_t),    G_t = r_t + gamma G_{t+1},  0 after the last token,

    and gamma = 0 without a baseline is the purely immediate -mean(log pi · r). The others compare
    the completions of a prompt by the sums of their rewards. See `Trainer` for what a step is, and
    for the arguments; the model is a language model.
    Reference: Williams 1992, Machine Learning 8; Kool et al. 2019 (baseline "rloo"); those of the
    other algorithms stand beside them.
    """

    config_class: ClassVar[type[TrainerConfig]] = PolicyGradientConfig

    @cached_property
    def _running_mean(self) -> RunningMean:
        return RunningMean(self.config.max_new_tokens, self.config.baseline_decay, self.device)

    def _checked_model(self, model: Any) -> nn.Module:
        if isinstance(model, ActorCritic):
            raise TypeError(
                "PolicyGradientTrainer: expected model a language model such as "
                f"LSTMLanguageModel, got {type(model).__name__}. Pass an ActorCritic's "
                ".language_model, or use ActorCriticTrainer."
            )
        return as_policy(model)

    @property
    def reduction(self) -> str:
        return self.config.reduction

    @property
    def is_per_token(self) -> bool:
        return self.config.loss != "ppo_sequence"

    @property
    def has_bounds(self) -> bool:
        return self.config.loss != "policy_gradient"

    def advantages(self, rollout: Rollout, known: Experience) -> Experience:
        assert rollout.rewards is not None
        paths = Trajectories(rollout)
        if paths.is_shared and not self.is_per_token:
            raise ValueError(
                "PolicyGradientTrainer: expected completions without shared turns with algorithm "
                f"{self.config.algorithm!r}, whose ratio is a whole completion's, got a tree. "
                "Take another algorithm, or give each conversation its own copies."
            )
        if self.config.advantage == "returns":
            return self._less_baseline(rollout, known, paths)
        totals, is_used = paths.totals(rollout.rewards), paths.whole(rollout.loss_mask)
        compared, _ = self.ops.group_advantages(
            totals.masked_fill(~is_used, torch.nan),  # left out of its group
            paths.group_ids,
            estimator=self.config.advantage,
            k=self.config.advantage_k,
        )
        return self._averaged(known, paths, paths.over(compared))

    def _averaged(self, known: Experience, paths: Trajectories, advantages: Tensor) -> Experience:
        """With advantages [P], as one for each of the M tokens."""
        weights = path_weights(self, paths, known.is_learned)
        return replace(known, advantages=paths.mean(advantages, weights))

    def _less_baseline(
        self, rollout: Rollout, known: Experience, paths: Trajectories
    ) -> Experience:
        assert rollout.rewards is not None
        returns = self.ops.discounted_returns(
            paths.along(rollout.rewards), gamma=self.config.gamma, cu_seqlens=paths.cu_seqlens
        )
        if self.config.baseline == "rloo":
            baseline, is_known = leave_one_out(returns, paths, paths.along(rollout.loss_mask))
            # A path on which there is nothing to compare with teaches nothing.
            known = replace(known, is_learned=known.is_learned & paths.any(is_known))
            return self._averaged(known, paths, (returns - baseline).masked_fill(~is_known, 0))
        if self.config.baseline == "running_mean":
            used = paths.over(paths.whole(rollout.loss_mask))
            returns = returns - self._running_mean(returns, paths.cu_seqlens, used)
        return self._averaged(known, paths, returns)

    def policy_losses(
        self, logprobs: Tensor, known: Experience, cu_seqlens: Tensor | None
    ) -> Tensor:
        config, ops, weights = self.config, self.ops, known.weights
        rest: dict[str, Any] = {"loss_mask": known.is_learned, "reduction": "none"}
        if config.loss == "policy_gradient":
            return ops.policy_gradient_loss(logprobs, known.advantages, weights=weights, **rest)
        if config.loss == "cispo":
            ratio = (logprobs.detach() - known.old_logprobs).exp()
            ratio = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
            weights = ratio if weights is None else ratio * weights
            return ops.policy_gradient_loss(logprobs, known.advantages, weights=weights, **rest)
        return ops.ppo_loss(
            logprobs,
            known.old_logprobs,
            known.advantages,
            clip_low=config.clip_low,
            clip_high=config.clip_high,
            dual_clip=config.dual_clip,
            level="token" if self.is_per_token else "sequence",
            weights=weights,
            cu_seqlens=cu_seqlens,
            **rest,
        )

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"baseline": self._running_mean.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._running_mean.load_state_dict(state["baseline"])
