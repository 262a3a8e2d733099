"""Words and n-grams of a text that grows, and their matches with those of a reference."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

Ngram = tuple[str, ...]


def count_ngrams(tokens: Sequence[str], max_order: int) -> Counter[Ngram]:
    """How often each n-gram of 1 to max_order tokens occurs."""
    return Counter(
        tuple(tokens[i : i + n])
        for n in range(1, max_order + 1)
        for i in range(len(tokens) - n + 1)
    )


class NgramMatches:
    """Matches of the n-grams of a list of tokens, each counted no more often than the reference.

    Attributes:
        matches: by order less 1, how many n-grams match.

    Args:
        reference: counts of all n-grams of 1 to max_order tokens.
        max_order: the longest.
    """

    def __init__(self, reference: Mapping[Ngram, int], max_order: int) -> None:
        self._left = dict(reference)
        self._max_order = max_order
        self._recent: Ngram = ()
        self.matches = [0] * max_order

    def extend(self, tokens: Iterable[str]) -> list[Ngram]:
        """Append tokens; gives the n-grams that found a match. A token costs O(max_order)."""
        found = []
        for token in tokens:
            self._recent = (*self._recent, token)[-self._max_order :]
            for n in range(1, len(self._recent) + 1):
                ngram = self._recent[-n:]
                left = self._left.get(ngram)
                if left is None:  # then no longer one stands in the reference either
                    break
                if left:
                    self._left[ngram] = left - 1
                    self.matches[n - 1] += 1
                    found.append(ngram)
        return found

    def with_tokens(self, tokens: Iterable[str]) -> list[int]:
        """The matches if these tokens came next."""
        recent, before = self._recent, list(self.matches)
        for ngram in self.extend(tokens):
            self._left[ngram] += 1
        after, self.matches, self._recent = self.matches, before, recent
        return after


class Words:
    """Words between white space, as str.split finds them, of a text that grows."""

    def __init__(self) -> None:
        self.open = ""  # the last word, which may go on

    def read(self, piece: str) -> list[str]:
        """The words that are finished with this piece."""
        text = self.open + piece
        words = text.split()
        self.open = words.pop() if words and not text[-1].isspace() else ""
        return words

    def last(self) -> list[str]:
        """The word that may go on, if there is one."""
        return [self.open] if self.open else []
