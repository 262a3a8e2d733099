"""Real text, and its split into training, validation and held-out blocks.

A text is a list of documents, a document a list of paragraphs. Neighbouring paragraphs form
blocks of a few thousand characters, and every tenth block or so is held out whole: held-out text
is like the training text without standing in it. A paragraph that occurs twice is kept once,
whatever its line breaks, so no held-out sentence is a copy of one that was trained on.
"""

import random
import re
from dataclasses import dataclass
from pathlib import Path

BLOCK_CHARACTERS = 3000
MIN_CHARACTERS = 10_000
MAX_PARAGRAPH = 12_000
MAX_PIECE = 1_000
# Shorter paragraphs are headings and one-line examples that repeat by their nature.
MIN_UNIQUE_CHARACTERS = 40


class CorpusError(ValueError):
    """The text cannot be used; the message says why and what to do."""


@dataclass(frozen=True)
class Splits:
    """Blocks of text, in order; no block is in two splits."""

    name: str
    train: list[str]
    validation: list[str]
    held_out: list[str]


def load_splits(
    path: Path | None, *, seed: int, held_out_fraction: float, max_characters: int
) -> Splits:
    """Read a text and split it by blocks of neighbouring paragraphs.

    Args:
        path: a UTF-8 text file; None takes the documentation that Python carries.
        seed: decides which blocks are held out.
        held_out_fraction: share of the blocks held out; half as many again are for validation.
        max_characters: the text is cut after so many characters.
    Returns:
        The three splits, each with at least one block.
    Raises:
        CorpusError: the file is missing, unreadable, empty, too short or not UTF-8.
    """
    name, documents = _python_documentation() if path is None else _read_file(path)
    blocks = _blocks(_without_repeats(_cut(documents, max_characters)))
    size = sum(map(len, blocks))
    if size < MIN_CHARACTERS or len(blocks) < 4:
        raise CorpusError(
            f"train: expected corpus {name} to have at least {MIN_CHARACTERS} characters of "
            f"distinct paragraphs, got {size}. Pass a longer text to --corpus."
        )
    held_out_count = max(1, round(held_out_fraction * len(blocks)))
    validation_count = max(1, round(held_out_fraction * len(blocks) / 2))
    # One draw from each of as many equal stretches: held-out blocks come from all over the text.
    order = _spread_sample(len(blocks), held_out_count + validation_count, seed)
    validation = set(order[:: max(2, len(order) // validation_count)][:validation_count])
    held_out = set(order) - validation
    return Splits(
        name,
        train=[b for i, b in enumerate(blocks) if i not in validation and i not in held_out],
        validation=[b for i, b in enumerate(blocks) if i in validation],
        held_out=[b for i, b in enumerate(blocks) if i in held_out],
    )


def _python_documentation() -> tuple[str, list[list[str]]]:
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise CorpusError(
            "train: expected this Python to carry pydoc_data.topics, the default corpus, got "
            f"{error}. Pass a text file to --corpus."
        ) from error
    return "Python documentation", [_paragraphs(text) for text in topics.values()]


def _read_file(path: Path) -> tuple[str, list[list[str]]]:
    where = f"train: expected corpus {path}"
    remedy = "Pass a UTF-8 text file to --corpus."
    try:
        raw = path.read_bytes()
    except FileNotFoundError as error:
        raise CorpusError(f"{where} to exist, got no such file. {remedy}") from error
    except OSError as error:
        raise CorpusError(f"{where} to be readable, got {error.strerror}. {remedy}") from error
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise CorpusError(
            f"{where} to be UTF-8, got byte 0x{raw[error.start]:02x} at offset {error.start}. "
            "Convert it first: iconv -f ENCODING -t UTF-8."
        ) from error
    if not text.strip():
        raise CorpusError(f"{where} to hold text, got an empty file. {remedy}")
    return path.name, [_paragraphs(text)]


def _paragraphs(text: str) -> list[str]:
    """The parts of a text between blank lines; a part that is very long is cut at line ends."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    parts = re.split(r"\n(?:[^\S\n]*\n)+", text)
    pieces = [
        piece
        for part in parts
        for piece in (_pieces(part) if len(part) > MAX_PARAGRAPH else [part])
    ]
    return [piece.strip("\n") for piece in pieces if piece.strip()]


def _pieces(part: str) -> list[str]:
    """Lines of a text without blank lines, together up to some size; one too long is cut, too."""
    cut = rf"(?s).{{1,{MAX_PIECE}}}(?:\s|$)|.{{1,{MAX_PIECE}}}"
    pieces = [""]
    for line in part.splitlines(keepends=True):
        for short in re.findall(cut, line) if len(line) > MAX_PIECE else [line]:
            if len(pieces[-1]) + len(short) > MAX_PIECE:
                pieces.append("")
            pieces[-1] += short
    return pieces


def _cut(documents: list[list[str]], max_characters: int) -> list[list[str]]:
    kept, size = [], 0
    for document in documents:
        paragraphs = []
        for paragraph in document:
            if size >= max_characters:
                break
            paragraphs.append(paragraph)
            size += len(paragraph)
        kept.append(paragraphs)
    return kept


def _without_repeats(documents: list[list[str]]) -> list[list[str]]:
    seen: set[str] = set()

    def is_new(paragraph: str) -> bool:
        key = " ".join(paragraph.split())
        if len(key) < MIN_UNIQUE_CHARACTERS:
            return True
        new = key not in seen
        seen.add(key)
        return new

    return [[p for p in document if is_new(p)] for document in documents]


def _blocks(documents: list[list[str]]) -> list[str]:
    """Join neighbouring paragraphs, across short documents too, into blocks of similar size."""
    blocks, current, size = [], [], 0
    for paragraph in (p for document in documents for p in document):
        current.append(paragraph)
        size += len(paragraph)
        if size >= BLOCK_CHARACTERS:
            blocks.append("\n\n".join(current))
            current, size = [], 0
    if current:
        blocks.append("\n\n".join(current))
    return blocks


def _spread_sample(count: int, chosen: int, seed: int) -> list[int]:
    generator = random.Random(seed)
    edges = [round(i * count / chosen) for i in range(chosen + 1)]
    return [generator.randrange(edges[i], edges[i + 1]) for i in range(chosen)]
