"""Which prompts a supervised start has learned, so that no other run is measured on them."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastrl.cli.recipes.toml import RecipeError

FILE = "trained_on.json"


def note_prompts(start: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write the digests of the rows' prompts into the start's folder."""
    digests = sorted({_digest(row["prompt"]) for row in rows})
    (start / FILE).write_text(json.dumps(digests) + "\n", encoding="utf-8")


def check_held_out(start: Path, held_out: Any) -> None:
    """Raise a RecipeError where the start has learned a held-out prompt.

    Args:
        start: a folder of `note_prompts`; one without its file is not checked.
        held_out: entries with "prompt"; None: there are none.
    """
    path = start / FILE
    if held_out is None or not path.is_file():
        return
    try:
        known = set(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise RecipeError(
            f"train: expected {path} as the run with [supervised] wrote it, got {error}. Copy that "
            "run's start anew."
        ) from error
    for index in range(len(held_out)):
        prompt = held_out[index]["prompt"]
        if isinstance(prompt, str) and _digest(prompt) in known:
            raise RecipeError(
                f"train: expected held-out prompts that {start} was not trained on, got "
                f"{prompt!r}. Take the data and the seed of the run that it is from, or train a "
                "start of one's own with [supervised]."
            )


def _digest(prompt: str) -> str:
    return hashlib.sha256(prompt.encode()).hexdigest()[:16]
