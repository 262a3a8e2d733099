"""ROUGE-N and ROUGE-L, as the text grows."""

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

from fastrl.rewards._ngrams import Ngram, NgramMatches, count_ngrams
from fastrl.rewards.metric import EveryPrefix, Metric, MetricReward, Reading, References, imported

_WORD = re.compile("[a-z0-9]+")
_MEASURES = ("fmeasure", "precision", "recall")


class ROUGE(MetricReward):
    """ROUGE of a completion, in [0, 1]: what `rouge_score.rouge_scorer.RougeScorer` gives.

        precision = matches / n-grams of the completion
        recall = matches / n-grams of the reference
        fmeasure = 2 · precision · recall / (precision + recall)

    Matches of "rouge1", "rouge2", ... are n-grams that both have; those of "rougeL" the words of
    their longest common subsequence, found bit by bit (Hyyrö 2004): a further word costs a few
    operations on integers of as many bits as the reference has words. "rougeLsum" compares line
    with line; the library is called on every prefix for it. Words are runs of a-z and 0-9 in lower
    case, other alphabets have none. Of several references the one with the best fmeasure counts.

    Args:
        kind: "rouge1" to "rouge9", "rougeL" or "rougeLsum".
        use_stemmer: compare the stems of words (Porter).
        measure: "fmeasure", "precision" or "recall".
        immediate, scale, reference, tokenizer, name, cache_size: as `MetricReward` has them; name
            None: that of the kind.
    Raises:
        ValueError: no such kind or measure; and as `MetricReward` does.
        ImportError: "rougeLsum" or the stemmer, and the package rouge_score is missing.
    Reference: Lin 2004, https://aclanthology.org/W04-1013; Hyyrö 2004, bit-parallel LCS revisited.
    """

    def __init__(
        self,
        kind: str = "rougeL",
        use_stemmer: bool = False,
        measure: str = "fmeasure",
        *,
        immediate: bool = False,
        scale: float = 1.0,
        reference: str = "reference",
        tokenizer: Any = None,
        name: str | None = None,
        cache_size: int = 4096,
    ) -> None:
        if not re.fullmatch("rouge([1-9]|L|Lsum)", kind):
            raise ValueError(
                'ROUGE: expected kind "rouge1" to "rouge9", "rougeL" or "rougeLsum", got '
                f"{kind!r}. Leave it out for rougeL."
            )
        if measure not in _MEASURES:
            raise ValueError(
                f"ROUGE: expected measure one of {_MEASURES}, got {measure!r}. "
                "Leave it out for fmeasure."
            )
        metric: Metric
        if kind == "rougeLsum":
            metric = _by_library(kind, use_stemmer, measure)
        else:
            order = 0 if kind == "rougeL" else int(kind[-1])
            metric = _Metric(order, measure, _stemmer() if use_stemmer else str)
        super().__init__(
            metric,
            immediate=immediate,
            scale=scale,
            reference=reference,
            tokenizer=tokenizer,
            name=kind if name is None else name,
            cache_size=cache_size,
        )


def _by_library(kind: str, use_stemmer: bool, measure: str) -> EveryPrefix:
    scorer = imported("rouge_score.rouge_scorer", "ROUGE").RougeScorer([kind], use_stemmer)
    return EveryPrefix(
        lambda text, references: getattr(scorer.score_multi(references, text)[kind], measure)
    )


def _stemmer() -> Callable[[str], str]:
    """The library's own: words of at most three characters stay as they are."""
    imported("rouge_score", "ROUGE")  # which brings nltk
    stem = imported("nltk.stem.porter", "ROUGE").PorterStemmer().stem
    return lru_cache(2**16)(lambda word: stem(word) if len(word) > 3 else word)


class _Matches(Protocol):
    """How much of a list of words one reference has."""

    total: int

    def extend(self, words: list[str]) -> Any: ...

    def count_with(self, words: list[str]) -> int:
        """Matches if these words came next."""
        ...


@dataclass(frozen=True)
class _Metric:
    order: int  # of the n-grams; 0: longest common subsequence
    measure: str
    stem: Callable[[str], str]

    def against(self, references: References) -> Callable[[], Reading]:
        starts = [self._start([*map(self.stem, _WORD.findall(t.lower()))]) for t in references]
        return lambda: _Reading(self, [start() for start in starts])

    def _start(self, words: list[str]) -> Callable[[], _Matches]:
        if self.order:
            ngrams = count_ngrams(words, self.order)
            total = max(0, len(words) - self.order + 1)
            return lambda: _OfOrder(ngrams, self.order, total)
        places: dict[str, int] = {}
        for place, word in enumerate(words):
            places[word] = places.get(word, 0) | 1 << place
        return lambda: _CommonSubsequence(places, len(words))


class _Reading:
    def __init__(self, metric: _Metric, references: list[_Matches]) -> None:
        self._metric, self._references = metric, references
        self._open = ""  # the last word, which may go on
        self._num_words = 0

    def read(self, piece: str) -> None:
        text = self._open + piece.lower()
        words = _WORD.findall(text)
        self._open = words.pop() if words and text.endswith(words[-1]) else ""
        words = [*map(self._metric.stem, words)]
        self._num_words += len(words)
        for reference in self._references:
            reference.extend(words)

    def score(self) -> float:
        last = [self._metric.stem(self._open)] if self._open else []
        count = self._num_words + len(last) - max(0, self._metric.order - 1)
        scores = [self._score(reference, last, count) for reference in self._references]
        return max(scores, key=lambda of: of["fmeasure"])[self._metric.measure]

    def _score(self, reference: _Matches, last: list[str], count: int) -> dict[str, float]:
        matches = reference.count_with(last)
        precision, recall = matches / max(count, 1), matches / max(reference.total, 1)
        both = precision + recall
        fmeasure = 2 * precision * recall / both if both > 0 else 0.0
        return {"precision": precision, "recall": recall, "fmeasure": fmeasure}


class _OfOrder:
    """Matches of n-grams of one order."""

    def __init__(self, ngrams: Counter[Ngram], order: int, total: int) -> None:
        self.total = total
        self._matches = NgramMatches(ngrams, order)

    def extend(self, words: list[str]) -> None:
        self._matches.extend(words)

    def count_with(self, words: list[str]) -> int:
        return self._matches.with_tokens(words)[-1]


class _CommonSubsequence:
    """The length of the longest common subsequence with a reference.

    A bit of `column` is 0 where the length rises from one word of the reference to the next.
    """

    def __init__(self, places: dict[str, int], total: int) -> None:
        self.total = total
        self._places, self._all = places, (1 << total) - 1
        self._column = self._all

    def extend(self, words: list[str]) -> None:
        self._column = self._after(words)

    def count_with(self, words: list[str]) -> int:
        return self.total - self._after(words).bit_count()

    def _after(self, words: list[str]) -> int:
        column = self._column
        for word in words:
            same = column & self._places.get(word, 0)
            if same:
                column = ((column + same) | (column - same)) & self._all
        return column
