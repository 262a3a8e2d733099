"""A training part as one file: its weights, the best so far, the optimizer, where it stands."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save
from torch import Tensor, nn

from fastrl.cli.training.run_folder import RunFolderError, write_atomically

Tensors = dict[str, Tensor]


def save_progress(
    path: Path,
    model: nn.Module,
    best: Tensors,
    optimizer: torch.optim.Optimizer,
    progress: dict[str, Any],
) -> None:
    """One file, so that it is whole or not there.

    Args:
        best: weights of the model.
        progress: what JSON can say.
    """
    tensors = {f"model.{name}": t for name, t in model.state_dict().items()}
    tensors |= {f"best.{name}": t for name, t in best.items()}
    for index, slots in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{slot}": t for slot, t in slots.items()}
    # A copy each: weights may share memory, which the format does not know.
    copies = {k: t.detach().to("cpu", copy=True).contiguous() for k, t in tensors.items()}
    path.parent.mkdir(exist_ok=True)
    write_atomically(path, save(copies, {"progress": json.dumps(progress)}))


def load_progress(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, part: str
) -> tuple[Tensors, dict[str, Any]]:
    """Give model and optimizer what `save_progress` wrote; returns best and progress.

    Args:
        part: what is repeated without the file, for the message.
    Raises:
        RunFolderError: it is damaged or of another model; nothing was changed.
    """
    own = model.state_dict()
    try:
        tensors = load(path.read_bytes())
        with safe_open(path, framework="pt") as file:
            progress = json.loads(file.metadata()["progress"])
        slots: dict[int, Tensors] = {}
        for name, tensor in _part(tensors, "optimizer").items():
            index, slot = name.split(".")
            slots.setdefault(int(index), {})[slot] = tensor
        weights, best = _part(tensors, "model"), _part(tensors, "best")
        shapes = {name: tensor.shape for name, tensor in own.items()}
        if any({n: t.shape for n, t in each.items()} != shapes for each in (weights, best)):
            raise ValueError("weights of another model")
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise RunFolderError(
            f"train: expected {path} to be a complete checkpoint, got {error}. Delete the "
            f"file to repeat {part}, and resume again."
        ) from error
    groups = optimizer.state_dict()["param_groups"]
    model.load_state_dict(weights)
    optimizer.load_state_dict({"state": slots, "param_groups": groups})
    return {name: tensor.to(own[name].device) for name, tensor in best.items()}, progress


def _part(tensors: Tensors, name: str) -> Tensors:
    prefix = name + "."
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
