import math
import random

import pytest
from metric_cases import random_pieces

from fastrl.cli.recipes.models import load_tokenizer
from fastrl.rewards.format import FormatReward

TAGS = ["think", "answer"]
GOOD = "<think>2 < 3\n</think>\n <answer>yes</answer>\n"


def test_regular_expressions_match_the_whole_text():
    reward = FormatReward(r"Answer: \d+.*")
    assert reward.score("Answer: 42\nbecause") == 1.0
    assert reward.score("My Answer: 42") == reward.score("Answer: x") == 0.0


@pytest.mark.parametrize(
    ("text", "score"),
    [('{"a": [1, 2.5, null]}', 1), ("3", 1), ("", 0), ("{'a': 1}", 0), ("NaN", 0), ("[1] x", 0)]
    + [("[" * 100_000, 0)],
    ids=lambda value: str(value)[:20],
)
def test_json(text, score):
    assert FormatReward("json").score(text) == score


@pytest.mark.parametrize(
    ("text", "score"),
    [
        (GOOD, 1.0),
        ("", 0.0),
        ("<think>", 0.25),
        ("<think> a </think> ", 0.5),
        ("<think> a </think><answer> b < c </b>", 0.75),
        ("<think></think> so <answer>", 0.0),  # something stands outside
        ("I <think>", 0.0),
        (GOOD + "!", 0.0),
        (GOOD + "<thi", 0.0),
        ("<think> <think>", 0.0),
        ("<answer>", 0.0),
        ("<think> </answer>", 0.0),
        ("<think> </think> <ans", 0.5),  # may become the next mark
    ],
)
def test_tags_however_the_text_is_cut(text, score):
    reward = FormatReward(TAGS)
    assert reward.score(text) == score
    random.seed(0)
    for _ in range(20):
        reading = reward.metric.against(())()
        for piece in random_pieces(text):
            reading.read(piece)
        assert reading.score() == score


def test_immediate_rewards_stand_where_a_mark_is_closed():
    tokenizer = load_tokenizer("bytes")
    reward = FormatReward(TAGS, immediate=True, tokenizer=tokenizer, scale=2.0)
    ids = tokenizer.encode(GOOD)
    (rewards,) = reward(["p"], [GOOD], [ids])
    ends = [GOOD.index(m) + len(m) - 1 for m in ("<think>", "</think>", "<answer>", "</answer>")]
    assert [i for i, value in enumerate(rewards) if value] == ends
    assert math.fsum(rewards) == 2.0
    (rewards,) = reward(["p"], [GOOD + "x"], [[*ids, *tokenizer.encode("x")]])
    assert rewards[-1] == -2.0 and math.fsum(rewards) == 0.0


def test_immediate_rewards_of_other_forms_are_taken_back():
    tokenizer = load_tokenizer("bytes")
    reward = FormatReward("json", immediate=True, tokenizer=tokenizer)
    assert reward(["p"], ["1,"], [tokenizer.encode("1,")]) == [[1.0, -1.0]]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("(", "expected pattern a regular expression, got '\\('"),
        ([], "expected tags of different names .*, got \\[\\]"),
        (["a", "a"], "expected tags of different names"),
        (["a b"], "expected tags of different names"),
    ],
)
def test_bad_patterns(pattern, message):
    with pytest.raises(ValueError, match=message):
        FormatReward(pattern)
