import math
import random

import pytest
from metric_cases import random_pieces

from fastrl.cli.recipes.models import load_tokenizer
from fastrl.rewards.diversity import DistinctN, Repetition


def ngrams(words, n):
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]


def distinct(text, n):
    found = ngrams(text.split(), n)
    return len(set(found)) / len(found) if found else 0.0


def repetition(text, n):
    words = text.split()
    found, covered = ngrams(words, n), set()
    for i, ngram in enumerate(found):
        if ngram in found[:i]:
            covered |= set(range(i, i + n))
    return -len(covered) / len(words) if words else 0.0


@pytest.mark.parametrize("n", [1, 2, 3, 5])
@pytest.mark.parametrize(("make", "definition"), [(DistinctN, distinct), (Repetition, repetition)])
def test_equals_the_definition_on_every_prefix(make, definition, n):
    random.seed(n)
    reward = make(n)
    for _ in range(40):
        words = random.choices(["a", "ab", "b", "abc"], k=random.randrange(25))
        text = "".join(word + random.choice([" ", "\n", "  "]) for word in words)
        reading, prefix = reward.metric.against(())(), ""
        for piece in random_pieces(text):
            prefix += piece
            reading.read(piece)
            assert reading.score() == pytest.approx(definition(prefix, n), abs=1e-12)
        assert reward.score(text) == pytest.approx(definition(text, n), abs=1e-12)


def test_by_hand():
    assert DistinctN(2).score("a b a b c") == 3 / 4  # ab ba ab bc
    assert DistinctN(1).score("The the cat") == 1.0
    assert DistinctN(1, lowercase=True).score("The the cat") == 2 / 3
    assert DistinctN(2).score("a") == DistinctN(2).score("") == 0.0
    assert Repetition(2).score("a b c a b") == -2 / 5
    assert Repetition(2).score("a a a a") == -3 / 4  # the first pair is free
    assert Repetition(3).score("a b c d") == 0.0
    assert Repetition(1, lowercase=True).score("A a") == -1 / 2


def test_immediate_rewards_punish_the_word_that_repeats():
    tokenizer = load_tokenizer("bytes")
    text = "a cat a cat"
    reward = Repetition(2, immediate=True, tokenizer=tokenizer)
    (rewards,) = reward(["p"], [text], [tokenizer.encode(text)])
    assert math.fsum(rewards) == pytest.approx(-2 / 4)
    assert [i for i, value in enumerate(rewards) if value] == [len(text) - 1]
    (rewards,) = DistinctN(1, immediate=True, tokenizer=tokenizer)(
        ["p"], [text], [tokenizer.encode(text)]
    )
    assert math.fsum(rewards) == pytest.approx(2 / 4)


def test_names_and_bad_arguments():
    assert DistinctN(3).__name__ == "distinct_3" and Repetition().__name__ == "repetition"
    with pytest.raises(ValueError, match="DistinctN: expected n >= 1, got 0"):
        DistinctN(0)
    with pytest.raises(ValueError, match="Repetition: expected n >= 1, got -1"):
        Repetition(-1)
