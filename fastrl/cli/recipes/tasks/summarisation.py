"""Summarisation: the heading of a WikiText section, or of an article, from its first sentences."""

from pathlib import Path
from typing import Any

from fastrl.cli.recipes.tasks.files import split_off, spread, without
from fastrl.cli.recipes.tasks.wikitext import UNKNOWN, Section, read_sections
from fastrl.cli.recipes.toml import RecipeError

VALIDATION = 0.05  # of the sections
SPLITS = {"test": "valid", "valid": "test"}  # held out, trained on
MIN_WORDS = 8  # of a text that has a heading to be found


def build(
    folder: Path | None,
    seed: int,
    *,
    max_words: int = 40,
    held_out: int = 300,
    test: str = "test",
) -> dict[str, Any]:
    """Trains on valid.txt and holds out test.txt, or the other way round.

    In training each stretch of each paragraph of a section asks for its heading, since sections are
    few; held out only the first words of the first paragraph do.

    Args:
        folder: with wikitext-2.
        seed: chooses the validation sections.
        max_words: of a text.
        held_out: prompts, one of a section.
        test: "test" or "valid": what is held out; the other one is trained on.
    Returns:
        rows with "prompt", a text and a line's end, and "reference", the heading.
    """
    if test not in SPLITS:
        raise RecipeError(
            f"train: expected data.arguments.test one of {', '.join(SPLITS)}, got {test}. "
            "Correct it."
        )
    train_split = SPLITS[test]
    sections, validation = split_off(read_sections(folder, train_split), VALIDATION, seed)
    tested = [row for s in read_sections(folder, test) for row in _rows(s, max_words)[:1]]
    train, checked = (
        [row for section in part for row in _rows(section, max_words)]
        for part in (sections, validation)
    )
    texts = [text for section in sections for text in section.paragraphs]
    return {
        "train": train,
        "held_out": without(spread(tested, held_out), train, checked),
        "validation": checked,
        "texts": texts + [section.heading for section in sections],
    }


def _rows(section: Section, max_words: int) -> list[dict[str, Any]]:
    if UNKNOWN in section.heading:
        return []
    rows = []
    for text in section.paragraphs:
        words = text.split()
        for start in range(0, max(1, len(words) - MIN_WORDS + 1), max_words):
            part = words[start : start + max_words]
            if len(part) >= MIN_WORDS:
                rows.append({"prompt": " ".join(part) + "\n", "reference": section.heading})
    return rows
