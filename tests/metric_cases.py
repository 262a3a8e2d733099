"""Random text that is hard for tokenizers of metrics, and the comparison on every prefix."""

import random
from collections.abc import Callable, Sequence

from fastrl.rewards.metric import MetricReward

WORDS = (
    'the a cat sat on mat. Dog, (hi) "quoted" don\'t 3.5 1,000 -5 10-20 x-y - -- ... a.b running '
    "&amp; &quot;x&quot; &amp;quot; <skipped> foo&lt;bar ΑΣ ΣΑ Σ İstanbul straße 中文字 naïve é "
    "$5.00 50% e.g. U.S. The runs ran easily I'm ?! .5 5. , cat, {x} a_b `c`"
).split()
BETWEEN = [" "] * 9 + [
    "  ",
    "\n",
    "-\n",
    "\t",
    "\u3000",
    "\r\n",
    " \n ",
    "",
    "-\n\n",
    "-<skipped>\n",
]
FIXED = [
    ("", ["the cat"]),
    ("the cat", [""]),
    ("", [""]),
    ("a", ["a"]),
    ("b", ["a", ""]),
    ("   \n ", ["the cat"]),
    ("the cat sat on the mat", ["the cat sat on the mat"]),
    ("a-\n b-\n", ["a-", "b"]),
    ("the the the the the", ["the cat the", "the the"]),
    ("1.\n2,3 .4-", ["1. 2,3 .4 -"]),
]


def random_text(most: int) -> str:
    count = random.randrange(most)
    return "".join(random.choice(WORDS) + random.choice(BETWEEN) for _ in range(count))


def random_pieces(text: str) -> list[str]:
    """Cut as tokens are: within words, and between them."""
    pieces = []
    while text:
        size = random.choice([1, 1, 2, 3, 5])
        pieces.append(text[:size])
        text = text[size:]
    return pieces


def random_references(text: str) -> list[str]:
    """Up to three, and most begin like the text."""
    words = text.split(" ")
    starts = [words[: random.randrange(len(words) + 1)] for _ in range(random.choice([1, 1, 2, 3]))]
    return [" ".join([*start, random_text(9)]) for start in starts]


def assert_equals_library(
    reward: MetricReward, library: Callable[[str, Sequence[str]], float], *, count: int = 60
) -> None:
    """On whole texts and on every prefix, however it was cut, within 1e-9."""
    random.seed(0)
    cases = [*FIXED]
    for _ in range(count):
        text = random_text(14)
        cases.append((text, random_references(text)))
    for text, references in cases:
        assert abs(reward.score(text, references) - library(text, references)) < 1e-9
        start = reward.metric.against(tuple(references))
        reading, prefix = start(), ""
        assert abs(reading.score() - library("", references)) < 1e-9
        for piece in random_pieces(text):
            prefix += piece
            reading.read(piece)
            assert abs(reading.score() - library(prefix, references)) < 1e-9, (prefix, references)
