import sys
import time

import pytest
from metric_cases import assert_equals_library
from rouge_score.rouge_scorer import RougeScorer

from fastrl.rewards.rouge import ROUGE

SETTINGS = [
    ("rougeL", False, "fmeasure"),
    ("rougeL", True, "precision"),
    ("rouge1", True, "recall"),
    ("rouge1", False, "precision"),
    ("rouge2", False, "fmeasure"),
    ("rouge3", False, "recall"),
    ("rougeLsum", False, "fmeasure"),
    ("rougeLsum", True, "recall"),
]


@pytest.mark.parametrize(("kind", "use_stemmer", "measure"), SETTINGS)
def test_equals_rouge_score_on_every_prefix(kind, use_stemmer, measure):
    scorer = RougeScorer([kind], use_stemmer=use_stemmer)
    assert_equals_library(
        ROUGE(kind, use_stemmer, measure),
        lambda text, refs: getattr(scorer.score_multi(refs, text)[kind], measure),
    )


def test_by_hand():
    # a b d of "a c b d" and "a b d e": 3 of 4 on both sides.
    assert ROUGE().score("a c b d", ["a b d e"]) == pytest.approx(0.75)
    assert ROUGE("rouge2", measure="recall").score("A b. c", ["a b d b c"]) == pytest.approx(2 / 4)
    assert ROUGE("rouge1", use_stemmer=True).score("running", ["runs"]) == 1.0


def test_references_of_many_words():
    """More than a machine word has bits."""
    words = [f"w{i * i % 97}" for i in range(200)]
    text, reference = " ".join(words[::3] + words), " ".join(words[::-1] + words[::2])
    expected = RougeScorer(["rougeL"]).score(reference, text)["rougeL"].fmeasure
    assert ROUGE().score(text, [reference]) == pytest.approx(expected, abs=1e-12)


def test_prefixes_cost_far_less_than_by_the_library():
    reference = "a man in an orange hat is starring at something and he is happy about it today"
    words = ("two men with an orange hat are looking at something else and he is sad " * 2).split()
    scorer, start = RougeScorer(["rougeL"]), ROUGE().metric.against

    def ours():
        reading = start((reference,))()
        for word in words:
            reading.read(word + " ")
            reading.score()

    def theirs():
        for end in range(len(words)):
            scorer.score(reference, " ".join(words[: end + 1]))

    def seconds(function):
        times = []
        for _ in range(5):
            began = time.perf_counter()
            function()
            times.append(time.perf_counter() - began)
        return min(times)

    # About 30 times at this length, and more for longer texts.
    assert seconds(theirs) > 5 * seconds(ours)


def test_the_name_is_the_kinds():
    assert ROUGE("rouge2").__name__ == "rouge2"
    assert ROUGE(name="overlap").__name__ == "overlap"


def test_only_stems_and_lines_need_the_package(monkeypatch):
    for module in ("rouge_score", "rouge_score.rouge_scorer"):
        monkeypatch.setitem(sys.modules, module, None)
    assert ROUGE().score("a b", ["a b"]) == 1.0
    for arguments in ({"kind": "rougeLsum"}, {"use_stemmer": True}):
        with pytest.raises(ImportError, match="ROUGE: expected the package rouge_score, got none"):
            ROUGE(**arguments)


def test_bad_arguments():
    with pytest.raises(ValueError, match="expected kind .*, got 'rouge'"):
        ROUGE("rouge")
    with pytest.raises(ValueError, match="expected measure one of .*, got 'f1'"):
        ROUGE(measure="f1")
