"""WikiText's articles: headings, paragraphs, and text as it is read."""

import re
from dataclasses import dataclass, field
from pathlib import Path

from fastrl.cli.recipes.tasks.files import read_text

UNKNOWN = "<unk>"  # what WikiText has in the place of rare words
_HEADING = re.compile(r"^((?:= )+)(.+?)((?: =)+)$")


@dataclass
class Section:
    """A heading with the paragraphs up to the next one; the article's own comes first."""

    heading: str
    depth: int
    paragraphs: list[str] = field(default_factory=list)


def read_sections(folder: Path | None, split: str) -> list[Section]:
    """The sections of "train", "valid" or "test" in their order, as readable text.

    Raises:
        RecipeError: there is no such file.
    """
    sections: list[Section] = []
    for line in read_text(folder, "wikitext-2", f"{split}.txt").splitlines():
        line = line.strip()
        found = _HEADING.match(line)
        if found is not None and found[1].count("=") == found[3].count("="):
            sections.append(Section(readable(found[2]), found[1].count("=")))
        elif line and sections:
            sections[-1].paragraphs.append(readable(line))
    return sections


def readable(text: str) -> str:
    """WikiText sets blanks around punctuation; most of them are taken out again."""
    text = re.sub(r" @([-,.])@ ", r"\1", text)
    text = re.sub(r" ([,.;:!?)%])", r"\1", text)
    text = re.sub(r"\( ", "(", text)
    return re.sub(r" ('s|n't|'re|'ve|'d|'ll|'m)\b", r"\1", text).replace(" '", "'")
