"""Models in folders, and policies from what people have.

config.json, model.safetensors   the language model: our own, or as transformers saves it
adapter_config.json, adapter_*   of a PEFT adapter; without the two above where it names its model
value_head.safetensors           of an ActorCritic
critic/                          its separate critic, a folder of the same kind
"""

import shutil
from pathlib import Path

from torch import nn

from fastrl.models._policies import (
    as_policy,
    check_saveable,
    load_policy,
    load_tensors,
    save_policy,
)
from fastrl.models._reference import reference_policy
from fastrl.models.actor_critic import ActorCritic
from fastrl.models.tensor_file import write_tensors

__all__ = ["as_policy", "check_saveable", "load_model", "reference_policy", "save_model"]

_VALUE_HEAD, _CRITIC = "value_head.safetensors", "critic"


def save_model(model: nn.Module, folder: str | Path) -> None:
    """Write a model, for `load_model`; a model of transformers also for its from_pretrained.

    Of a PEFT adapter, what it was put on is saved with it only where it has no name to load it by.
    The tokenizer is not the model's.

    Args:
        model: an LSTMLanguageModel, a HuggingFacePolicy, or an ActorCritic of these.
        folder: is made, or written over.
    Raises:
        TypeError: another model.
        ValueError: several PEFT adapters.
    """
    folder = Path(folder)
    is_actor_critic = isinstance(model, ActorCritic)
    save_policy(model.language_model if is_actor_critic else model, folder)
    (folder / _VALUE_HEAD).unlink(missing_ok=True)
    shutil.rmtree(folder / _CRITIC, ignore_errors=True)
    if isinstance(model, ActorCritic):
        write_tensors(folder / _VALUE_HEAD, model.value_head.state_dict())
        if model.critic is not None:
            save_policy(model.critic, folder / _CRITIC)


def load_model(folder: str | Path) -> nn.Module:
    """The model of a folder of `save_model`, on the CPU: policy, or ActorCritic around one.

    Raises:
        ValueError: not such a folder, or cut short.
        ImportError: safetensors is not installed.
    """
    folder = Path(folder)
    policy = load_policy(folder)
    if not (folder / _VALUE_HEAD).exists():
        return policy
    has_critic = (folder / _CRITIC).is_dir()
    model = ActorCritic(policy, load_policy(folder / _CRITIC) if has_critic else None)
    load_tensors(model.value_head, folder / _VALUE_HEAD)
    return model
