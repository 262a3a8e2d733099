import math

import pytest

from fastrl.cli.recipes.models import load_tokenizer
from fastrl.rewards.length import LengthReward


def test_by_hand():
    reward = LengthReward("words", minimum=2, maximum=4)
    texts = ["", "a", "a b", "a b c d", "a b c d e f", "a b c d e f g h i"]
    assert [reward.score(text) for text in texts] == [-1, -1 / 2, 0, 0, -2 / 4, -5 / 4]
    assert LengthReward("characters", target=4).score("ab cd") == -1 / 4
    assert LengthReward("characters", target=4).score("ab") == -2 / 4


def test_soft_overlong_punishment():
    """DAPO, eq. 13, with L_max = 20 and L_cache = 4."""
    reward = LengthReward(soft_maximum=20, cache=4)
    given = reward(["p"] * 6, [""] * 6, [[1] * n for n in (1, 16, 17, 19, 20, 50)])
    assert given == [0, 0, -1 / 4, -3 / 4, -1, -1]
    both = LengthReward(minimum=10, soft_maximum=20, cache=4, scale=2.0)
    assert both(["p"] * 2, [""] * 2, [[1] * 5, [1] * 18]) == [-1, -1]


@pytest.mark.parametrize("unit", ["tokens", "words", "characters"])
def test_immediate_rewards_sum_to_the_score(unit):
    tokenizer = load_tokenizer("bytes")
    text = "Über zwei Wörter, und mehr"
    ids = [*tokenizer.encode(text), tokenizer.eos_token_id]
    bounds = {"minimum": 2, "maximum": 3, "soft_maximum": 20, "cache": 10}
    reward = LengthReward(unit, **bounds, immediate=True, tokenizer=tokenizer)
    (rewards,) = reward(["p"], [text], [ids])
    (whole,) = LengthReward(unit, **bounds)(["p"], [text], [ids])
    assert len(rewards) == len(ids)
    assert math.fsum(rewards) == pytest.approx(whole, abs=1e-12)
    length = {"tokens": len(ids), "words": 5, "characters": len(text)}[unit]
    assert whole == reward.of_length(length) < -0.5


def test_tokens_need_no_tokenizer_and_no_text():
    reward = LengthReward(target=2, immediate=True)
    assert reward(["p"], [[7, 8, 9]], [[7, 8, 9]]) == [[-1 / 2, 1 / 2, -1 / 2]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "expected target, minimum, maximum or soft_maximum, got none"),
        ({"unit": "lines", "target": 3}, "expected unit one of .*, got 'lines'"),
        ({"target": 3, "minimum": 1}, "expected target without minimum and maximum"),
        ({"minimum": 5, "maximum": 4}, r"expected minimum <= maximum, got \(5, 4\)"),
        ({"maximum": 0}, "expected minimum >= 0, maximum and target >= 1"),
        ({"soft_maximum": 9}, "expected soft_maximum and cache together"),
        ({"soft_maximum": 9, "cache": 10}, "expected cache in 1 ... soft_maximum = 9, got 10"),
        ({"unit": "words", "target": 3, "immediate": True}, "expected tokenizer with immediate"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        LengthReward(**arguments)
    with pytest.raises(ValueError, match='expected unit "words" or "characters" to score a text'):
        LengthReward(target=3).score("a b")
