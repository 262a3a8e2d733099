"""Questions to a person about completions, and writing each answer before the next question."""

import hashlib
import math
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastrl.rewards._judgements import Answers, now
from fastrl.rewards._record_file import RecordFile
from fastrl.rewards._terminal import Keys, Screen

ANSWERED, UNDO, LATE = "answered", "undo", "late"
_QUIT, _UNDO = ("q", "quit"), ("u", "undo")


class Leave(Exception):
    """The person wants to stop."""


@dataclass(frozen=True)
class Question:
    """An item that is judged.

    Attributes:
        id: the item's.
        prompt: what the texts continue.
        texts: by title, what is judged.
        hint: says which answers there are.
        answers: by what is typed, what its line says.
    """

    id: str
    prompt: str
    texts: Mapping[str, str]
    hint: str
    answers: Mapping[str, dict[str, Any]]

    @property
    def is_single(self) -> bool:
        """Whether a key is enough: only words, which have a short form, are longer."""
        return all(len(typed) == 1 or typed.isalpha() for typed in self.answers)

    @property
    def kind(self) -> str:
        """ "rating" or "choice"."""
        return "rating" if "rating" in next(iter(self.answers.values())) else "choice"


def pair_question(item: str, prompt: str, a: str, b: str, *, seed: object) -> Question:
    """Which of two completions is better; a fair coin of the seed and the id swaps the sides."""
    is_swapped = hashlib.sha256(f"{seed}\n{item}".encode(errors="backslashreplace")).digest()[0] & 1
    left, right = (b, a) if is_swapped else (a, b)
    choices = {"a": "b", "b": "a"} if is_swapped else {"a": "a", "b": "b"}
    choices |= {"t": "tie", "tie": "tie", "s": "skip", "skip": "skip"}
    answers = {typed: {"choice": choice} for typed, choice in choices.items()}
    return Question(item, prompt, {"A": left, "B": right}, "a, b, t(ie)", answers)


def rating_question(item: str, prompt: str, completion: str, scale: Sequence[int]) -> Question:
    """How good a completion is, as a whole number of the scale."""
    low, high = scale
    answers: dict[str, dict[str, Any]] = {str(x): {"rating": x} for x in range(low, high + 1)}
    answers |= {"s": {"rating": None}, "skip": {"rating": None}}
    return Question(item, prompt, {"completion": completion}, f"{low} to {high}", answers)


class Interview:
    """Asks one person, and appends each answer to a file before anything else is shown.

    Args:
        file: open.
        answers: what stands in it; kept up to date.
        annotator: the person.
    """

    def __init__(
        self, file: RecordFile, answers: Answers, annotator: str, keys: Keys, screen: Screen
    ) -> None:
        self.file, self.answers, self.annotator = file, answers, annotator
        self.keys, self.screen = keys, screen

    def run(self, questions: Iterable[Question], end: float = math.inf) -> None:
        """Ask what this person has not answered, in order, until `end` of time.monotonic().

        Raises:
            Leave: they quit.  EOFError: there are no more answers to read.
        """
        known = {question.id: question for question in questions}
        done = self.answers.of(self.annotator)
        waiting = deque(question for question in known.values() if question.id not in done)
        while waiting:
            head = f"{len(known) - len(waiting) + 1}/{len(known)}"
            left = None if end == math.inf else max(0.0, end - time.monotonic())
            outcome = self.ask(waiting[0], head, left)
            if outcome == LATE:
                return
            if outcome == UNDO:
                self.undo(known, waiting)
            else:
                waiting.popleft()

    def ask(self, question: Question, head: str, timeout: float | None = None) -> str:
        """Show a question and write its answer; ANSWERED, UNDO, or LATE after `timeout` seconds.

        Raises:
            ValueError: the answers so far are of the other kind; nothing is asked or written then.
        """
        self.answers.check_kind(question.kind)
        self.keys.listen(single=question.is_single)
        self.screen.show(head, question.prompt, question.texts)
        while True:
            self.screen.ask(f"{question.hint}, s(kip), u(ndo), q(uit)?")
            typed = self.keys.answer(single=question.is_single, timeout=timeout)
            if question.is_single or not self.keys.is_terminal:  # else the terminal showed it
                self.screen.say(typed or "")
            if typed is None:
                return LATE
            wish = self._wish(typed)
            if wish in _UNDO:
                return UNDO
            if wish in question.answers:
                self._write(question.id, question.answers[wish])
                return ANSWERED
            self.screen.say(f"Expected {question.hint}, s, u or q, got {typed!r}.")

    def idle(self, seconds: float) -> bool:
        """Wait that long for a wish to undo, while nothing is asked.

        Other keys say nothing about what is not shown yet. Lines of a pipe were written for what
        is to come: they stay.
        """
        typed = self.keys.answer(timeout=seconds)
        if typed is None:
            return False
        is_undo = self._wish(typed) in _UNDO
        if not is_undo and not self.keys.is_terminal:
            self.keys.put_back(typed)
            time.sleep(seconds)
        return is_undo

    def undo(self, known: Mapping[str, Question], waiting: "deque[Question]") -> None:
        """Take the last answer to one of these questions back, and ask it first."""
        done = self.answers.of(self.annotator)
        last = next((item for item in reversed(done) if item in known), None)
        if last is None:
            self.screen.say("There is nothing to undo.")
            return
        self._write(last, {"retracted": True})
        waiting.appendleft(known[last])

    @staticmethod
    def _wish(typed: str) -> str:
        """In lower case; raises Leave."""
        if typed.lower() in _QUIT:
            raise Leave
        return typed.lower()

    def _write(self, item: str, fields: Mapping[str, Any]) -> None:
        record = {"id": item, "annotator": self.annotator, **fields, "time": now()}
        self.file.append(record)
        self.answers.add(record)
