"""Taking over a checkpoint: everything is checked before anything is changed."""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastrl.models.storage import load_model
from fastrl.models.tensor_file import TensorFile, first_difference, kinds
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
from fastrl.trainers._digest import digest
from fastrl.trainers._random_state import (
    check_random_state,
    keeping_random_state,
    set_random_state,
)

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
    state = _state(trainer, folder)
    model, reference = beside_frozen(trainer), reference_tensors(trainer)
    if model:
        weights, where = state["weights"], folder / STATE_TENSORS
    else:
        model, where = trainer.model.state_dict(), folder
        with keeping_random_state():  # a new model draws its first weights
            weights = load_model(folder).state_dict()
    _check_tensors(model, kinds(weights), where)
    _check_frozen(trainer, state.get("frozen", {}), folder)
    _check_moments(trainer, state["optimizer"]["moments"], folder / STATE)
    reference_file = _opened(folder / REFERENCE) if reference else None
    if reference_file is not None:
        _check_tensors(reference, reference_file.kinds(), folder / REFERENCE)

    with _or_as_before(trainer):
        _load_state(trainer, state["trainer"], folder)  # the trainer's own checks are in here
        trainer.processes.check_equal("checkpoint", description)
    _copy(weights.__getitem__, model)
    if reference_file is not None:
        _copy(reference_file.read, reference)
    _load_optimizer(trainer, state["optimizer"]["moments"])
    own = [state["random"], *state.get("random_of_others", [])]
    set_random_state(own[trainer.processes.rank % len(own)])


def state_tree(
    trainer: "Trainer", states: list[dict[str, Any]], moments: dict[str, dict[str, Tensor]]
) -> dict[str, Any]:
    """What a checkpoint holds beside model and reference; its tensors are the trainer's own.

    Args:
        states: of the random number generators, in each process.
        moments: of the optimizers of all processes.
    """
    return {
        "trainer": trainer.state_dict(),
        "weights": beside_frozen(trainer),
        "frozen": trainer.frozen_weights,
        "optimizer": {"trained": trained_names(trainer), "moments": moments},
        "random": states[0],
        **({"random_of_others": states[1:]} if len(states) > 1 else {}),
    }


def own_moments(trainer: "Trainer") -> dict[str, dict[str, Tensor]]:
    """AdamW's state by the names of the weights whose moments this process keeps; one without a
    gradient so far has none."""
    state = trainer.optimizer.state
    return {
        name: {slot: state[weight][slot] for slot in _SLOTS}
        for name, weight in trainer.model.named_parameters()
        if weight in state
    }


def beside_frozen(trainer: "Trainer") -> dict[str, Tensor]:
    """Where weights are frozen, as below an adapter, those that are not; else nothing.

    The model's own folder need not hold the frozen ones, and to resume, only these are needed.
    """
    frozen = {
        n for n, w in trainer.model.named_parameters(remove_duplicate=False) if not w.requires_grad
    }
    tensors = trainer.model.state_dict() if frozen else {}
    return {name: tensor for name, tensor in tensors.items() if name not in frozen}


def frozen_weights(model: nn.Module) -> dict[str, str]:
    """What tells one frozen weight from another: dtype, shape and a digest of its bits."""
    return {
        name: f"{weight.dtype} {tuple(weight.shape)} with digest {digest(weight):016x}"
        for name, weight in model.named_parameters()
        if not weight.requires_grad
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


def trained_names(trainer: "Trainer") -> list[str]:
    """In the order of the parameters."""
    return _names_of(trainer, trainer.parameters)


def _names_of(trainer: "Trainer", weights: list[nn.Parameter]) -> list[str]:
    names = {weight: name for name, weight in trainer.model.named_parameters()}
    return [names[weight] for weight in weights]


def _state(trainer: "Trainer", folder: Path) -> dict[str, Any]:
    """The tree of `state_tree`, as far as it can be checked from outside the trainer."""
    document, tensors = read_json(folder / STATE), _opened(folder / STATE_TENSORS)
    try:
        state = _tree.unflatten(document, tensors.read)
        for of_process in (state["random"], *state.get("random_of_others", [])):
            check_random_state(of_process)
        saved = state["optimizer"]["trained"]
        state["optimizer"]["moments"], state["trainer"], state["weights"]  # are there
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise unreadable(folder / STATE, f"{type(error).__name__}: {error}") from error
    own = trained_names(trainer)
    if saved != own:
        raise ValueError(
            f"resume: expected {_summary(saved)} to be trained as in {folder}, got "
            f"{_summary(own)}. Freeze and adapt the model as it was then."
        )
    return state


def _check_moments(trainer: "Trainer", found: dict[str, dict[str, Tensor]], path: Path) -> None:
    weights = dict(trainer.model.named_parameters())
    for name, slots in found.items():
        like = {slot: weights[name] for slot in _SLOTS} | {"step": torch.zeros(())}
        _check_tensors(like, kinds(slots), path, f"optimizer {name} ")


def _check_frozen(trainer: "Trainer", saved: dict[str, str], folder: Path) -> None:
    """Raise a ValueError where other weights than before lie below those that are trained.

    A checkpoint of a version that kept no digests has none to compare.
    """
    own = trainer.frozen_weights if saved else {}
    for name in sorted(own.keys() | saved.keys()):
        if own.get(name) != saved.get(name):
            raise ValueError(
                f"resume: expected the frozen weight {name} to be {saved.get(name)} as in {folder}"
                f", got {own.get(name)}. Load the model that the run was trained on."
            )


@contextmanager
def _or_as_before(trainer: "Trainer") -> Iterator[None]:
    """What the trainer remembers, where this fails in one of its processes."""
    before = copy.deepcopy(trainer.state_dict())
    try:
        yield
    except Exception:
        trainer.load_state_dict(before)
        raise


def _load_state(trainer: "Trainer", state: dict[str, Any], folder: Path) -> None:
    try:
        trainer.load_state_dict(state)
    except Exception as error:
        raise ValueError(
            f"resume: expected the state in {folder / STATE} to fit the trainer, got "
            f"{type(error).__name__}: {error}. Give the trainer the same reward functions, or "
            "start a new run."
        ) from error


def _load_optimizer(trainer: "Trainer", saved: dict[str, dict[str, Tensor]]) -> None:
    names = _names_of(trainer, trainer.optimizer.param_groups[0]["params"])
    state = {index: saved[name] for index, name in enumerate(names) if name in saved}
    groups = trainer.optimizer.state_dict()["param_groups"]
    trainer.optimizer.load_state_dict({"state": state, "param_groups": groups})


def _opened(path: Path) -> TensorFile:
    try:
        return TensorFile(path)
    except (OSError, ValueError) as error:
        raise unreadable(path, error) from error


@torch.no_grad()
def _copy(read: Callable[[str], Tensor], tensors: dict[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        tensor.copy_(read(name))


def _check_tensors(
    own: Mapping[str, Tensor], got: dict[str, str], path: Path, prefix: str = ""
) -> None:
    if difference := first_difference(kinds(own), got):
        name, wanted, found = difference
        raise ValueError(
            f"resume: expected {prefix}{name} {wanted} in {path}, got {found}. "
            "Build the model that the checkpoint was written from."
        )


def _summary(names: list[str]) -> str:
    return f"{len(names)} weights ({', '.join(names[:2])}, ...)"
