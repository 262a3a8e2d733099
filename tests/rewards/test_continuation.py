import math
import re
from collections import Counter

import pytest

from fastrl.rewards import ContinuationReward

PIECES = [bytes([b]) for b in range(256)] + [b"", b" the", b" cat", b" sat", b" mat", b" on"]
EOS = 256
TEXTS = [
    "The cat sat on the mat. The dog sat on the log, and the cat saw the dog.",
    "A function returns a value. The value of the function is an object of the class.",
    "The list of the names is sorted by the value of the key; the key is a function.",
] * 4
PROMPT = "The function is called with an object, and "
REFERENCE = "the value of the key is an object. The cat sat on the mat again"


@pytest.fixture
def reward() -> ContinuationReward:
    return ContinuationReward(PIECES, TEXTS)


def encode(text: str) -> list[int]:
    """Text as ids, with the longer pieces where they fit."""
    raw, ids = text.encode(), []
    while raw:
        index = next((i for i in range(257, len(PIECES)) if raw.startswith(PIECES[i])), raw[0])
        ids.append(index)
        raw = raw[len(PIECES[index]) :]
    return ids


def total(reward, text, prompt=PROMPT, reference=REFERENCE):
    (rewards,) = reward([prompt], [text], [encode(text)], reference=[reference])
    return math.fsum(rewards)


def words(text):
    return re.findall(r"\w+", text.casefold())


def f1(reward, text, reference):
    """The definition, computed at once."""
    ours, truth = Counter(words(text)), Counter(words(reference))

    def weight(bag):
        return math.fsum(reward.weight(word) * count for word, count in bag.items())

    return 2 * weight(ours & truth) / (weight(ours) + weight(truth))


def test_hand_computed():
    reward = ContinuationReward(PIECES, [], repetition_penalty=0.5, strangeness_penalty=0.25)
    assert reward.weight("any") == pytest.approx(math.log(2))  # all words weigh the same
    ids = encode("b c a b c")
    (rewards,) = reward(["a"], [""], [[ord(" "), *ids, EOS]], reference=[" b c d"])
    # After each word: F1 = 2 common / (words + 3). The pair "c a" is neither in the training
    # text nor in the reference; "a b c" stood there before, once more than the reference has it.
    by_word = [2 / 4, 4 / 5, 4 / 6 - 0.25 / 3, 4 / 7 - 0.25 / 3, 4 / 8 - 0.25 / 3]
    scores = [math.fsum(rewards[: i + 1]) for i in range(len(rewards))]
    assert scores[1::2][:4] == pytest.approx(by_word[:4])
    # "a b c" is of the prompt and the reference's first words, so once is free.
    assert scores[9] == pytest.approx(by_word[4] - 0.5 / 3)
    assert rewards[-1] == 0.0


@pytest.mark.parametrize("text", ["the dog", "a value of the cat, sat On the Mat", REFERENCE])
def test_without_penalties_the_rises_sum_to_the_f1(text):
    reward = ContinuationReward(PIECES, TEXTS, repetition_penalty=0, strangeness_penalty=0)
    assert total(reward, text) == pytest.approx(f1(reward, text, REFERENCE), abs=1e-12)
    assert reward.overlap(PROMPT, encode(text), REFERENCE) == pytest.approx(total(reward, text))


def test_every_prefix_has_the_score_of_its_own_text(reward):
    ids = encode("the cat sat on the mat again, thé cat; the value of 字 the key is the value")
    scores = reward.scores(PROMPT, ids, REFERENCE)
    for length in range(1, len(ids) + 1):
        alone = reward.scores(PROMPT, ids[:length], REFERENCE)
        assert alone[-1] == scores[length - 1]
    (rewards,) = reward([PROMPT], [""], [ids], reference=[REFERENCE])
    assert len(rewards) == len(ids)
    assert math.fsum(rewards) == pytest.approx(scores[-1], abs=1e-12)


def test_the_true_continuation_scores_one_and_nothing_more(reward):
    for prompt in (PROMPT, "the value of the key is an object. The cat", "the ke"):
        for reference in (REFERENCE, "y is a function", " names 字 by the value"):
            assert total(reward, reference, prompt, reference) == pytest.approx(1.0, abs=1e-12)
            longer = max(reward.scores(prompt, encode(reference + " the cat sat"), reference))
            assert longer <= 1.0 + 1e-12


def test_a_repetition_of_the_true_text_costs_nothing(reward):
    twice = "the cat sat on the cat sat"
    assert total(reward, twice, "", twice) == pytest.approx(1.0, abs=1e-12)


