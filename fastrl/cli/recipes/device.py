"""The device that a recipe or an option names."""

import re

import torch

from fastrl.cli.recipes.toml import RecipeError


def find_device(name: str, key: str = "device", local_rank: int | None = None) -> torch.device:
    """`auto` takes a GPU where there is one.

    Args:
        key: what messages call it.
        local_rank: this one's number among several processes of this machine, each of which takes
            the GPU of its number and makes it the current one; None: it is alone.
    Raises:
        RecipeError: no such device here, or not one for each process.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    counts = {"cpu": 1, "cuda": torch.cuda.device_count()}
    if local_rank is not None and name.startswith("cuda") and counts["cuda"]:
        if name != "cuda" or local_rank >= counts["cuda"]:
            raise RecipeError(
                f"train: expected {key} auto, cpu or cuda and a GPU for each process of a machine, "
                f"got {name} and {counts['cuda']} for process {local_rank}. Name none, and start "
                f"{counts['cuda']} at most."
            )
        torch.cuda.set_device(local_rank)
        return torch.device("cuda", local_rank)
    found = re.fullmatch(r"(cpu|cuda)(?::([0-9]{1,9}))?", name)
    if found is None or int(found[2] or 0) >= counts[found[1]]:
        raise RecipeError(
            f"train: expected {key} auto, cpu or an available cuda, got {name}. "
            "Leave it out to take what there is."
        )
    return torch.device(name)
