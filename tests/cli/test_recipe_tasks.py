"""Builders of rows, on files of a few lines and, where it is there, on the real data."""

import gzip
import random
from pathlib import Path

import pytest

pytest.importorskip("rich")
pytest.importorskip("transformers")

from fastrl.cli.recipes.data import load_data
from fastrl.cli.recipes.parse import read_recipe
from fastrl.cli.recipes.tasks import continuation, dialogue, pairs, summarisation, translation
from fastrl.cli.recipes.tasks.wikitext import read_sections, readable
from fastrl.cli.recipes.toml import RecipeError

REAL = Path(__file__).parents[3] / "shared" / "data"
WIKI = """
 = Lobster = 

 Lobsters live in the sea , and some are red @-@ blue . They weigh 2 @.@ 5 kg ( 6 lb ) or more .

 = = Life cycle = = 

 The eggs hatch at night , and the larvae swim up to the light of the moon .
 A second paragraph says what the <unk> does later in its long life there .

 = = = <unk> history = = = 

 Nobody knows what happened to the first of them all in those days .
"""


@pytest.fixture
def wiki(tmp_path):
    for split, word in (("valid", "sea"), ("test", "pond")):
        (tmp_path / f"{split}.txt").write_text(WIKI.replace("sea", word).replace("moon", word))
    return tmp_path


def test_wikitext_is_read_as_sections_of_readable_text(wiki):
    sections = read_sections(wiki, "valid")
    assert [(s.heading, s.depth, len(s.paragraphs)) for s in sections] == [
        ("Lobster", 1, 1), ("Life cycle", 2, 2), ("<unk> history", 3, 1),
    ]  # fmt: skip
    assert sections[0].paragraphs[0] == (
        "Lobsters live in the sea, and some are red-blue. They weigh 2.5 kg (6 lb) or more."
    )
    assert readable("the lobster 's claw , it does n't") == "the lobster's claw, it doesn't"


def test_continuations_are_the_words_behind_their_prompts(wiki):
    rows = continuation.build(
        wiki, 0, prompt_words=4, reference_words=3, stretch_words=12, stride=5
    )
    text = read_sections(wiki, "valid")[0].paragraphs[0].split()
    first = {"prompt": " ".join(text[:4]), "reference": " " + " ".join(text[4:7])}
    assert first in rows["train"]
    assert {"prompt": first["prompt"], "reference": " " + " ".join(text[4:12])} in rows[
        "supervised"
    ]
    assert not any("<unk>" in row["reference"] for row in rows["train"] + rows["held_out"])
    assert {r["prompt"] for r in rows["held_out"]}.isdisjoint(r["prompt"] for r in rows["train"])


def test_headings_are_asked_for_by_each_stretch_but_held_out_by_the_first(wiki):
    rows = summarisation.build(wiki, 0, max_words=9)
    asked = {row["prompt"]: row["reference"] for row in rows["train"] + rows["validation"]}
    assert asked["The eggs hatch at night, and the larvae swim\n"] == "Life cycle"
    assert sorted(asked.values()) == ["Life cycle", "Life cycle", "Lobster", "Lobster"]
    # What training has word for word is not held out: the pond's own paragraphs are new in part.
    assert {row["reference"] for row in rows["held_out"]} <= {"Lobster", "Life cycle"}
    assert {r["prompt"] for r in rows["held_out"]}.isdisjoint(asked)


def test_a_turn_is_asked_for_by_the_turns_before_it_in_its_scene(tmp_path):
    turns = [f"{'AB'[i % 2]}:\nturn {i}\nends" for i in range(400)]
    (tmp_path / "input.txt").write_text("\n\n".join(turns))
    rows = dialogue.build(tmp_path, 0, turns=2)
    expected = {
        "prompt": "A:\nturn 4 ends\n\nB:\nturn 5 ends\n\nA:\n",
        "reference": "turn 6 ends",
        "speaker": "A",
    }
    assert expected in rows["train"] + rows["validation"]
    assert len(rows["held_out"]) == 39  # of one scene of ten
    assert {int(row["reference"].split()[1]) for row in rows["held_out"]} == set(range(281, 320))
    assert dialogue.build(tmp_path, 0) == dialogue.build(tmp_path, 0)
    other = dialogue.build(tmp_path, 1)
    assert other["held_out"] == rows["held_out"] and other["validation"] != rows["validation"]


def test_other_prompts_can_be_held_out(tmp_path, wiki):
    turns = [f"{'AB'[i % 2]}:\nturn {i}" for i in range(400)]
    (tmp_path / "input.txt").write_text("\n\n".join(turns))
    held_out = [
        {row["prompt"] for row in dialogue.build(tmp_path, 0, held_out=15, offset=i)["held_out"]}
        for i in range(2)
    ]
    assert [len(prompts) for prompts in held_out] == [15, 15] and not held_out[0] & held_out[1]
    with pytest.raises(RecipeError, match="offset below 39 rows / 15 held out, got 2"):
        dialogue.build(tmp_path, 0, held_out=15, offset=2)

    ways = [summarisation.build(wiki, 0, max_words=9, test=test) for test in ("test", "valid")]
    asked = [{r["prompt"] for r in rows["train"] + rows["validation"]} for rows in ways]
    assert any("pond" in prompt for prompt in asked[1]) and asked[0] != asked[1]
    with pytest.raises(RecipeError, match="test one of test, valid, got train"):
        summarisation.build(wiki, 0, test="train")


