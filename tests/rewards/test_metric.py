import math

import pytest
from tokenizers import Tokenizer, decoders, models

from fastrl.cli.recipes.models import load_tokenizer
from fastrl.rewards.bleu import BLEU
from fastrl.rewards.chrf import ChrF
from fastrl.rewards.metric import MetricReward, rises
from fastrl.rewards.rouge import ROUGE
from fastrl.rewards.ter import TER

TEXT = "The naïve cat, it seems, sat on 3.5 mats -\nor on a 字, didn't it?"
REFERENCE = ["A naive cat sat on 3.5 mats, or did it sit on a 字?", "The cat sat."]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("bytes")


def share_of_a(text, references):
    return text.count("a") / len(text) if text else 0.0


@pytest.mark.parametrize("make", [ChrF, BLEU, TER, ROUGE])
def test_immediate_rewards_sum_to_the_score_of_the_whole(make, tokenizer):
    ids = [*tokenizer.encode(TEXT), tokenizer.eos_token_id]
    immediate = make(immediate=True, tokenizer=tokenizer, scale=3.0)
    (rewards,) = immediate(["p"], [TEXT], [ids], reference=[REFERENCE])
    (whole,) = make(scale=3.0)(["p"], [TEXT], [ids], reference=[REFERENCE])
    assert len(rewards) == len(ids)
    assert math.fsum(rewards) == pytest.approx(whole, abs=1e-12)
    assert whole == pytest.approx(3.0 * make().score(TEXT, REFERENCE), abs=1e-12)
    assert rewards[-1] == 0.0  # EOS
    assert rewards[TEXT.index("ï")] == 0.0  # the first of its two bytes


@pytest.mark.parametrize("make", [ChrF, BLEU, TER, ROUGE])
def test_a_metric_is_called_as_it_is_told(make):
    assert make(name="mine").__name__ == "mine" != make().__name__


def test_a_function_is_a_metric_too(tokenizer):
    reward = MetricReward(share_of_a, immediate=True, tokenizer=tokenizer, name="as")
    ids = tokenizer.encode("abaé")
    given = reward(["p"], ["abaé"], [ids], reference=["x"])
    assert given == [pytest.approx([1, -1 / 2, 2 / 3 - 1 / 2, 0, 2 / 4 - 2 / 3])]
    assert reward.__name__ == "as"
    assert MetricReward(share_of_a)(["p"], ["ab"], [ids], reference=["x"]) == [0.5]


def test_scores_and_references_are_computed_once():
    class Counting:
        num_targets = num_readings = 0

        def against(self, references):
            self.num_targets += 1
            start = MetricReward(share_of_a).metric.against(references)

            def begin():
                self.num_readings += 1
                return start()

            return begin

    metric = Counting()
    reward = MetricReward(metric, cache_size=2)
    texts = ["a", "ab", "a", "ab"]
    given = reward(["p"] * 4, texts, [[1]] * 4, reference=[["r", "s"]] * 4)
    assert given == [1.0, 0.5, 1.0, 0.5]
    assert (metric.num_targets, metric.num_readings) == (1, 2)
    reward(["p"] * 4, texts, [[1]] * 4, reference=["r"] * 4)  # other references, other scores
    assert (metric.num_targets, metric.num_readings) == (2, 4)
    reward(["p"], ["a"], [[1]], reference=[["r", "s"]])  # forgotten: two are remembered
    assert (metric.num_targets, metric.num_readings) == (2, 5)
    reward(["p"] * 5, ["ab", "b", "ab", "c", "ab"], [[1]] * 5, reference=["r"] * 5)
    assert metric.num_readings == 7  # "b" was forgotten for "c", not "ab", asked for after it


def test_cached_rewards_are_not_shared(tokenizer):
    reward = ChrF(immediate=True, tokenizer=tokenizer)
    ids = tokenizer.encode("a cat")
    first, second = reward(["p"] * 2, ["a cat"] * 2, [ids] * 2, reference=["a cat"] * 2)
    first[0] = 7.0
    assert second == reward(["p"], ["a cat"], [ids], reference=["a cat"])[0] != first


