"""A MODEL of the command line: a run's folder, a checkpoint, or what AutoModelForCausalLM loads."""

from pathlib import Path
from typing import Any

from torch import nn

from fastrl.cli.recipes.device import find_device
from fastrl.cli.recipes.models import is_ours, load_policy, load_tokenizer
from fastrl.cli.recipes.toml import RecipeError
from fastrl.models import ActorCritic, load_model
from fastrl.trainers import checkpoint
from fastrl.trainers._checkpoint_files import standing

RECIPE, CHECKPOINT = "recipe.toml", "checkpoint"


def open_model(
    name: str, *, tokenizer: str | None = None, dtype: str = "float32", device: str = "auto"
) -> tuple[Any, Any]:
    """The policy, ready to sample from, and its tokenizer.

    Args:
        name: a run's folder, whose checkpoint is taken; a checkpoint's; or a name or folder for
            AutoModelForCausalLM.
        tokenizer: in place of the model's own, as model.tokenizer of a recipe.
        dtype: of the weights, where transformers loads them.
        device: as model.device of a recipe.
    Raises:
        RecipeError: there is no such model, or no tokenizer with it.
    """
    place = find_device(device)
    if not name:
        raise RecipeError("train: expected a MODEL, got an empty text. Name a folder or a model.")
    folder = Path(name)
    if (folder / RECIPE).is_file() or (folder / CHECKPOINT / "trainer.json").is_file():
        if (folder / "model").is_dir():
            raise RecipeError(
                f"train: expected a run of a policy, got {name} of a preference model. "
                "PreferenceReward makes a reward of it; a policy is in its start/, if anywhere."
            )
        folder = folder / CHECKPOINT
        if not checkpoint.exists(folder):
            start = Path(name) / "start"
            has_start = (start / "config.json").is_file()
            raise RecipeError(
                f"train: expected a run with a checkpoint, got {name}, which has none yet. "
                + (f"Pass {start}, its start." if has_start else "Wait for its first one.")
            )
    elif (folder / "results.json").is_file() or (folder / "warm_up").is_dir():
        raise RecipeError(
            f"train: expected one model, got {name} with those of the demo. "
            f"Pass {folder / 'actor_critic' / CHECKPOINT}, or policy_gradient's."
        )
    folder = standing(folder)  # beside its place, where a save was interrupted
    try:
        if (folder / "trainer.json").is_file():
            model: Any = checkpoint.load_model(folder)
        else:
            model = load_model(folder) if is_ours(folder) else load_policy(name, dtype)
    except RecipeError:
        raise
    except (ValueError, OSError) as error:
        raise RecipeError(f"train: expected a complete model, got {error}") from error
    policy: nn.Module = model.language_model if isinstance(model, ActorCritic) else model
    found = load_tokenizer(tokenizer or (_tokenizer_near(folder) if folder.is_dir() else name))
    return policy.to(place).eval(), found


def _tokenizer_near(folder: Path) -> str:
    """The folder's own, or the one of the run that it is in."""
    for place in (folder, folder.absolute().parent, folder.absolute().parent.parent):
        if (place / "tokenizer_config.json").is_file():
            return str(place)
        if (place / "tokenizer.json").is_file():
            return str(place / "tokenizer.json")
    return str(folder)
