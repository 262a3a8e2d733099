import sys
import time

import pytest
import sacrebleu
from metric_cases import assert_equals_library

from fastrl.cli.recipes.models import load_tokenizer
from fastrl.rewards.chrf import ChrF

SETTINGS = [
    {},
    {"word_order": 2},
    {"lowercase": True, "word_order": 2},
    {"whitespace": True, "char_order": 3},
    {"eps_smoothing": True, "word_order": 1},
    {"beta": 1, "char_order": 0, "word_order": 2},
    {"beta": 3, "char_order": 1},
]
REFERENCE = "Zwei Männer stehen am Herd und bereiten Essen zu, während ein Hund zuschaut."
COMPLETION = (
    "Zwei Hunde stehen im Schnee und Männer bereiten am Herd ein Essen vor, ein Hund schaut."
)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_equals_sacrebleu_on_every_prefix(settings):
    library = sacrebleu.CHRF(**settings)
    assert_equals_library(
        ChrF(**settings), lambda text, refs: library.sentence_score(text, refs).score / 100
    )


def test_by_hand():
    # a, b, c against a, b, d: 2 of 3 characters, 1 of 2 pairs, on both sides.
    assert ChrF(char_order=2).score("abc", ["abd"]) == pytest.approx((2 / 3 + 1 / 2) / 2)
    assert ChrF().score("ab c", ["abc"]) == 1.0  # white space is left out


def test_immediate_rewards_of_a_batch_are_the_rises_and_sum_to_the_score():
    tokenizer = load_tokenizer("bytes")
    reward = ChrF(immediate=True, tokenizer=tokenizer)
    ids = [[*tokenizer.encode(COMPLETION), tokenizer.eos_token_id], tokenizer.encode("Zwei")]
    texts = [COMPLETION, "Zwei"]
    rises = reward(["a", "b"], texts, ids, reference=[REFERENCE, [REFERENCE, "Vier"]])
    assert list(map(len, rises)) == list(map(len, ids))
    whole = ChrF()(["a", "b"], texts, ids, reference=[REFERENCE, [REFERENCE, "Vier"]])
    assert list(map(sum, rises)) == pytest.approx(whole, abs=1e-12)
    assert whole[0] == pytest.approx(
        sacrebleu.sentence_chrf(COMPLETION, [REFERENCE]).score / 100, abs=1e-9
    )
    for end in (1, 5, 30):
        prefix = tokenizer.decode(ids[0][:end]).rstrip("\ufffd")
        expected = sacrebleu.sentence_chrf(prefix, [REFERENCE]).score / 100
        assert sum(rises[0][:end]) == pytest.approx(expected, abs=1e-9)


def test_prefixes_cost_far_less_than_by_the_library():
    library = sacrebleu.CHRF()
    prefixes = [COMPLETION[: i + 4] for i in range(0, len(COMPLETION), 4)]
    pieces = [COMPLETION[i : i + 4] for i in range(0, len(COMPLETION), 4)]
    start = ChrF().metric.against

    def ours():
        reading = start((REFERENCE,))()
        for piece in pieces:
            reading.read(piece)
            reading.score()

    def theirs():
        for prefix in prefixes:
            library.sentence_score(prefix, [REFERENCE])

    def seconds(function):
        times = []
        for _ in range(5):
            began = time.perf_counter()
            function()
            times.append(time.perf_counter() - began)
        return min(times)

    # About 15 times at this length, and more for longer texts.
    assert seconds(theirs) > 4 * seconds(ours)


def test_needs_no_sacrebleu(monkeypatch):
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    assert ChrF().score("ab", ["ab"]) == 1.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"char_order": 0}, "char_order and word_order >= 0 and not both 0, got 0 and 0"),
        ({"word_order": -1}, "char_order and word_order >= 0"),
        ({"beta": 0}, "expected beta > 0, got 0"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        ChrF(**arguments)
