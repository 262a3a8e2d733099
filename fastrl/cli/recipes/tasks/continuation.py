"""Continuation: the first words of a stretch of a WikiText paragraph, and the words after them."""

from pathlib import Path
from typing import Any

from fastrl.cli.recipes.tasks.files import split_off, spread, without
from fastrl.cli.recipes.tasks.wikitext import UNKNOWN, read_sections

VALIDATION = 0.05  # of the paragraphs
MIN_REST = 8  # words after the prompt in a row of the supervised part


def build(
    folder: Path | None,
    seed: int,
    *,
    prompt_words: int = 16,
    reference_words: int = 12,
    stretch_words: int = 96,
    stride: int = 24,
    held_out: int = 200,
    offset: int = 0,
) -> dict[str, Any]:
    """Trains on valid.txt, holds out test.txt.

    Args:
        folder: with wikitext-2.
        seed: chooses the validation paragraphs.
        prompt_words, reference_words: lengths; a reference has no unknown word.
        stretch_words: of a row of the supervised part, prompt and reference together.
        stride: words from one training prompt to the next in a paragraph.
        held_out: prompts, one of a paragraph.
        offset: 1 holds out other prompts than 0, 2 again others, as far as there are.
    Returns:
        rows with "prompt" and "reference", which begins with the blank between them.
    """
    paragraphs, validation = split_off(_paragraphs(folder, "valid"), VALIDATION, seed)
    lengths = prompt_words, reference_words
    train = [row for text in paragraphs for row in _windows(text, *lengths, stride)]
    test = [row for text in _paragraphs(folder, "test") for row in _windows(text, *lengths)[:1]]
    supervised, checked = (
        _stretches(texts, prompt_words, stretch_words) for texts in (paragraphs, validation)
    )
    return {
        "train": train,
        "held_out": without(spread(test, held_out, offset), train, supervised, checked),
        "supervised": supervised,
        "validation": checked,
        "texts": paragraphs,
    }


def _paragraphs(folder: Path | None, split: str) -> list[str]:
    return [text for section in read_sections(folder, split) for text in section.paragraphs]


def _windows(
    text: str, prompt_words: int, reference_words: int, stride: int = 10**6
) -> list[dict[str, Any]]:
    words = text.split()
    rows = []
    for start in range(0, len(words) - prompt_words - reference_words + 1, stride):
        middle = start + prompt_words
        reference = words[middle : middle + reference_words]
        if not any(UNKNOWN in word for word in reference):
            rows.append(_row(words[start:middle], reference))
    return rows


def _stretches(texts: list[str], prompt_words: int, size: int) -> list[dict[str, Any]]:
    """Whole paragraphs, cut into stretches; what is left of one at its end is dropped if short."""
    rows = []
    for text in texts:
        words = text.split()
        for start in range(0, len(words), size):
            part = words[start : start + size]
            if len(part) >= prompt_words + MIN_REST:
                rows.append(_row(part[:prompt_words], part[prompt_words:]))
    return rows


def _row(prompt: list[str], reference: list[str]) -> dict[str, Any]:
    return {"prompt": " ".join(prompt), "reference": " " + " ".join(reference)}
