"""chrF and chrF++: F-score of character n-grams, and of words, as the text grows."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fastrl.rewards._lowercase import LowercaseReading
from fastrl.rewards._ngrams import Ngram, NgramMatches, Words, count_ngrams
from fastrl.rewards.metric import MetricReward, Reading, References

_PUNCTUATION = frozenset("!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~")
_EPSILON = 1e-16


class ChrF(MetricReward):
    """chrF of a completion, in [0, 1]: what `sacrebleu.sentence_chrf` gives, divided by 100.

        chrF = (1 + β²) P R / (β² P + R)

    P and R are the precision and recall of n-grams, averaged over the orders that both texts have:
    characters of 1 to char_order, white space left out, and words of 1 to word_order. Of several
    references the best one counts. A further character costs O(char_order) for each reference, a
    further piece of text O(char_order + word_order) more; sacrebleu itself is not needed. Only
    with lowercase=True, a text with a Greek capital sigma is read again for every prefix.

    Args:
        char_order: longest n-gram of characters.
        word_order: longest n-gram of words; 2 makes it chrF++.
        beta: how much more recall weighs than precision.
        lowercase: ignore case.
        whitespace: keep white space in n-grams of characters.
        eps_smoothing: average the F-scores of all orders, as chrF++.py and NLTK do.
        immediate, scale, reference, tokenizer, name, cache_size: as `MetricReward` has them.
    Raises:
        ValueError: orders below 0 or both 0, beta not above 0; and as `MetricReward` does.
    Reference: Popović 2015, https://aclanthology.org/W15-3049; 2017 (chrF++), W17-4770.
    """

    def __init__(
        self,
        char_order: int = 6,
        word_order: int = 0,
        beta: float = 2,
        lowercase: bool = False,
        whitespace: bool = False,
        eps_smoothing: bool = False,
        *,
        immediate: bool = False,
        scale: float = 1.0,
        reference: str = "reference",
        tokenizer: Any = None,
        name: str = "chrf",
        cache_size: int = 4096,
    ) -> None:
        if min(char_order, word_order) < 0 or char_order + word_order < 1:
            raise ValueError(
                "ChrF: expected char_order and word_order >= 0 and not both 0, got "
                f"{char_order} and {word_order}. Leave them out for chrF."
            )
        if not beta > 0:
            raise ValueError(f"ChrF: expected beta > 0, got {beta}. Leave it out for chrF2.")
        super().__init__(
            _Metric(char_order, word_order, beta, lowercase, whitespace, eps_smoothing),
            immediate=immediate,
            scale=scale,
            reference=reference,
            tokenizer=tokenizer,
            name=name,
            cache_size=cache_size,
        )


@dataclass(frozen=True)
class _Target:
    """What is known of a reference: n-grams and how many there are of each order."""

    chars: Counter[str]
    words: Counter[Ngram]
    totals: list[int]


@dataclass(frozen=True)
class _Metric:
    char_order: int
    word_order: int
    beta: float
    lowercase: bool
    whitespace: bool
    eps_smoothing: bool

    def against(self, references: References) -> Callable[[], Reading]:
        targets = [self._target(text.lower() if self.lowercase else text) for text in references]

        def begin() -> Reading:
            return _Reading(self, targets)

        return (lambda: LowercaseReading(begin)) if self.lowercase else begin

    def visible(self, text: str) -> str:
        return text if self.whitespace else "".join(text.split())

    def _target(self, text: str) -> _Target:
        visible = self.visible(text)
        orders = range(1, self.char_order + 1)
        chars = Counter(visible[i : i + n] for n in orders for i in range(len(visible) - n + 1))
        words = [t for word in text.split() for t in _tokens(word)] if self.word_order else []
        totals = [max(0, len(visible) - n + 1) for n in orders]
        totals += [max(0, len(words) - n) for n in range(self.word_order)]
        return _Target(chars, count_ngrams(words, self.word_order), totals)

    def f_score(self, matches: list[int], counts: list[int], totals: list[int]) -> float:
        """Of the numbers of matches, of n-grams of the text and of the reference, by order."""
        if self.eps_smoothing:
            return self._smoothed(matches, counts, totals)
        precision = recall = 0.0
        num_orders = 0
        for match, count, total in zip(matches, counts, totals, strict=True):
            if count > 0 and total > 0:
                precision += match / count
                recall += match / total
                num_orders += 1
        if precision + recall == 0:
            return 0.0
        factor = self.beta**2
        precision, recall = precision / num_orders, recall / num_orders
        return (1 + factor) * precision * recall / (factor * precision + recall)

    def _smoothed(self, matches: list[int], counts: list[int], totals: list[int]) -> float:
        factor, sum_of_scores = self.beta**2, 0.0
        for match, count, total in zip(matches, counts, totals, strict=True):
            precision = match / count if count > 0 and total > 0 else _EPSILON
            recall = match / total if total > 0 else _EPSILON
            weighted = factor * precision + recall
            score = (1 + factor) * precision * recall / weighted if weighted > 0 else _EPSILON
            sum_of_scores += score
        return sum_of_scores / len(totals)


class _Reading:
    def __init__(self, metric: _Metric, targets: list[_Target]) -> None:
        self._metric, self._targets = metric, targets
        self._recent, self._length = "", 0  # of the visible characters
        self._words, self._num_words = Words(), 0
        self._left = [dict(target.chars) for target in targets]
        self._char_matches = [[0] * metric.char_order for _ in targets]
        self._word_matches = [NgramMatches(target.words, metric.word_order) for target in targets]

    def read(self, piece: str) -> None:
        visible = self._metric.visible(piece)
        order = self._metric.char_order
        text = self._recent + visible
        for left, matches in zip(self._left, self._char_matches, strict=True):
            _read_chars(text, len(self._recent), order, left, matches)
        self._recent = text[max(0, len(text) - order + 1) :] if order > 1 else ""
        self._length += len(visible)
        if self._metric.word_order:
            tokens = [token for word in self._words.read(piece) for token in _tokens(word)]
            self._num_words += len(tokens)
            for word_matches in self._word_matches:
                word_matches.extend(tokens)

    def score(self) -> float:
        metric = self._metric
        counts = [max(0, self._length - n) for n in range(metric.char_order)]
        last: list[str] = []
        if metric.word_order:
            last = [token for word in self._words.last() for token in _tokens(word)]
            num_words = self._num_words + len(last)
            counts += [max(0, num_words - n) for n in range(metric.word_order)]
        best = 0.0
        for i, target in enumerate(self._targets):
            matches = self._char_matches[i]
            if metric.word_order:
                matches = matches + self._word_matches[i].with_tokens(last)
            best = max(best, metric.f_score(matches, counts, target.totals))
        return best


def _read_chars(
    text: str, start: int, order: int, left: dict[str, int], matches: list[int]
) -> None:
    """Count the matches of the n-grams that end at start or later."""
    for end in range(start + 1, len(text) + 1):
        for begin in range(end - 1, max(0, end - order) - 1, -1):
            ngram = text[begin:end]
            count = left.get(ngram)
            if count:
                left[ngram] = count - 1
                matches[end - begin - 1] += 1
            elif count is None:  # then no longer one stands in the reference either
                break


def _tokens(word: str) -> list[str]:
    """A word without its punctuation, and that: at its end, or else at its beginning."""
    if len(word) > 1 and word[-1] in _PUNCTUATION:
        return [word[:-1], word[-1]]
    if len(word) > 1 and word[0] in _PUNCTUATION:
        return [word[0], word[1:]]
    return [word]
