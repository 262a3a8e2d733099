"""Pairs for a preference model: translations of Multi30k, the true one against a worse one."""

import random
from pathlib import Path
from typing import Any

from fastrl.cli.recipes.tasks.files import spread, without
from fastrl.cli.recipes.tasks.translation import read_pairs


def build(
    folder: Path | None,
    seed: int,
    *,
    max_words: int = 16,
    train: int = 4000,
    held_out: int = 400,
    test: str = "test_2016_flickr",
) -> dict[str, Any]:
    """Pairs from train, held-out ones from a test.

    Args:
        folder: with multi30k.
        seed: chooses how each translation is made worse, see `worse`.
        max_words, test: as for multi30k_translation.
        train, held_out: at most so many pairs.
    Returns:
        rows with "prompt", "chosen", "rejected"; and the translations that are in no pair for the
        supervised part, so that a pair is news to the models of a cross-validation.
    """
    every = read_pairs(folder, "train", max_words)
    rows = spread(every, train)
    known = {row["prompt"] for row in rows}
    others = [row for row in read_pairs(folder, test, max_words) if row["prompt"] not in known]
    generator = random.Random(seed)
    result = {
        "train": _pairs(rows, generator),
        "held_out": _pairs(spread(others, held_out), generator),
    }
    left = without(every, rows, result["held_out"])
    return {**result, "supervised": left} if left else result


def _pairs(rows: list[dict[str, Any]], generator: random.Random) -> list[dict[str, Any]]:
    pairs = []
    for row in rows:
        other = generator.choice(rows)["reference"]
        rejected = worse(row["reference"], other, generator)
        if rejected != row["reference"]:
            pairs.append(
                {"prompt": row["prompt"], "chosen": row["reference"], "rejected": rejected}
            )
    return pairs


def worse(text: str, other: str, generator: random.Random) -> str:
    """One of, each with the same chance: the other text; a part of the words left out; two words
    exchanged; the second half of the other text in the place of one's own."""
    words, others = text.split(), other.split()
    kind = generator.randrange(4)
    if kind == 0 or len(words) < 3:
        return other
    if kind == 1:
        kept = sorted(generator.sample(range(len(words)), max(1, len(words) * 2 // 3)))
        return " ".join(words[i] for i in kept)
    if kind == 2:
        i, j = generator.sample(range(len(words)), 2)
        words[i], words[j] = words[j], words[i]
        return " ".join(words)
    return " ".join(words[: len(words) // 2] + others[len(others) // 2 :])
