"""Checkpoints: a folder of safetensors and JSON that appears whole or not at all.

model.safetensors      the weights            config.json      what `model_from_config` takes
reference.safetensors  the starting model     trainer.json     step, config, size of the dataset
trainer.safetensors    optimizer moments, baseline, torch's random state
"""

import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastrl.models import model_from_config

if TYPE_CHECKING:
    from fastrl.trainers.trainer import Trainer

_FORMAT = "fastrl checkpoint 1"
_DOCUMENTS = ("config.json", "trainer.json")
_TENSORS = ("model.safetensors", "reference.safetensors", "trainer.safetensors")
_SLOTS = ("step", "exp_avg", "exp_avg_sq")  # of AdamW, for each weight
# A resumed run may change these; the others make it another run.
_FREE_FIELDS = ("max_steps", "max_bad_steps", "output_dir", "save_every")


def save(trainer: "Trainer", folder: Path) -> None:
    """Write a checkpoint beside `folder`, then put it in its place.

    Raises:
        ValueError: folder is there and not a checkpoint.
        ImportError: safetensors is not installed.
    """
    save_file = _safetensors().torch.save_file
    partial, previous = _beside(folder, "partial"), _beside(folder, "previous")
    _recover(folder, previous)
    if folder.exists() and not _is_checkpoint(folder):
        raise ValueError(
            f"save: expected {folder} to be a checkpoint or not to exist, got something else. "
            "Choose another folder."
        )
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        documents = (trainer.model.config, _description(trainer))
        for name, document in zip(_DOCUMENTS, documents, strict=True):
            (partial / name).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
        states = (trainer.model.state_dict(), trainer.reference.state_dict(), _state(trainer))
        for name, tensors in zip(_TENSORS, states, strict=True):
            # A copy each: weights may share memory, which the format does not know.
            copies = {k: v.detach().to("cpu", copy=True).contiguous() for k, v in tensors.items()}
            save_file(copies, partial / name, metadata={"format": "pt"})
            # safetensors makes its files readable for their owner alone.
            (partial / name).chmod((partial / "config.json").stat().st_mode)
        for name in (*_DOCUMENTS, *_TENSORS, "."):
            _sync(partial / name)
        if folder.exists():
            folder.rename(previous)
        partial.rename(folder)
        _sync(folder.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        _recover(folder, previous)
        raise
    shutil.rmtree(previous, ignore_errors=True)


def resume(trainer: "Trainer", folder: Path) -> None:
    """Check everything in a checkpoint against the trainer, then take it over.

    Raises:
        ValueError: it is not a checkpoint, cut short, or another run's; nothing was changed.
    """
    description = _read_json(folder / "trainer.json")
    config = _read_json(folder / "config.json")
    model, reference, state = (_read_tensors(folder / name) for name in _TENSORS)
    _check_description(trainer, description, config, folder)
    _check_tensors(trainer.model.state_dict(), model, folder / _TENSORS[0])
    _check_tensors(trainer.reference.state_dict(), reference, folder / _TENSORS[1])
    moments = _moments(trainer, state, folder / _TENSORS[2])
    own = {**trainer.state_tensors(), **_random_state(trainer)}
    _check_tensors(own, {k: v for k, v in state.items() if k in own}, folder / _TENSORS[2])

    trainer.model.load_state_dict(model)
    trainer.reference.load_state_dict(reference)
    groups = trainer.optimizer.state_dict()["param_groups"]
    trainer.optimizer.load_state_dict({"state": moments, "param_groups": groups})
    for name, tensor in trainer.state_tensors().items():
        tensor.copy_(state[name])
    for name in ("step", "bad_steps", "skipped_updates"):
        setattr(trainer, name, description[name])
    torch.set_rng_state(state["random.cpu"])
    if trainer.device.type == "cuda":
        torch.cuda.set_rng_state(state["random.cuda"], trainer.device)


def load_model(folder: str | Path) -> nn.Module:
    """Build the model of a checkpoint, with its weights, on the CPU.

    Raises:
        ValueError: not a checkpoint, or cut short.
    """
    folder = Path(folder)
    model = model_from_config(_read_json(folder / "config.json"))
    tensors = _read_tensors(folder / _TENSORS[0])
    _check_tensors(model.state_dict(), tensors, folder / _TENSORS[0])
    model.load_state_dict(tensors)
    return model


def check_unused(folder: Path) -> None:
    """Raise a ValueError where a run's checkpoint already stands."""
    if folder.exists() or _beside(folder, "previous").exists():
        raise ValueError(
            f"train: expected output_dir without a checkpoint, got {folder}. Resume from it, or "
            "choose another output_dir."
        )


def optimizer_tensors(trainer: "Trainer") -> dict[str, Tensor]:
    """AdamW's moments by the names of the weights."""
    names = [name for name, _ in trainer.model.named_parameters()]
    state = trainer.optimizer.state_dict()["state"]
    return {
        f"optimizer.{name}.{slot}": state[index][slot]
        for index, name in enumerate(names)
        if index in state
        for slot in _SLOTS
    }


def _state(trainer: "Trainer") -> dict[str, Tensor]:
    return {**optimizer_tensors(trainer), **trainer.state_tensors(), **_random_state(trainer)}


def _random_state(trainer: "Trainer") -> dict[str, Tensor]:
    """torch's generators. We draw nothing from them, but a reward function may."""
    state = {"random.cpu": torch.get_rng_state()}
    if trainer.device.type == "cuda":
        state["random.cuda"] = torch.cuda.get_rng_state(trainer.device)
    return state


def _description(trainer: "Trainer") -> dict[str, Any]:
    return {
        "format": _FORMAT,
        "trainer": type(trainer).__name__,
        "step": trainer.step,
        "bad_steps": trainer.bad_steps,
        "skipped_updates": trainer.skipped_updates,
        "dataset_size": len(trainer.dataset),
        "config": trainer.config.to_dict(),
    }


def _check_description(
    trainer: "Trainer", description: dict[str, Any], config: dict[str, Any], folder: Path
) -> None:
    """Compare what the checkpoint says of its run with what the trainer says of its own."""
    own = _description(trainer)
    if description.get("format") != _FORMAT or own.keys() - description.keys():
        raise ValueError(
            f"resume: expected {folder / 'trainer.json'} of format {_FORMAT!r}, got "
            f"{description.get('format')!r}. Resume from another checkpoint."
        )
    pairs = {
        "trainer": (description["trainer"], own["trainer"]),
        "model": (config, trainer.model.config),
        "dataset size": (description["dataset_size"], own["dataset_size"]),
    }
    for name, value in own["config"].items():
        if name not in _FREE_FIELDS:
            pairs[f"config {name}"] = (description["config"].get(name), value)
    for name, (saved, current) in pairs.items():
        if saved != current:
            raise ValueError(
                f"resume: expected {name} {saved!r} as in {folder}, got {current!r}. "
                f"Give the trainer the same {name}, or start a new run."
            )


def _check_tensors(expected: dict[str, Tensor], got: dict[str, Tensor], path: Path) -> None:
    for name in sorted(expected.keys() | got.keys()):
        wanted, found = (
            f"{tensors[name].dtype} {tuple(tensors[name].shape)}" if name in tensors else "nothing"
            for tensors in (expected, got)
        )
        if wanted != found:
            raise ValueError(
                f"resume: expected {name} {wanted} in {path}, got {found}. "
                "Build the model that the checkpoint was written from."
            )


def _moments(
    trainer: "Trainer", state: dict[str, Tensor], path: Path
) -> dict[int, dict[str, Tensor]]:
    """AdamW's state by the number of the weight; a weight without a gradient so far has none."""
    moments = {}
    for index, (name, weight) in enumerate(trainer.model.named_parameters()):
        prefix = f"optimizer.{name}."
        found = {slot: state[prefix + slot] for slot in _SLOTS if prefix + slot in state}
        if found:
            shapes = {"step": torch.zeros(()), "exp_avg": weight, "exp_avg_sq": weight}
            _check_tensors(shapes, found, path)
            moments[index] = {slot: tensor.clone() for slot, tensor in found.items()}
    return moments


def _read_json(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(_unreadable(path, error)) from error
    if not isinstance(document, dict):
        raise ValueError(_unreadable(path, f"a {type(document).__name__}"))
    return document


def _read_tensors(path: Path) -> dict[str, Tensor]:
    safetensors = _safetensors()
    try:
        return safetensors.torch.load_file(path)
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        raise ValueError(_unreadable(path, error)) from error


def _unreadable(path: Path, why: object) -> str:
    previous = _beside(path.parent, "previous")
    if previous.exists() and not path.parent.exists():
        remedy = f"A save was interrupted: rename {previous} to {path.parent}."
    else:
        remedy = "Resume from another checkpoint."
    return f"resume: expected {path} of a complete checkpoint, got {why}. {remedy}"


def _safetensors() -> Any:
    try:
        import safetensors
        import safetensors.torch
    except ImportError as error:
        raise ImportError(
            'Checkpoints need safetensors. Install it with: pip install "fastrl[train]"'
        ) from error
    return safetensors


def _is_checkpoint(folder: Path) -> bool:
    return folder.is_dir() and {path.name for path in folder.iterdir()} == {*_DOCUMENTS, *_TENSORS}


def _beside(folder: Path, suffix: str) -> Path:
    return folder.with_name(f".{folder.name}.{suffix}")


def _recover(folder: Path, previous: Path) -> None:
    """Undo the first half of a replacement that was interrupted between its two renames."""
    if previous.exists() and not folder.exists():
        previous.rename(folder)
    shutil.rmtree(previous, ignore_errors=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
