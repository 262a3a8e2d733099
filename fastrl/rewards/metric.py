"""Metrics of a text against references, read as the text grows, and reward functions of them."""

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any, Protocol

from fastrl.rewards._references import References, references_in
from fastrl.rewards._texts import text_of
from fastrl.rewards.token_pieces import TokenPieces


class Reading(Protocol):
    """A text that is read piece by piece, and its score so far."""

    def read(self, piece: str) -> None:
        """Take in more text."""
        ...

    def score(self) -> float:
        """The score of all that was read, as if it ended there; 0 pieces are the empty text."""
        ...


class Metric(Protocol):
    """The score of a text against references, for every prefix of the text."""

    def against(self, references: References) -> Callable[[], Reading]:
        """What starts a reading; what only depends on the references is computed here, once."""
        ...


class EveryPrefix:
    """A metric by calling a function on the whole of every prefix: no part of it is kept.

    Args:
        function: f(text, references) -> float.
    """

    def __init__(self, function: Callable[[str, References], float]) -> None:
        self.function = function

    def against(self, references: References) -> Callable[[], Reading]:
        return lambda: _WholeText(lambda text: self.function(text, references))


class MetricReward:
    """A reward function of a metric, called as the trainers and TRL call theirs.

        reward = scale · score(completion)                              immediate=False
        reward_i = scale · (score(prefix_i) − score(prefix_{i−1}))      immediate=True

    prefix_i is the text that the first i ids complete (`TokenPieces`), and score(prefix_0) counts
    as 0, so the immediate rewards of a completion sum to its score. Scores are kept for the texts
    that were seen last: completions of a group often repeat.

    Args:
        metric: a `Metric`, or a function f(text, references) -> float, which is then called on
            every prefix.
        immediate: one reward per completion id, not one per completion.
        scale: a factor.
        reference: the column with the reference of each completion: a text, a list of texts, or
            None for no opinion on the completion; None: the metric has no references.
        tokenizer: the trainer's, to cut a completion into the pieces of its ids.
        name: what metrics call it.
        cache_size: completions, and references, that are remembered.
    Raises:
        ValueError: immediate=True without a tokenizer; cache_size below 1.
        TypeError: metric is neither.
    """

    def __init__(
        self,
        metric: Metric | Callable[[str, References], float],
        *,
        immediate: bool = False,
        scale: float = 1.0,
        reference: str | None = "reference",
        tokenizer: Any = None,
        name: str = "metric",
        cache_size: int = 4096,
    ) -> None:
        self._op = type(self).__name__
        if not hasattr(metric, "against") and not callable(metric):
            raise TypeError(
                f"{self._op}: expected metric a Metric or a function of text and references, got "
                f"{type(metric).__name__}. Pass one of these."
            )
        if immediate and tokenizer is None and self._cuts_text():
            raise ValueError(
                f"{self._op}: expected tokenizer with immediate=True, got None. Pass the "
                "tokenizer that the trainer has, to cut completions into the texts of their ids."
            )
        if cache_size < 1:
            raise ValueError(
                f"{self._op}: expected cache_size >= 1, got {cache_size}. Leave it out for 4096."
            )
        self.metric: Metric = metric if hasattr(metric, "against") else EveryPrefix(metric)
        self.immediate, self.scale, self.reference = immediate, scale, reference
        self.__name__ = name
        self._pieces = None if tokenizer is None else TokenPieces(tokenizer)
        self._targets = _Recent(cache_size)
        self._known = _Recent(cache_size)

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Sequence[Sequence[int]],
        **columns: Any,
    ) -> list[Any]:
        """Rewards of a batch.

        Args:
            prompts: not read.
            completions: texts, or lists of chat messages.
            completion_ids: token ids of each completion, EOS included.
            columns: the one named by `reference` is read.
        Returns:
            For each completion a float, or a list of floats, one per id; None without reference.
        Raises:
            ValueError: the references are missing, too few, or no texts; with immediate=True, ids
                do not give the text of their completion.
            TypeError: completions without text.
        """
        if not self.immediate:
            return [
                None if against is None else self.scale * self._whole(completion, ids, against)
                for completion, ids, against in self._rows(completions, completion_ids, columns)
            ]
        return [
            None if scores is None else rises(scores)
            for scores in self.prefix_scores(completions, completion_ids, **columns)
        ]

    def score(self, text: str, references: Sequence[str] | str = ()) -> float:
        """The metric of one text, without `scale`.

        Args:
            references: texts, or one text; none for a metric without references.
        Raises:
            ValueError: the metric needs references, and there are none.
        """
        references = (references,) if isinstance(references, str) else tuple(references)
        if self.reference is not None and not references:
            raise ValueError(
                f"{self._op}: expected references to score a text, got none. Pass at least one."
            )
        reading = self._begin(references)
        reading.read(text)
        return reading.score()

    def prefix_scores(
        self,
        completions: Sequence[Any],
        completion_ids: Sequence[Sequence[int]],
        **columns: Any,
    ) -> list[list[float] | None]:
        """Of each completion scale · score(prefix) before the first id and after each of them.

        Returns:
            len(ids) + 1 floats for each completion; None without reference.
        Raises:
            ValueError: as a call does; there is no tokenizer.
        """
        if self._pieces is None and self._cuts_text():
            raise ValueError(
                f"{self._op}: expected tokenizer for scores of prefixes, got None. Pass the "
                "tokenizer that the trainer has."
            )
        found = [
            None if against is None else self._prefixes(completion, ids, against)
            for completion, ids, against in self._rows(completions, completion_ids, columns)
        ]
        return [None if row is None else [self.scale * score for score in row] for row in found]

    def _cuts_text(self) -> bool:
        """Whether prefixes need the texts of the ids."""
        return True

    def _whole(self, completion: Any, ids: Sequence[int], references: References) -> float:
        text = text_of(completion)
        return self._known.get((text, references), lambda: self.score(text, references))

    def _prefixes(
        self, completion: Any, ids: Sequence[int], references: References
    ) -> Sequence[float]:
        pieces = self._cut(text_of(completion), ids)
        return self._known.get((pieces, references), lambda: self._read(pieces, references))

    def _read(self, pieces: tuple[str, ...], references: References) -> list[float]:
        reading = self._begin(references)
        scores = [reading.score()]
        for piece in pieces:
            if piece:
                reading.read(piece)
            scores.append(reading.score() if piece else scores[-1])
        return scores

    def _begin(self, references: References) -> Reading:
        return self._targets.get(references, lambda: self.metric.against(references))()

    def _cut(self, text: str, ids: Sequence[int]) -> tuple[str, ...]:
        assert self._pieces is not None
        pieces = self._pieces(ids)
        if "".join(pieces) != text:  # an EOS that the tokenizer does not know as special
            pieces = [*self._pieces(ids[:-1]), ""][: len(ids)]
        if "".join(pieces) != text:
            raise ValueError(
                f"{self._op}: expected completion_ids that decode to their completion {text!r}, "
                f"got {''.join(self._pieces(ids))!r}. Pass the tokenizer that the trainer has."
            )
        return tuple(pieces)

    def _rows(
        self,
        completions: Sequence[Any],
        completion_ids: Sequence[Sequence[int]],
        columns: Mapping[str, Any],
    ) -> list[tuple[Any, Sequence[int], References | None]]:
        references: list[References | None] = [()] * len(completions)
        if self.reference is not None:
            references = references_in(columns, self.reference, self._op)
        if not len(completions) == len(completion_ids) == len(references):
            raise ValueError(
                f"{self._op}: expected completions, completion_ids and references of the same "
                f"length, got {len(completions)}, {len(completion_ids)} and {len(references)}. "
                "Pass one entry of each for every completion."
            )
        return list(zip(completions, completion_ids, references, strict=True))


def rises(scores: Sequence[float]) -> list[float]:
    """From each score after the first to the next; they sum to the last, the first counts as 0."""
    given, rewards = 0.0, []
    for score in scores[1:]:
        rewards.append(score - given)
        given += rewards[-1]  # what was really given: rounding does not add up
    return rewards


class _WholeText:
    def __init__(self, function: Callable[[str], float]) -> None:
        self._function, self._text = function, ""

    def read(self, piece: str) -> None:
        self._text += piece

    def score(self) -> float:
        return float(self._function(self._text))


class _Recent:
    """Values by key; of those that were asked for least recently, the surplus is forgotten."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._values: OrderedDict[Any, Any] = OrderedDict()

    def get(self, key: Any, make: Callable[[], Any]) -> Any:
        if key in self._values:
            self._values.move_to_end(key)
            return self._values[key]
        value = self._values[key] = make()
        if len(self._values) > self._size:
            self._values.popitem(last=False)
        return value


def imported(module: str, op: str) -> Any:
    """An optional module of the extra "metrics".

    Raises:
        ImportError: its package is not installed.
    """
    try:
        return import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise ImportError(
            f"{op}: expected the package {package}, got none. "
            'Install it: pip install "fastrl[metrics]"'
        ) from error
