"""Rewards for completions of a wanted form."""

import json
import re
from collections.abc import Callable, Sequence
from typing import Any

from fastrl.rewards.metric import EveryPrefix, Metric, MetricReward, Reading, References


class FormatReward(MetricReward):
    """1 for a completion of the wanted form, 0 for another; part of it for tags; no references.

    - A regular expression: 1 where it matches the whole text; "." matches line ends too.
    - "json": 1 where the text is one JSON value (NaN and Infinity are none).
    - A list of tags, ["think", "answer"]: the share of the marks <think>, </think>, <answer>,
      </answer> that the text has, in this order; 0 as soon as a mark stands in a wrong place, and
      where anything but white space stands outside of the tags.

    Tags are read as the text grows. With immediate=True the other two look at every prefix anew,
    which takes the square of the length: the reward stands where the form is reached, and is taken
    back where it is left again.

    Args:
        pattern: the form.
        immediate, scale, tokenizer, name, cache_size: as `MetricReward` has them.
    Raises:
        ValueError: the regular expression is none; no tags, the same twice, or tags of other
            characters than letters, digits, "_" and "-"; and as `MetricReward` does.
    Reference: the tags are those of DeepSeek-R1, arXiv:2501.12948, section 2.2.
    """

    def __init__(
        self,
        pattern: str | Sequence[str],
        *,
        immediate: bool = False,
        scale: float = 1.0,
        tokenizer: Any = None,
        name: str = "format",
        cache_size: int = 4096,
    ) -> None:
        super().__init__(
            _metric(pattern),
            immediate=immediate,
            scale=scale,
            reference=None,
            tokenizer=tokenizer,
            name=name,
            cache_size=cache_size,
        )


def _metric(pattern: str | Sequence[str]) -> Metric:
    if pattern == "json":
        return EveryPrefix(lambda text, _: float(_is_json(text)))
    if not isinstance(pattern, str):
        return _Tags(pattern)
    try:
        compiled = re.compile(pattern, re.DOTALL)
    except re.error as error:
        raise ValueError(
            f"FormatReward: expected pattern a regular expression, got {pattern!r}: {error}. "
            'Repair it, or pass "json" or a list of tags.'
        ) from error
    return EveryPrefix(lambda text, _: float(compiled.fullmatch(text) is not None))


def _is_json(text: str) -> bool:
    try:
        json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):  # the answer to the question; deeper than Python reads
        return False
    return True


def _refuse(constant: str) -> None:
    raise ValueError(constant)


class _Tags:
    def __init__(self, names: Sequence[str]) -> None:
        names = list(names)
        is_good = all(isinstance(name, str) and re.fullmatch(r"[\w-]+", name) for name in names)
        if not names or not is_good or len(set(names)) < len(names):
            raise ValueError(
                "FormatReward: expected tags of different names of letters, digits, _ and -, got "
                f'{names}. Pass something like ["think", "answer"].'
            )
        self.marks = [mark for name in names for mark in (f"<{name}>", f"</{name}>")]
        self.any_mark = re.compile("|".join(map(re.escape, self.marks)))
        self.longest = max(map(len, self.marks))

    def against(self, references: References) -> Callable[[], Reading]:
        return lambda: _TagReading(self)


class _TagReading:
    def __init__(self, tags: _Tags) -> None:
        self._tags = tags
        self._num_marks = 0  # in their places so far
        self._open = ""  # text that may hold the beginning of a mark
        self._is_broken = False

    def read(self, piece: str) -> None:
        self._open += piece
        while not self._is_broken and self._step():
            pass

    def score(self) -> float:
        return 0.0 if self._is_broken else self._num_marks / len(self._tags.marks)

    def _step(self) -> bool:
        """Read up to behind the next mark; False where there is none yet."""
        marks, longest = self._tags.marks, self._tags.longest
        wanted = marks[self._num_marks] if self._num_marks < len(marks) else ""
        if self._num_marks % 2 == 0:  # outside of the tags
            self._open = self._open.lstrip()
            if not wanted or not self._open.startswith(wanted):
                self._is_broken = not wanted.startswith(self._open)
                return False
            end = len(wanted)
        else:
            found = self._tags.any_mark.search(self._open)
            if found is None:
                self._open = self._open[-longest + 1 :]
                return False
            if found.group() != wanted:
                self._is_broken = True
                return False
            end = found.end()
        self._open = self._open[end:]
        self._num_marks += 1
        return True
