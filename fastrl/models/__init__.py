"""Language models for the trainers, and the value head."""

from typing import Any

from torch import nn

from fastrl.models.actor_critic import ActorCritic
from fastrl.models.hugging_face import HuggingFacePolicy
from fastrl.models.lstm import LSTMLanguageModel
from fastrl.models.protocol import Decoder, Head, PolicyModel
from fastrl.models.storage import as_policy, load_model, reference_policy, save_model

__all__ = [
    "ActorCritic",
    "Decoder",
    "Head",
    "HuggingFacePolicy",
    "LSTMLanguageModel",
    "PolicyModel",
    "as_policy",
    "load_model",
    "model_from_config",
    "reference_policy",
    "save_model",
]


def model_from_config(config: dict[str, Any]) -> nn.Module:
    """Build a model of our own, freshly initialised, from what its `.config` gave.

    Models of transformers come back with their weights: `load_model`, `as_policy`.

    Raises:
        ValueError: `model_type` is missing or not one of ours, or an argument does not fit it.
    """
    arguments = dict(config)
    model_type = arguments.pop("model_type", None)
    try:
        if model_type == "lstm":
            return LSTMLanguageModel(**arguments)
        if model_type == "actor_critic":
            actor, critic = arguments.pop("language_model"), arguments.pop("critic", None)
            critic = None if critic is None else model_from_config(critic)
            return ActorCritic(model_from_config(actor), critic, **arguments)
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"model_from_config: expected config to hold the arguments of {model_type}, got "
            f"{config}. Pass a model's .config unchanged."
        ) from error
    raise ValueError(
        'model_from_config: expected config["model_type"] "lstm" or "actor_critic", got '
        f"{model_type!r}. Pass a model's .config unchanged."
    )
