"""What a run is made with: fastrl's version and commit, those of what it rests on, its contents."""

import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

import fastrl
from fastrl.cli.training.run_folder import RunFolder, RunFolderError

FILE = "versions.json"


def read_starts(folder: RunFolder) -> list[dict[str, Any]]:
    """What ran, as versions.json has it; [] where it is not there.

    Raises:
        RunFolderError: the file is damaged.
    """
    path = folder.path / FILE
    starts = folder.read_json(path).get("starts") if path.exists() else []
    if not isinstance(starts, list) or not all(isinstance(start, dict) for start in starts):
        raise RunFolderError(
            f"train: expected {path} with a list of objects as starts, got {starts!r}. Restore the "
            "file, or delete it."
        )
    return starts


def note_versions(folder: RunFolder, step: int, contents: dict[str, Any]) -> None:
    """Put what runs now into versions.json, if it is not what ran last.

    Args:
        step: at which the run stands.
        contents: as `fastrl.cli.recipes.contents.contents_of` gives them.
    Raises:
        RunFolderError: the file is damaged.
    """
    path, now = folder.path / FILE, {**versions(), **contents}
    starts = read_starts(folder)
    last = {**starts[-1], "step": step} if starts else None
    if last != {"step": step, **now}:
        folder.write_json(path, {"starts": [*starts, {"step": step, **now}]})


def versions() -> dict[str, Any]:
    """By name. "commit" is None where fastrl is not run from a repository of its own."""
    from transformers import __version__ as transformers

    return {
        "fastrl": fastrl.__version__,
        "commit": commit_of(Path(fastrl.__file__)),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers,
    }


def commit_of(file: Path) -> str | None:
    """The commit that a file is of, with "+" where tracked files have been changed since.

    None without git, or where no repository tracks the file: one that an environment merely lies
    in says nothing about what is installed there.
    """

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(file.parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", file.name)
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None
