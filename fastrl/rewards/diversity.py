"""How varied a completion is, and how much of it repeats itself; without references."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

from fastrl.rewards._ngrams import Words
from fastrl.rewards.metric import MetricReward, Reading, References


class DistinctN(MetricReward):
    """The share of distinct n-grams of words in a completion, in [0, 1].

        distinct-n = different n-grams / n-grams

    Words stand between white space. A completion of fewer than n words gives 0. The last word
    counts as it stands. A further word costs O(n).

    Args:
        n: words of an n-gram.
        lowercase: ignore case.
        immediate, scale, tokenizer, name, cache_size: as `MetricReward` has them; name None:
            "distinct_<n>".
    Raises:
        ValueError: n below 1; and as `MetricReward` does.
    Reference: Li et al. 2016, arXiv:1510.03055 (there over all answers to a test set).
    """

    def __init__(
        self,
        n: int = 2,
        lowercase: bool = False,
        *,
        immediate: bool = False,
        scale: float = 1.0,
        tokenizer: Any = None,
        name: str | None = None,
        cache_size: int = 4096,
    ) -> None:
        _check(n, "DistinctN")
        super().__init__(
            _Metric(lambda: _Distinct(n), lowercase),
            immediate=immediate,
            scale=scale,
            reference=None,
            tokenizer=tokenizer,
            name=f"distinct_{n}" if name is None else name,
            cache_size=cache_size,
        )


class Repetition(MetricReward):
    """Minus the share of words that repeat what stood before, in [-1, 0].

        repetition = − words in n-grams that occurred before / words

    A word counts once, however many such n-grams it stands in; the first time that an n-gram
    occurs is free. It is the rule by which Gopher's training text was filtered (duplicate n-grams),
    with the words counted in place of their characters. Words stand between white space; the last
    one counts as it stands. A further word costs O(n).

    Args:
        n: words of an n-gram.
        lowercase: ignore case.
        immediate, scale, tokenizer, name, cache_size: as `MetricReward` has them.
    Raises:
        ValueError: n below 1; and as `MetricReward` does.
    Reference: Rae et al. 2021, arXiv:2112.11446, appendix A.1.1.
    """

    def __init__(
        self,
        n: int = 3,
        lowercase: bool = False,
        *,
        immediate: bool = False,
        scale: float = 1.0,
        tokenizer: Any = None,
        name: str = "repetition",
        cache_size: int = 4096,
    ) -> None:
        _check(n, "Repetition")
        super().__init__(
            _Metric(lambda: _Repeated(n), lowercase),
            immediate=immediate,
            scale=scale,
            reference=None,
            tokenizer=tokenizer,
            name=name,
            cache_size=cache_size,
        )


def _check(n: int, op: str) -> None:
    if n < 1:
        raise ValueError(f"{op}: expected n >= 1, got {n}. Pass the words of an n-gram.")


class _Seen(ABC):
    """The n-grams of a list of words, and which of its words repeat some."""

    def __init__(self, n: int) -> None:
        self.n = n
        self.seen: set[tuple[str, ...]] = set()
        self.recent: tuple[str, ...] = ()
        self.num_words = self.num_repeating = self.repeats_to = 0

    def add(self, word: str) -> None:
        self.num_repeating, self.repeats_to = self._repeating(word)
        self.recent = (*self.recent, word)[-self.n :]
        self.num_words += 1
        if len(self.recent) == self.n:
            self.seen.add(self.recent)

    @abstractmethod
    def score_with(self, words: list[str]) -> float:
        """The score if these words, one at most, came next."""

    def is_new(self, word: str) -> bool | None:
        """Whether the n-gram that it would end is new; None: there are too few words."""
        ngram = (*self.recent, word)[-self.n :]
        return None if len(ngram) < self.n else ngram not in self.seen

    def _repeating(self, word: str) -> tuple[int, int]:
        """How many words repeat something, and the place behind the last one, with this word."""
        if self.is_new(word) is not False:
            return self.num_repeating, self.repeats_to
        end = self.num_words + 1
        return self.num_repeating + end - max(end - self.n, self.repeats_to), end


class _Distinct(_Seen):
    def score_with(self, words: list[str]) -> float:
        num_ngrams = self.num_words + len(words) - self.n + 1
        if num_ngrams <= 0:
            return 0.0
        return (len(self.seen) + sum(bool(self.is_new(word)) for word in words)) / num_ngrams


class _Repeated(_Seen):
    def score_with(self, words: list[str]) -> float:
        num_words = self.num_words + len(words)
        repeating = self._repeating(words[0])[0] if words else self.num_repeating
        return -repeating / num_words if repeating else 0.0


class _Metric:
    def __init__(self, start: Callable[[], _Seen], lowercase: bool) -> None:
        self._start, self._lowercase = start, lowercase

    def against(self, references: References) -> Callable[[], Reading]:
        return lambda: _Reading(self._start(), self._lowercase)


class _Reading:
    def __init__(self, seen: _Seen, lowercase: bool) -> None:
        self._seen, self._words = seen, Words()
        self._of = str.lower if lowercase else str

    def read(self, piece: str) -> None:
        for word in self._words.read(piece):
            self._seen.add(self._of(word))

    def score(self) -> float:
        """With the word that may go on, of which there is one at most."""
        return self._seen.score_with([self._of(word) for word in self._words.last()])
