"""Dialogue: the next turn of a named speaker in Tiny Shakespeare, from the turns before it."""

from pathlib import Path
from typing import Any

from fastrl.cli.recipes.tasks.files import read_text, split_off, spread, without

SCENE_TURNS = 40  # turns that are held out together
HELD_OUT_EVERY = 8  # scenes
VALIDATION = 0.05  # of the others
Turn = tuple[str, str]  # speaker, text


def build(
    folder: Path | None,
    seed: int,
    *,
    turns: int = 2,
    turn_words: int = 30,
    reference_words: int = 16,
    held_out: int = 200,
    offset: int = 0,
) -> dict[str, Any]:
    """Holds out every eighth scene of 40 turns.

    Args:
        folder: with tinyshakespeare.
        seed: chooses the validation scenes.
        turns: before the one that is asked for.
        turn_words: of each of them, the last ones.
        reference_words: a turn that is asked for has at most so many; the supervised part learns
            longer ones too, as far as turn_words.
        held_out: prompts.
        offset: 1 holds out other prompts than 0, 2 again others, as far as there are.
    Returns:
        rows with "prompt", which ends with the speaker's name, "reference" and "speaker".
    """
    scenes = _scenes(read_text(folder, "tinyshakespeare", "input.txt"))
    test = [scene for i, scene in enumerate(scenes) if i % HELD_OUT_EVERY == HELD_OUT_EVERY - 1]
    others = [scene for i, scene in enumerate(scenes) if i % HELD_OUT_EVERY < HELD_OUT_EVERY - 1]
    others, validation = split_off(others, VALIDATION, seed)

    def rows(of: list[list[Turn]]) -> list[dict[str, Any]]:
        return [row for scene in of for row in _rows(scene, turns, turn_words)]

    def short(given: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [row for row in given if len(row["reference"].split()) <= reference_words]

    supervised, checked = rows(others), rows(validation)
    return {
        "train": short(supervised),
        "held_out": without(spread(short(rows(test)), held_out, offset), supervised, checked),
        "supervised": supervised,
        "validation": without(checked, supervised),
    }


def _scenes(text: str) -> list[list[Turn]]:
    turns = []
    for part in text.replace("\r\n", "\n").split("\n\n"):
        speaker, colon, said = part.strip().partition(":\n")
        if colon and said.strip():
            turns.append((speaker, " ".join(said.split())))
    return [turns[start : start + SCENE_TURNS] for start in range(0, len(turns), SCENE_TURNS)]


def _rows(scene: list[Turn], count: int, turn_words: int) -> list[dict[str, Any]]:
    rows = []
    for index in range(1, len(scene)):
        before = [
            f"{speaker}:\n{' '.join(said.split()[-turn_words:])}\n\n"
            for speaker, said in scene[max(0, index - count) : index]
        ]
        speaker, said = scene[index]
        reference = " ".join(said.split()[:turn_words])
        prompt = "".join(before) + f"{speaker}:\n"
        rows.append({"prompt": prompt, "reference": reference, "speaker": speaker})
    return rows
