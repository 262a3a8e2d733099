"""Taking over a checkpoint: everything is checked before anything is changed."""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastrl.trainers import _tree
from fastrl.trainers._checkpoint_files import (
    DESCRIPTION,
    REFERENCE,
    STATE,
    STATE_TENSORS,
    check_description,
    check_files,
    read_json,
    standing,
    unreadable,
)
from fastrl.trainers._random_state import check_random_state, random_state, set_random_state
from fastrl.trainers._tensor_file import TensorFile

if TYPE_CHECKING:
    from fastrl.trainers.trainer import Trainer

_SLOTS = ("step", "exp_avg", "exp_avg_sq")  # of AdamW, for each weight


def resume(trainer: "Trainer", folder: Path) -> None:
    """Check everything in the last complete checkpoint at `folder`, then take it over.

    Raises:
        ValueError: it is not a checkpoint, cut short, or another run's; nothing was changed.
        ImportError: safetensors is not installed.
    """
    folder = standing(folder)
    description = read_json(folder / DESCRIPTION)
    check_description(trainer, description, folder)
    check_files(description, folder)
    weights = _opened(folder / "model.safetensors")
    model = trainer.model.state_dict()
    _check_tensors(model, _kinds(weights), folder / "model.safetensors")
    reference = reference_tensors(trainer)
    reference_file = _opened(folder / REFERENCE) if reference else None
    if reference_file is not None:
        _check_tensors(reference, _kinds(reference_file), folder / REFERENCE)
    state = _state(trainer, folder)

    _load_state(trainer, state["trainer"], folder)  # the trainer's own checks are in here
    _copy(weights, model)
    if reference_file is not None:
        _copy(reference_file, reference)
    _load_optimizer(trainer, state["optimizer"])
    trainer.scheduler.load_state_dict(state["scheduler"])
    set_random_state(state["random"])


def state_tree(trainer: "Trainer") -> dict[str, Any]:
    """All that a checkpoint holds beside the weights; its tensors are the trainer's own."""
    groups = trainer.optimizer.param_groups
    lists = zip(groups, _trained_names(trainer), strict=True)
    return {
        "trainer": trainer.state_dict(),
        "optimizer": {
            "groups": [{"weights": names, "lr": float(group["lr"])} for group, names in lists],
            "moments": moments(trainer),
        },
        "scheduler": trainer.scheduler.state_dict(),
        "random": random_state(),
    }


def moments(trainer: "Trainer") -> dict[str, dict[str, Tensor]]:
    """AdamW's state by the names of the trained weights; one without a gradient so far has none."""
    state = trainer.optimizer.state
    return {
        name: {slot: state[weight][slot] for slot in _SLOTS}
        for group, names in zip(
            trainer.optimizer.param_groups, _trained_names(trainer), strict=True
        )
        for name, weight in zip(names, group["params"], strict=True)
        if weight in state
    }


def reference_tensors(trainer: "Trainer") -> dict[str, Tensor]:
    """The reference's own weights: none where it is the model with its adapter off, or None."""
    if not isinstance(trainer.reference, nn.Module):
        return {}
    places = {tensor.data_ptr() for tensor in trainer.model.state_dict().values()}
    return {
        name: tensor
        for name, tensor in trainer.reference.state_dict().items()
        if tensor.data_ptr() not in places
    }


def _trained_names(trainer: "Trainer") -> list[list[str]]:
    """The names of each parameter group's weights."""
    names = {weight: name for name, weight in trainer.model.named_parameters()}
    return [[names[weight] for weight in g["params"]] for g in trainer.optimizer.param_groups]


def _state(trainer: "Trainer", folder: Path) -> dict[str, Any]:
    """The tree of `state_tree`, as far as it can be checked from outside the trainer."""
    document, tensors = read_json(folder / STATE), _opened(folder / STATE_TENSORS)
    try:
        state = _tree.unflatten(document, tensors.read)
        check_random_state(state["random"])
        groups, found = state["optimizer"]["groups"], state["optimizer"]["moments"]
        saved, own = [group["weights"] for group in groups], _trained_names(trainer)
        state["trainer"], state["scheduler"]
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise unreadable(folder / STATE, f"{type(error).__name__}: {error}") from error
    if saved != own:
        raise ValueError(
            f"resume: expected {_summary(saved)} to be trained as in {folder}, got "
            f"{_summary(own)}. Freeze and adapt the model as it was then."
        )
    weights = dict(trainer.model.named_parameters())
    for name, slots in found.items():
        like = {slot: weights[name] for slot in _SLOTS} | {"step": torch.zeros(())}
        kinds = {slot: (tensor.dtype, tuple(tensor.shape)) for slot, tensor in slots.items()}
        _check_tensors(like, kinds, folder / STATE, f"optimizer {name} ")
    return state


def _load_state(trainer: "Trainer", state: dict[str, Any], folder: Path) -> None:
    before = copy.deepcopy(trainer.state_dict())
    try:
        trainer.load_state_dict(state)
    except Exception as error:
        trainer.load_state_dict(before)
        raise ValueError(
            f"resume: expected the state in {folder / STATE} to fit the trainer, got "
            f"{type(error).__name__}: {error}. Give the trainer the same reward functions, or "
            "start a new run."
        ) from error


def _load_optimizer(trainer: "Trainer", state: dict[str, Any]) -> None:
    optimizer = trainer.optimizer
    names = [name for group in _trained_names(trainer) for name in group]
    saved = state["moments"]
    by_index = {index: saved[name] for index, name in enumerate(names) if name in saved}
    groups = optimizer.state_dict()["param_groups"]
    for group, saved_group in zip(groups, state["groups"], strict=True):
        group["lr"] = saved_group["lr"]
    optimizer.load_state_dict({"state": by_index, "param_groups": groups})


def _opened(path: Path) -> TensorFile:
    try:
        return TensorFile(path)
    except (OSError, ValueError) as error:
        raise unreadable(path, error) from error


def _kinds(file: TensorFile) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    return {name: file.kind(name) for name in file.names}


@torch.no_grad()
def _copy(file: TensorFile, tensors: dict[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        tensor.copy_(file.read(name))


def _check_tensors(
    expected: Mapping[str, Tensor],
    got: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    path: Path,
    prefix: str = "",
) -> None:
    wanted_kinds = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in expected.items()}
    for name in sorted(expected.keys() | got.keys()):
        wanted, found = (
            f"{kinds[name][0]} {kinds[name][1]}" if name in kinds else "nothing"
            for kinds in (wanted_kinds, got)
        )
        if wanted != found:
            raise ValueError(
                f"resume: expected {prefix}{name} {wanted} in {path}, got {found}. "
                "Build the model that the checkpoint was written from."
            )


def _summary(groups: list[list[str]]) -> str:
    names = [name for group in groups for name in group]
    return f"{len(names)} weights in {len(groups)} groups, {', '.join(names[:3])}, ..."
