"""Lower case of a text that grows."""

from collections.abc import Callable

from fastrl.rewards.metric import Reading


class LowercaseReading:
    """A reading of the text in lower case, as str.lower gives it for the whole.

    Only a Greek capital sigma becomes something else at the end of a word: a text with one is
    read again from the start with each piece.
    """

    def __init__(self, begin: Callable[[], Reading]) -> None:
        self._begin, self._inner, self._text = begin, begin(), ""
        self._has_sigma = False

    def read(self, piece: str) -> None:
        self._text += piece
        self._has_sigma = self._has_sigma or "\u03a3" in piece
        if self._has_sigma:
            self._inner = self._begin()
            self._inner.read(self._text.lower())
        else:
            self._inner.read(piece.lower())

    def score(self) -> float:
        return self._inner.score()