def test_text_that_nobody_wants_does_not_score_well_on_real_text():
    topics = pytest.importorskip("pydoc_data.topics").topics
    texts = list(topics.values())
    reward = ContinuationReward(PIECES, texts[:40])
    stretches = [text[i : i + 240] for text in texts[40:] for i in range(0, len(text) - 240, 2400)]
    stretches = [s for s in stretches if len(words(s[120:])) >= 5]
    prompts, references = [s[:120] for s in stretches], [s[120:] for s in stretches]

    def mean(texts):
        if isinstance(texts, str):
            texts = [texts] * len(prompts)
        rewards = reward(prompts, texts, [encode(text) for text in texts], reference=references)
        return math.fsum(map(math.fsum, rewards)) / len(rewards)

    frequent = [word for word, _ in Counter(words(" ".join(texts[:40]))).most_common(18)]
    bad = {
        "empty": "",
        "a word again and again": " the" * 18,
        "a frequent word once": " the",
        "punctuation": " . , ; . \n\n" * 4,
        "a few frequent words": " ".join(frequent[:6]),
        "a list of frequent words": " ".join(frequent),
        "a sentence that is always the same": texts[0][200:320],
        "nonsense": "xq zzk wvb qqp lkj hgf",
        "copies of the prompts": prompts,
    }
    scores = {name: mean(text) for name, text in bad.items()}
    assert max(scores.values()) < 0.03, scores
    assert scores["copies of the prompts"] < 0
    assert mean(references) == pytest.approx(1.0)
    # Two thirds of the truth, and then something else: what a good model might say.
    partly = [ref[:80] + other[:40] for ref, other in zip(references, references[1:], strict=False)]
    assert mean([*partly, references[-1]]) > 0.5


def test_characters_split_over_tokens(reward):
    text = "naïve 字"
    split = list(text.encode())  # one id a byte
    (rewards,) = reward([PROMPT], [""], [split], reference=[text])
    assert math.fsum(rewards) == pytest.approx(1.0)
    assert rewards[split.index("字".encode()[0])] == 0.0  # nothing to see yet
    (rewards,) = reward([PROMPT], [""], [[0xFF, 0xFE, *encode("the cat")]], reference=["the cat"])
    assert math.isfinite(math.fsum(rewards)) and len(rewards) == 2 + len(encode("the cat"))


def test_a_completion_may_go_on_with_the_prompts_last_word(reward):
    joined = total(reward, "tion is an object", "The func", "tion is an object")
    assert joined == pytest.approx(1.0)
    assert total(reward, " is an object", "The function", " is an object") == pytest.approx(1.0)


def test_a_strange_pair_costs_as_soon_as_nothing_known_begins_like_it():
    reward = ContinuationReward(PIECES, ["the cat sat"], strangeness_penalty=1.0)
    ids = encode("the cob")
    scores = reward.scores("", ids, "a b")
    assert PIECES[ids[-2]] == b"o"
    assert scores[-3] == 0.0 and scores[-2] == -0.5 and scores[-1] == -0.5


def test_prompts_may_be_ids_and_a_prompts_completions_are_apart(reward):
    ids = [encode("the cat sat"), encode("the value")]
    both = reward([PROMPT] * 2, ["", ""], ids, reference=[REFERENCE] * 2)
    as_ids = reward([encode(PROMPT)] * 2, ["", ""], ids, reference=[REFERENCE] * 2, other=[1, 2])
    single = [reward([PROMPT], [""], [i], reference=[REFERENCE])[0] for i in ids]
    assert both == as_ids == single


def test_prompts_may_be_chats_and_references_may_lack(reward):
    ids = [encode("the cat sat")] * 2
    chat = [{"role": "user", "content": PROMPT}]
    given = reward([chat, chat], [[], []], ids, reference=[None, REFERENCE])
    assert given == [None, *reward([PROMPT], [""], ids[:1], reference=[REFERENCE])]
    assert ContinuationReward(PIECES, [], name="mine").__name__ == "mine"
    with pytest.raises(TypeError, match="expected reference of texts or None, got list"):
        reward([PROMPT], [""], ids[:1], reference=[[REFERENCE]])


def test_a_long_completion_costs_its_length(reward):
    class Counting(ContinuationReward):
        calls = 0

        def weight(self, word):
            type(self).calls += 1
            assert len(word) <= 64
            return super().weight(word)

    counting = Counting(PIECES, TEXTS)
    counting([PROMPT], [""], [[ord("x")] * 3000], reference=[REFERENCE])
    assert Counting.calls < 4 * 3000


def test_references_without_words(reward):
    assert total(reward, "...", reference="***\n") == 0.0
    assert total(reward, "the cat", reference="***\n") <= 0.0


def test_bad_arguments(reward):
    with pytest.raises(ValueError, match="of the same length, got 1, 2 and 1"):
        reward(["a"], ["", ""], [[1], [2]], reference=["b"])
    assert len(reward(["a"], [""], [[0, 261]], reference=["b"])[0]) == 2
    for outside in (-1, 262):
        with pytest.raises(ValueError, match=rf"expected token ids in \[0, 262\), got {outside}"):
            reward(["a"], [""], [[outside]], reference=["b"])
    with pytest.raises(ValueError, match="expected repetition_penalty finite and >= 0, got nan"):
        ContinuationReward(PIECES, TEXTS, repetition_penalty=math.nan)
    with pytest.raises(ValueError, match="expected strangeness_penalty finite and >= 0, got -1"):
        ContinuationReward(PIECES, TEXTS, strangeness_penalty=-1)
