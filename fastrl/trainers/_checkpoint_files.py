"""What a checkpoint's folder consists of, and what stands in its trainer.json."""

import json
import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastrl.trainers import _tree
from fastrl.trainers.health import weighs_importance

if TYPE_CHECKING:
    from fastrl.trainers.trainer import Trainer

FORMAT = "fastrl checkpoint 2"
DESCRIPTION = "trainer.json"
STATE, STATE_TENSORS = "state.json", "state.safetensors"
REFERENCE = "reference.safetensors"
PROMPTS = "prompts_digest"  # versions before had none
# A resumed run may change these; the others make it another run.
FREE_FIELDS = (
    "max_steps", "max_bad_steps", "output_dir", "save_every",
    "learning_rate", "micro_batch_tokens", "max_rows", "gradient_checkpointing",
)  # fmt: skip
# Where a model came from, and what transformers notes in its config only when it saves it.
_NOT_THE_MODEL = (
    "_name_or_path", "base_model_name_or_path", "transformers_version", "peft_version",
    "architectures", "dtype",
)  # fmt: skip


class CheckpointError(OSError):
    """A checkpoint could not be written; the last one stands, and so does the run in memory."""


def beside(folder: Path, suffix: str) -> Path:
    folder = folder if folder.name not in ("", "..") else folder.resolve()  # "." has no name
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
        PROMPTS: trainer.dataset.digest,
        "config": config,
        "model": trainer.model.config,
    }


def check_description(trainer: "Trainer", description: dict[str, Any], folder: Path) -> None:
    """Raise a ValueError where a checkpoint is of another format or another run."""
    own = json.loads(json.dumps(describe(trainer)))
    if description.get("format") != FORMAT or {*own, "files"} - {PROMPTS, *description}:
        raise ValueError(
            f"resume: expected {folder / DESCRIPTION} of format {FORMAT!r}, got "
            f"{description.get('format')!r}. Resume from another checkpoint."
        )
    # Versions before took any value where nothing reads the field.
    free = {*FREE_FIELDS, *trainer.config.unread}
    free |= set() if weighs_importance(trainer) else {"importance_cap"}
    saved, current = (
        {
            "trainer": of["trainer"],
            **_leaves(of["model"], "model"),
            "dataset size": of["dataset_size"],
            **{f"config {k}": v for k, v in of["config"].items() if k not in free},
        }
        for of in (description, own)
    )
    for name in (*current, *(saved.keys() - current.keys())):
        if saved.get(name) != current.get(name):
            raise ValueError(
                f"resume: expected {name} {saved.get(name)!r} as in {folder}, got "
                f"{current.get(name)!r}. Give the trainer the same {name}, or start a new run."
            )
    if description.get(PROMPTS, own[PROMPTS]) != own[PROMPTS]:
        warnings.warn(
            f"resume: expected the prompts that the run in {folder} was trained on, got others. "
            "The run goes on with these; it is not the run that it would have been.",
            RuntimeWarning,
            stacklevel=4,  # where `Trainer.resume` was called
        )


def check_files(description: dict[str, Any], folder: Path) -> None:
    """Raise a ValueError where a file is missing or not as long as it was written."""
    found = files_of(folder)
    for name, size in description.get("files", {}).items():
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


def _leaves(config: Any, path: str) -> dict[str, Any]:
    """What a model's config says, by the path to it."""
    if not isinstance(config, dict):
        return {path: config}
    parts = [_leaves(v, f"{path} {k}") for k, v in config.items() if k not in _NOT_THE_MODEL]
    return {key: value for part in parts for key, value in part.items()}


def _read(path: Path) -> dict[str, Any]:
    document = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(document, dict):
        raise ValueError(f"a {type(document).__name__}")
    return document
