"""Checkpoints: a folder of safetensors and JSON that appears whole or not at all.

config.json, model.safetensors, ...   the model: a Hugging Face policy's folder loads in
                        `AutoModelForCausalLM`, and its tokenizer's files stand beside it
reference.safetensors   the starting model, where it has weights of its own
state.json              what the trainer remembers; the optimizer, its moments by the names of the
                        weights that are trained; digests of the frozen weights, which a resumed
                        run has to have again; the state of every random number generator, in
                        each process
state.safetensors       the tensors of state.json (see `fastrl.trainers._tree`)
trainer.json            format, trainer, step, config, model, size of the dataset, and the length
                        of each file; it is written last, when the others are on the disk

A checkpoint is written as .NAME.partial beside its place NAME; then the one that stood there is
renamed to .NAME.previous, the new one to NAME, and the former is deleted. At whatever moment the
process is killed, NAME or else .NAME.previous is complete, and reading takes the one that is
there. Only saving renames and deletes, so that a run may be read from while it trains; what a
killed save has left behind, the next one clears away.
"""

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from fastrl._disk import sync
from fastrl.models import storage
from fastrl.models.tensor_file import import_safetensors, write_tensors
from fastrl.trainers import _checkpoint_files as files
from fastrl.trainers import _tree
from fastrl.trainers._checkpoint_files import CheckpointError, beside, standing
from fastrl.trainers._random_state import random_state
from fastrl.trainers._resume import (
    own_moments,
    reference_tensors,
    resume,
    state_tree,
    trained_names,
)

if TYPE_CHECKING:
    from fastrl.trainers.trainer import Trainer

__all__ = [
    "CheckpointError",
    "check_unused",
    "exists",
    "load_model",
    "optimizer_tensors",
    "resume",
    "save",
]

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NO_PERMISSION = (errno.EACCES, errno.EPERM, errno.EROFS)
_MIB = 2**20


def save(trainer: "Trainer", folder: Path) -> None:
    """Write a checkpoint beside `folder`, then put it in its place: the first process does.

    Raises:
        ValueError: folder is there and not a checkpoint.
        TypeError: the trainer's state holds something that is neither a tensor nor JSON.
        CheckpointError: a full disk, no permission, ...; the last checkpoint stands.
        ImportError: safetensors is not installed.
    """
    processes = trainer.processes
    states = processes.told("saving", random_state())
    moments = processes.gathered_moments(own_moments(trainer), trained_names(trainer))
    processes.on_first("the checkpoint", lambda: _write(trainer, folder, states, moments))


def _write(
    trainer: "Trainer",
    folder: Path,
    states: list[dict[str, Any]],
    moments: dict[str, dict[str, Tensor]],
) -> None:
    """Args: as for `state_tree`."""
    import_safetensors()
    document, tensors = _tree.flatten(state_tree(trainer, states, moments))
    reference = reference_tensors(trainer)
    partial, previous = beside(folder, "partial"), beside(folder, "previous")
    every = (*trainer.model.state_dict().values(), *reference.values(), *tensors.values())
    size = sum(tensor.numel() * tensor.element_size() for tensor in every)
    with _explained(folder, size):
        _clear(folder, partial, previous)
        try:
            partial.mkdir(parents=True)
            _save_model(trainer, partial)
            if reference:
                write_tensors(partial / files.REFERENCE, reference)
            files.write_json(partial / files.STATE, document)
            write_tensors(partial / files.STATE_TENSORS, tensors)
            _sync_all(partial)
            description = {**files.describe(trainer), "files": files.files_of(partial)}
            files.write_json(partial / files.DESCRIPTION, description)
            sync(partial / files.DESCRIPTION)
            sync(partial)
            _replace(folder, partial, previous)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    shutil.rmtree(previous, ignore_errors=True)


def load_model(folder: str | Path) -> nn.Module:
    """Build the model of a checkpoint, with its weights, on the CPU.

    Raises:
        ValueError: not a checkpoint, or cut short.
    """
    place = standing(Path(folder))
    files.check_files(files.read_json(place / files.DESCRIPTION), place)
    return storage.load_model(place)


def exists(folder: Path) -> bool:
    """Whether there is something to resume from at `folder`."""
    return standing(folder).exists()


def check_unused(folder: Path) -> None:
    """Raise a ValueError where a run's checkpoint already stands."""
    if exists(folder):
        raise ValueError(
            f"train: expected output_dir without a checkpoint, got {folder}. Resume from it, or "
            "choose another output_dir."
        )


def optimizer_tensors(trainer: "Trainer") -> dict[str, Tensor]:
    """AdamW's moments by the names of the weights, as far as this process keeps them."""
    return {
        f"optimizer.{name}.{slot}": tensor
        for name, slots in own_moments(trainer).items()
        for slot, tensor in slots.items()
    }


def _save_model(trainer: "Trainer", folder: Path) -> None:
    storage.save_model(trainer.model, folder)
    save_tokenizer = getattr(trainer.tokenizer, "save_pretrained", None)
    if save_tokenizer is not None:
        save_tokenizer(folder)
    for path in folder.rglob("*.safetensors"):
        path.chmod(folder.stat().st_mode & 0o666)  # the library makes it its owner's alone


def _clear(folder: Path, partial: Path, previous: Path) -> None:
    """Put in order what a killed save left, and refuse to overwrite what is not a checkpoint."""
    if previous.exists() and not folder.exists():
        previous.rename(folder)
    if previous.exists():
        shutil.rmtree(previous)
    if folder.exists() and not files.is_checkpoint(folder):
        raise ValueError(
            f"save: expected {folder} to be a checkpoint or not to exist, got something else. "
            "Choose another folder."
        )
    if partial.exists():
        shutil.rmtree(partial)


def _replace(folder: Path, partial: Path, previous: Path) -> None:
    """Two renames; if one fails, the checkpoint that stood there stands there again."""
    is_moved = folder.exists()
    if is_moved:
        folder.rename(previous)
    try:
        partial.rename(folder)
        sync(folder.parent)
    except BaseException:
        if folder.exists():
            folder.rename(partial)
        if is_moved:
            previous.rename(folder)
        raise


@contextmanager
def _explained(folder: Path, size: int) -> Iterator[None]:
    """Turn what the system says into a CheckpointError that says what is lost: nothing."""
    try:
        yield
    except (OSError, import_safetensors().SafetensorError) as error:
        code = _error_code(error)
        why = os.strerror(code) if code else str(error)
        if code in _NO_ROOM:
            wanted, remedy = f"room for {size / _MIB:.1f} MiB", "Make room"
        elif code in _NO_PERMISSION:
            wanted, remedy = "permission to write", "Change its permissions"
        else:
            wanted, remedy = "to write a checkpoint", "Find out why"
        explained = CheckpointError(
            f"save: expected {wanted} in {folder.parent}, got {why}. {_what_stands(folder)} "
            f"{remedy}, and save again."
        )
        explained.errno = code
        raise explained from error


def _error_code(error: Exception) -> int | None:
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"\(os error (\d+)\)", str(error))  # all that safetensors tells
    return int(found.group(1)) if found else None


def _what_stands(folder: Path) -> str:
    try:
        path = standing(folder)
        step = files.read_json(path / files.DESCRIPTION)["step"]
    except (OSError, ValueError, KeyError):
        return "There is no earlier checkpoint that can be read."
    return f"The last checkpoint, of step {step}, stands: {path}."


def _sync_all(folder: Path) -> None:
    for root, _, names in os.walk(folder):
        for name in names:
            sync(Path(root) / name)
        sync(Path(root))