def test_chat_messages_and_no_opinion(tokenizer):
    message = [{"role": "assistant", "content": "a cat"}]
    for immediate in (False, True):
        reward = ChrF(immediate=immediate, tokenizer=tokenizer, reference="target")
        ids = [tokenizer.encode("a cat")] * 2
        given = reward(["p"] * 2, [message] * 2, ids, target=["a cat", None], other=[1, 2])
        assert given[1] is None
        assert (math.fsum(given[0]) if immediate else given[0]) == pytest.approx(1.0)


def test_an_eos_that_the_tokenizer_takes_for_text():
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "cat": 1, "<eos>": 2}, unk_token="a"))
    tokenizer.decoder = decoders.WordPiece()
    reward = ChrF(immediate=True, tokenizer=tokenizer)
    (rewards,) = reward(["p"], ["a cat"], [[0, 1, 2]], reference=["a cat"])
    assert rewards[-1] == 0.0 and math.fsum(rewards) == pytest.approx(1.0)
    with pytest.raises(ValueError, match="expected completion_ids that decode to .* 'a dog'"):
        reward(["p"], ["a dog"], [[0, 1, 2]], reference=["a cat"])


def test_prefix_scores_begin_with_the_empty_text(tokenizer):
    reward = MetricReward(lambda text, _: 1.0 - len(text) / 4, tokenizer=tokenizer, scale=2.0)
    ids = tokenizer.encode("abc")
    assert reward.prefix_scores(["abc", "abc"], [ids, ids], reference=["x", None]) == [
        [2.0, 1.5, 1.0, 0.5],
        None,
    ]
    assert rises([2.0, 1.5, 1.0, 0.5]) == [1.5, -0.5, -0.5]  # the empty text counts as 0
    with pytest.raises(ValueError, match="expected tokenizer for scores of prefixes, got None"):
        ChrF().prefix_scores(["abc"], [ids], reference=["x"])


def test_many_small_rises_still_sum_to_the_score():
    scores = [0.0, *(1 / (3 + i % 7) for i in range(5000)), 1 / 3]
    assert math.fsum(rises(scores)) == pytest.approx(1 / 3, abs=1e-15)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            {"target": ["a"], "log_metric": print},
            r"expected a column 'reference' .*, got columns \['target'\]",
        ),
        ({}, "expected a column 'reference'"),
        ({"reference": ["a", "b"]}, "of the same length, got 1, 1 and 2"),
        ({"reference": [3]}, "expected column 'reference' of texts, .*, got 3 for completion 0"),
        ({"reference": [[]]}, r"got \[\] for completion 0"),
        ({"reference": [["a", None]]}, "got .'a', None. for completion 0"),
    ],
)
def test_bad_references(columns, message):
    with pytest.raises(ValueError, match=f"ChrF: .*{message}"):
        ChrF()(["p"], ["a"], [[1]], **columns)


def test_one_text_is_scored_against_one_reference_or_several():
    for metric in (ChrF(), BLEU()):
        assert metric.score("a b c d", "a b c d") == metric.score("a b c d", ["x", "a b c d"])
        assert metric.score("a b c d", "a b c d") == pytest.approx(1.0)
        with pytest.raises(ValueError, match="expected references to score a text, got none"):
            metric.score("a b c d")


def test_bad_arguments():
    with pytest.raises(ValueError, match="BLEU: expected tokenizer with immediate=True, got None"):
        BLEU(immediate=True)
    with pytest.raises(ValueError, match="expected cache_size >= 1, got 0"):
        ChrF(cache_size=0)
    with pytest.raises(TypeError, match="MetricReward: expected metric a Metric or a function"):
        MetricReward("chrf")
    with pytest.raises(TypeError, match="expected completions of text"):
        ChrF()(["p"], [[1, 2]], [[1, 2]], reference=["a"])
