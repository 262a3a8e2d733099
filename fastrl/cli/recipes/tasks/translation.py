"""Translation: an English caption of Multi30k as the prompt, the German one as its continuation."""

from pathlib import Path
from typing import Any

from fastrl.cli.recipes.tasks.files import read_text, spread, without


def build(
    folder: Path | None,
    seed: int,
    *,
    max_words: int = 16,
    held_out: int = 200,
    validation: int = 200,
    test: str = "test_2016_flickr",
) -> dict[str, Any]:
    """Trains on train, validates on val, holds out a test.

    Args:
        folder: with multi30k.
        seed: not used: all rows have their files.
        max_words: of a sentence in either language; longer pairs are left out.
        held_out, validation: at most so many prompts.
        test: "test_2016_flickr" or "test_2017_flickr".
    Returns:
        rows with "prompt", the English sentence and a line's end, and "reference".
    """
    train = read_pairs(folder, "train", max_words)
    checked = without(spread(read_pairs(folder, "val", max_words), validation), train)
    tested = spread(read_pairs(folder, test, max_words), held_out)
    return {
        "train": train,
        "held_out": without(tested, train, checked),
        "validation": checked,
    }


def read_pairs(folder: Path | None, split: str, max_words: int) -> list[dict[str, Any]]:
    """The rows of a split.

    Raises:
        RecipeError: a file is not there.
    """
    english, german = (
        read_text(folder, "multi30k", f"{split}.{language}").splitlines()
        for language in ("en", "de")
    )
    return [
        {"prompt": source.strip() + "\n", "reference": target.strip()}
        for source, target in zip(english, german, strict=True)
        if max(len(source.split()), len(target.split())) <= max_words
    ]
