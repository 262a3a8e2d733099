"""Trainers: policy gradient and actor-critic with immediate rewards."""

from fastrl.trainers._attachments import StopTraining
from fastrl.trainers._exchange import ProcessFailedError
from fastrl.trainers.actor_critic import ActorCriticTrainer
from fastrl.trainers.checkpoint import CheckpointError, load_model
from fastrl.trainers.config import ActorCriticConfig, PolicyGradientConfig
from fastrl.trainers.health import TrainingDivergedError
from fastrl.trainers.policy_gradient import PolicyGradientTrainer
from fastrl.trainers.scoring import RewardFunctionError

__all__ = [
    "ActorCriticConfig",
    "ActorCriticTrainer",
    "CheckpointError",
    "PolicyGradientConfig",
    "PolicyGradientTrainer",
    "ProcessFailedError",
    "RewardFunctionError",
    "StopTraining",
    "TrainingDivergedError",
    "load_model",
]
