"""The recipes that come with fastrl, beside this file."""

from pathlib import Path

from fastrl.cli.recipes.toml import RecipeError

BUILT_IN = Path(__file__).parent


def built_in() -> list[str]:
    """The names of the recipes that come with fastrl."""
    return sorted(path.stem for path in BUILT_IN.glob("*.toml"))


def find_recipe(name: str) -> Path:
    """The file: a path, or the name of a recipe that comes with fastrl.

    Raises:
        RecipeError: neither.
    """
    path, own = Path(name), BUILT_IN / f"{name}.toml"
    if path.is_file() or path.suffix == ".toml" or "/" in name:
        return path
    if own.is_file():
        return own
    raise RecipeError(
        f"train: expected a recipe: a .toml file, or one of {', '.join(built_in())}, got {name}. "
        "Options start with --."
    )
