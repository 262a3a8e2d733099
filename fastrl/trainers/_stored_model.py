"""Stands in for fastrl.models.storage."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastrl.models import model_from_config
from fastrl.trainers._checkpoint_files import read_json, unreadable, write_json
from fastrl.trainers._tensor_file import TensorFile, write_tensors


def save_model(model: Any, folder: Path) -> None:
    write_json(folder / "config.json", model.config)
    write_tensors(folder / "model.safetensors", model.state_dict())


@torch.no_grad()
def load_model(folder: Path) -> nn.Module:
    model = model_from_config(read_json(folder / "config.json"))
    path = folder / "model.safetensors"
    try:
        file = TensorFile(path)
    except (OSError, ValueError) as error:
        raise unreadable(path, error) from error
    own = model.state_dict()
    for name, kind in file.kinds().items():
        if (own[name].dtype, tuple(own[name].shape)) != kind:
            raise ValueError(name)
        own[name].copy_(file.read(name))
    return model
