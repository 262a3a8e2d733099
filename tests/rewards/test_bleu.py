import logging
import math
import sys

import pytest
import sacrebleu
from metric_cases import assert_equals_library, random_pieces

from fastrl.rewards.bleu import BLEU

SETTINGS = [
    {},
    {"tokenize": "none", "lowercase": True},
    {"tokenize": "char", "max_ngram_order": 6},
    {"tokenize": "intl"},
    {"tokenize": "zh", "max_ngram_order": 2, "lowercase": True},
    {"smooth_method": "add-k", "effective_order": False},
    {"smooth_method": "floor", "smooth_value": 0.2},
    {"smooth_method": "none", "lowercase": True},
]


@pytest.fixture(autouse=True)
def quiet_library():
    """It advises against effective_order=False with every sentence."""
    logging.getLogger("sacrebleu").setLevel(logging.ERROR)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_equals_sacrebleu_on_every_prefix(settings):
    library = sacrebleu.BLEU(**{"effective_order": True, "tokenize": "13a", **settings})
    assert_equals_library(
        BLEU(**settings), lambda text, refs: library.sentence_score(text, refs).score / 100
    )


def test_by_hand():
    # 4 of 5 words, 2 of 4 pairs, 1 of 3 triples, no four: 1/2 of 1/2 by "exp".
    expected = (4 / 5 * 2 / 4 * 1 / 3 * 1 / 4) ** 0.25
    assert BLEU().score("a b c x d", ["a b c d e"]) == pytest.approx(expected)
    assert BLEU().score("a b", ["a b c"]) == pytest.approx(math.exp(1 - 3 / 2))


def test_13a_reads_over_line_ends_behind_hyphens_and_nothing_else():
    reward = BLEU(max_ngram_order=1)
    reference = ["foot-ball ab cd 1.5 ef"]
    for text in (
        "a-\nb",
        "a-<skipped>\nb",
        "a-\n b",
        "a \nb",
        "a>\nb",
        "a-\n\nb",
        "&-\namp;",
        "1.\n5",
    ):
        for cut in range(len(text)):
            reading = reward.metric.against(tuple(reference))()
            reading.read(text[:cut])
            reading.read(text[cut:])
            whole = sacrebleu.BLEU(max_ngram_order=1, effective_order=True)
            assert reading.score() == whole.sentence_score(text, reference).score / 100


def test_only_the_word_that_may_go_on_is_tokenised_again(monkeypatch):
    """The cost of a piece does not grow with the text."""
    reward, sizes = BLEU(), []
    tokens = type(reward.metric).tokens

    def counted(self, text):
        sizes.append(len(text))
        return tokens(self, text)

    monkeypatch.setattr(type(reward.metric), "tokens", counted)
    reading = reward.metric.against(("the cat",))()
    for piece in random_pieces("The cat, it seems, sat on 3.5 mats.\n" * 30):
        reading.read(piece)
        reading.score()
    assert len(sizes) > 300 and max(sizes) <= 20


def test_needs_sacrebleu(monkeypatch):
    monkeypatch.setitem(sys.modules, "sacrebleu.metrics.bleu", None)
    message = r'BLEU: expected the package sacrebleu, got none. Install it: pip install "fastrl\['
    with pytest.raises(ImportError, match=message):
        BLEU()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tokenize": "words"}, "expected tokenize one of .*'13a'.*, got 'words'"),
        ({"smooth_method": "more"}, "expected smooth_method one of"),
        ({"max_ngram_order": 0}, "expected max_ngram_order >= 1, got 0"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        BLEU(**arguments)
