import random
from pathlib import Path

import pytest

from fastrl.cli.training.corpus import CorpusError, load_splits


def load(path: Path | None, **options):
    options = {"seed": 0, "held_out_fraction": 0.2, "max_characters": 10**6, **options}
    return load_splits(path, **options)


def sentences(count: int, seed: int = 0) -> list[str]:
    generator = random.Random(seed)
    syllables = ["ka", "lo", "mi", "ren", "sta", "vu"]
    return [
        f"{number}: " + " ".join("".join(generator.choices(syllables, k=3)) for _ in range(30))
        for number in range(count)
    ]


def paragraphs(blocks: list[str]) -> set[str]:
    return {" ".join(p.split()) for block in blocks for p in block.split("\n\n")}


def test_no_held_out_paragraph_stands_in_the_training_text():
    splits = load(None)
    parts = [paragraphs(b) for b in (splits.train, splits.validation, splits.held_out)]
    for i, part in enumerate(parts):
        for other in parts[:i]:
            assert all(len(p) < 40 for p in part & other)
    size = sum(map(len, splits.held_out)) / sum(
        sum(map(len, b)) for b in (splits.train, splits.validation, splits.held_out)
    )
    assert 0.1 < size < 0.25


def test_every_paragraph_stands_in_one_split_and_repeats_once(tmp_path):
    path, texts = tmp_path / "text.txt", sentences(200)
    path.write_text("\n\n".join([*texts, *(text.replace(" ", "\n") for text in texts)]))
    splits = load(path)
    together = [b for part in (splits.train, splits.validation, splits.held_out) for b in part]
    assert sorted(p for b in together for p in b.split("\n\n")) == sorted(texts)


def test_the_seed_chooses_what_is_held_out(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("\n\n".join(sentences(200)))
    assert load(path) == load(path)
    assert load(path).held_out != load(path, seed=1).held_out
    # From all over the text, not from its end alone.
    first = load(path).held_out[0]
    assert int(first.split(":")[0]) < 60


@pytest.mark.parametrize("separator", ["\n\n", "\n", " ", "\r\n \t\r\n"])
def test_texts_with_and_without_blank_lines(tmp_path, separator):
    path, texts = tmp_path / "text.txt", sentences(200)
    path.write_bytes(b"\xef\xbb\xbf" + separator.join(texts).encode())
    splits = load(path)
    blocks = splits.train + splits.validation + splits.held_out
    assert len(blocks) > 8 and max(map(len, blocks)) < 5000
    words = sorted(word for block in blocks for word in block.split())
    assert words == sorted(word for text in texts for word in text.split())


def test_indentation_stays(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("\n \n".join("   code: " + text for text in sentences(200)))
    assert load(path).train[0].startswith("   code: ")


def test_the_text_is_cut(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("\n\n".join(sentences(400)))
    splits = load(path, max_characters=20_000)
    size = sum(len(b) for part in (splits.train, splits.validation, splits.held_out) for b in part)
    assert 20_000 <= size < 21_000


def test_a_folder_is_no_corpus(tmp_path):
    with pytest.raises(CorpusError, match="to be readable, got Is a directory"):
        load(tmp_path)
