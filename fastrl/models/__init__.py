"""Language models for the trainers, and the value head."""

from typing import Any

from torch import nn

from fastrl.models.actor_critic import ActorCritic
from fastrl.models.lstm import LSTMLanguageModel
from fastrl.models.protocol import Decoder, Head, PolicyModel
from fastrl.models.storage import as_policy, reference_policy

__all__ = [
    "ActorCritic",
    "Decoder",
    "Head",
    "LSTMLanguageModel",
    "PolicyModel",
    "as_policy",
    "model_from_config",
    "reference_policy",
]


def model_from_config(config: dict[str, Any]) -> nn.Module:
    """Build a model, freshly initialised, from what its `.config` gave.

    Raises:
        ValueError: `model_type` is missing or not one of ours, or an argument does not fit it.
    """
    arguments = dict(config)
    model_type = arguments.pop("model_type", None)
    try:
        if model_type == "lstm":
            return LSTMLanguageModel(**arguments)
        if model_type == "actor_critic":
            return ActorCritic(model_from_config(arguments.pop("language_model")), **arguments)
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"model_from_config: expected config to hold the arguments of {model_type}, got "
            f"{config}. Pass a model's .config unchanged."
        ) from error
    raise ValueError(
        'model_from_config: expected config["model_type"] "lstm" or "actor_critic", got '
        f"{model_type!r}. Pass a model's .config unchanged."
    )