@pytest.fixture
def captions(tmp_path):
    for split, word in (("train", "red"), ("val", "green"), ("test_2016_flickr", "blue")):
        english = "".join(f"A {word} dog runs {i} .\n" for i in range(30))
        german = "".join(f"Ein Hund {word} läuft {i} .\n" for i in range(30))
        (tmp_path / f"{split}.en.gz").write_bytes(gzip.compress(english.encode()))
        (tmp_path / f"{split}.de").write_text(german)
    return tmp_path


def test_translations_are_sentence_pairs(captions):
    rows = translation.build(captions, 0, held_out=10)
    assert rows["train"][3] == {
        "prompt": "A red dog runs 3 .\n",
        "reference": "Ein Hund red läuft 3 .",
    }
    assert len(rows["held_out"]) == 10 and len(rows["validation"]) == 30
    assert translation.build(captions, 0, max_words=5, held_out=10)["train"] == []


def test_pairs_prefer_the_true_translation(captions):
    rows = pairs.build(captions, 3, train=20, held_out=10)
    assert rows == pairs.build(captions, 3, train=20, held_out=10)
    assert rows["train"] != pairs.build(captions, 4, train=20, held_out=10)["train"]
    for pair in rows["train"] + rows["held_out"]:
        number = pair["prompt"].split()[4]
        assert f" {number} ." in pair["chosen"] and pair["rejected"] != pair["chosen"]
    known = {row["prompt"] for row in rows["train"] + rows["held_out"]}
    assert len(rows["supervised"]) == 10
    assert not known & {row["prompt"] for row in rows["supervised"]}
    made = {pairs.worse("a b c d e f", "u v w x y z", random.Random(i)) for i in range(40)}
    assert "u v w x y z" in made and "a b c x y z" in made
    assert any(sorted(text) == sorted("a b c d e f") for text in made)
    assert any(set(text) < set("a b c d e f") and len(text.split()) == 4 for text in made)


RECIPE = """
algorithm = "grpo"
[model]
lstm = {embed_dim = 8, hidden_dim = 8}
tokenizer = "bytes"
[data]
builder = "BUILDER"
[rewards]
functions = ["fastrl.cli.recipes.toy_rewards:vowels"]
[supervised]
steps = 1
"""


def recipe_of(tmp_path, builder, *sets):
    path = tmp_path / "recipe.toml"
    path.write_text(RECIPE.replace("BUILDER", builder))
    return read_recipe(path, sets)


def test_a_recipe_gets_the_rows_of_its_builder(captions):
    sets = f"data.folder={captions}", "data.arguments={held_out=10}", "data.eval_limit=4"
    found = load_data(recipe_of(captions, "multi30k_translation", *sets, "data.limit=5"))
    assert (len(found.train), len(found.held_out), len(found.supervised)) == (5, 4, 30)
    assert found.texts()[0] == "A red dog runs 0 .\nEin Hund red läuft 0 ."


MINE = """
def build(folder, seed, *, count=3):
    rows = [{"prompt": f"{seed} {i}", "reference": "x"} for i in range(count)]
    return {"train": rows, "held_out": [{"prompt": "other"}]}
def overlapping(folder, seed):
    return {"train": [{"prompt": "a"}], "held_out": [{"prompt": "a"}]}
def broken(folder, seed):
    return 1 / 0
def empty(folder, seed):
    return {"train": []}
"""


def test_a_builder_of_ones_own(tmp_path):
    (tmp_path / "mine.py").write_text(MINE)
    sets = "train.seed=7", "data.arguments={count=41}"
    found = load_data(recipe_of(tmp_path, "mine.py:build", *sets))
    assert found.train[0]["prompt"] == "7 0" and found.held_out == [{"prompt": "other"}]
    assert [row["prompt"] for row in found.validation] == ["7 0", "7 20", "7 40"]
    assert len(found.supervised) == 38


@pytest.mark.parametrize(
    "builder, sets, message",
    [
        ("multi30k", [], "data.builder one of wikitext_continuation, .*, got multi30k"),
        ("multi30k_translation", [], r"data.folder with multi30k/train.en, got none. It is in "
         r"github.com/multi30k/dataset.*--set data.folder=FOLDER"),
        ("wikitext_headings", ["data.folder=nowhere"], "wikitext-2/valid.txt .or .gz. in "
         "data.folder, got .*nowhere without it. It is in github.com/pytorch/examples"),
        ("shakespeare_dialogue", ["data.folder=nowhere"], "github.com/karpathy/char-rnn"),
        ("mine.py:build", ["data.arguments={cuont=1}"], "unexpected keyword argument 'cuont'. It "
         "has count"),
        ("mine.py:overlapping", [], "held_out prompts that training does not have, got 'a'"),
        ("mine.py:broken", [], "to make rows, got ZeroDivisionError"),
        ("mine.py:empty", [], "with train rows, got train"),
        ("mine.py:buidl", [], "Did you mean build"),
    ],
)  # fmt: skip
def test_a_builder_that_cannot_work(tmp_path, builder, sets, message):
    (tmp_path / "mine.py").write_text(MINE)
    with pytest.raises(RecipeError, match=message):
        load_data(recipe_of(tmp_path, builder, *sets))


@pytest.mark.parametrize(
    "name, least",
    [
        ("wikitext_continuation", 3000),
        ("wikitext_headings", 1000),
        ("shakespeare_dialogue", 2500),
        ("multi30k_translation", 20000),
    ],
)
def test_the_real_data(tmp_path, name, least):
    if not REAL.is_dir():
        pytest.skip(f"no data sets in {REAL}")
    found = load_data(recipe_of(tmp_path, name, f"data.folder={REAL}"))
    assert len(found.train) >= least and len(found.held_out) >= 180
    assert len(found.supervised) >= 2000 and len(found.validation) >= 40
    assert all(row["prompt"] and row["reference"] for row in found.held_out)
