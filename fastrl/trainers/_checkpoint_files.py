"""What a checkpoint's folder consists of, and what stands in its trainer.json."""

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastrl.trainers import _tree

if TYPE_CHECKING:
    from fastrl.trainers.trainer import Trainer

FORMAT = "fastrl checkpoint 2"
DESCRIPTION = "trainer.json"
STATE, STATE_TENSORS = "state.json", "state.safetensors"
REFERENCE = "reference.safetensors"
# A resumed run may change these; the others make it another run.
FREE_FIELDS = ("max_steps", "max_bad_steps", "output_dir", "save_every")
# Where a model came from: not what it computes.
_PROVENANCE = ("_name_or_path", "base_model_name_or_path", "transformers_version", "peft_version")


class CheckpointError(OSError):
    """A checkpoint could not be written; the last one stands, and so does the run in memory."""


def beside(folder: Path, suffix: str) -> Path:
    return folder.with_name(f".{folder.name}.{suffix}")


def standing(folder: Path) -> Path:
    """Where the last complete checkpoint is: a save may have been killed between its renames."""
    previous = beside(folder, "previous")
    return previous if previous.exists() and not folder.exists() else folder


def files_of(folder: Path) -> dict[str, int]:
    """The size in bytes of each file in a folder and below, by its path in it."""
    paths = sorted(Path(root) / name for root, _, names in os.walk(folder) for name in names)
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in paths}


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder holds a checkpoint, and nothing that is not of it."""
    try:
        description = _read(folder / DESCRIPTION)
    except (OSError, ValueError):
        return False
    files = description.get("files")
    return isinstance(files, dict) and files_of(folder).keys() == {DESCRIPTION, *files}


def describe(trainer: "Trainer") -> dict[str, Any]:
    """What has to agree between a checkpoint and the trainer that resumes from it, and the step."""
    config, _ = _tree.flatten(trainer.config.to_dict())
    return {
        "format": FORMAT,
        "trainer": type(trainer).__name__,
        "step": trainer.step,
        "dataset_size": len(trainer.dataset),
        "config": config,
        "model": _without_provenance(trainer.model.config),
    }


def check_description(trainer: "Trainer", description: dict[str, Any], folder: Path) -> None:
    """Raise a ValueError where a checkpoint is of another format or another run."""
    own = json.loads(json.dumps(describe(trainer)))
    if description.get("format") != FORMAT or {*own, "files"} - description.keys():
        raise ValueError(
            f"resume: expected {folder / DESCRIPTION} of format {FORMAT!r}, got "
            f"{description.get('format')!r}. Resume from another checkpoint."
        )
    pairs = {
        "trainer": (description["trainer"], own["trainer"]),
        "model": (description["model"], own["model"]),
        "dataset size": (description["dataset_size"], own["dataset_size"]),
    }
    for name in (*own["config"], *(description["config"].keys() - own["config"].keys())):
        if name not in FREE_FIELDS:
            pairs[f"config {name}"] = (description["config"].get(name), own["config"].get(name))
    for name, (saved, current) in pairs.items():
        if saved != current:
            raise ValueError(
                f"resume: expected {name} {saved!r} as in {folder}, got {current!r}. "
                f"Give the trainer the same {name}, or start a new run."
            )


def check_files(description: dict[str, Any], folder: Path) -> None:
    """Raise a ValueError where a file is missing or not as long as it was written."""
    found = files_of(folder)
    for name, size in description["files"].items():
        if found.get(name) != size:
            got = f"{found[name]} of {size} bytes" if name in found else "nothing"
            raise unreadable(folder / name, got)


def write_json(path: Path, document: dict[str, Any]) -> None:
    text = json.dumps(document, indent=2, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """Raise a ValueError that names the file where it is not there or no JSON object."""
    try:
        return _read(path)
    except (OSError, ValueError) as error:
        raise unreadable(path, error) from error


def unreadable(path: Path, why: object) -> ValueError:
    return ValueError(
        f"resume: expected {path} of a complete checkpoint, got {why}. "
        "Resume from another checkpoint."
    )


def _without_provenance(config: Any) -> Any:
    if not isinstance(config, dict):
        return config
    return {k: _without_provenance(v) for k, v in config.items() if k not in _PROVENANCE}


def _read(path: Path) -> dict[str, Any]:
    document = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(document, dict):
        raise ValueError(f"a {type(document).__name__}")
    return document
