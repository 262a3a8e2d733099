import sys

import pytest
import sacrebleu
from metric_cases import assert_equals_library

from fastrl.rewards.ter import TER


@pytest.mark.parametrize("settings", [{}, {"normalized": True, "case_sensitive": True}], ids=str)
def test_equals_sacrebleu_on_every_prefix(settings):
    library = sacrebleu.TER(**settings)
    assert_equals_library(
        TER(**settings),
        lambda text, refs: 1 - library.sentence_score(text, refs).score / 100,
        count=4,
    )


def test_by_hand():
    assert TER().score("", ["a b c d"]) == 0.0
    assert TER().score("a b c d", ["a b c d"]) == 1.0
    assert TER().score("a c d", ["a b c d"]) == 0.75  # one insertion
    assert TER().score("d a b c", ["a b c d"]) == 0.75  # one shift
    assert TER().score("x y z x y z", ["a b"]) == -2.0


def test_needs_sacrebleu(monkeypatch):
    monkeypatch.setitem(sys.modules, "sacrebleu.metrics.ter", None)
    with pytest.raises(ImportError, match="TER: expected the package sacrebleu, got none"):
        TER()
