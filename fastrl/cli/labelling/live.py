"""Rating completions as a running training samples them."""

import os
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fastrl.cli.labelling.session import leave_cleanly
from fastrl.rewards._asking import UNDO, Interview, Question, rating_question
from fastrl.rewards._judgements import Answers, content_id
from fastrl.rewards._record_file import Record, RecordFile, Tail, lock
from fastrl.rewards._scale import checked_scale
from fastrl.rewards._terminal import Keys, Screen
from fastrl.rewards.human import RATINGS, REQUESTS

POLL_SECONDS = 0.1


class Requests:
    """What a training asks, less what was answered, or is not waited for any more.

    Args:
        folder: of its HumanReward.
        annotator: who answers.
    """

    def __init__(self, folder: Path, annotator: str) -> None:
        self.answers, self.annotator = Answers(), annotator
        self.known: dict[str, Question] = {}
        self.waiting: deque[Question] = deque()
        self._requests, self._ratings = Tail(folder / REQUESTS), Tail(folder / RATINGS)
        self._records: dict[str, Record] = {}  # of what is open

    def refresh(self) -> None:
        """Read what the training and other annotators wrote since the last time."""
        for record in self._requests():
            item = str(record["id"])
            if record.get("closed"):
                self._records.pop(item, None)
            elif item not in self._records:
                self._records[item] = record
                self.known[item] = _question(record)
                self.waiting.append(self.known[item])
        for record in self._ratings():
            self.answers.add(record)
        # In their order, each once: one may be closed and asked for again.
        kept = {question.id: question for question in self.waiting if self._is_open(question.id)}
        if len(kept) < len(self.waiting):
            self.waiting.clear()
            self.waiting.extend(kept.values())

    def _is_open(self, item: str) -> bool:
        record, answered = self._records.get(item), self.answers.by_item.get(item, {})
        if record is None or self.annotator in answered:
            return False
        return len(answered) < int(record.get("annotators", 1))


def rate_live(folder: Path, annotator: str) -> None:
    """Rate what comes until the person leaves.

    Raises:
        ValueError: there is no such folder, this annotator rates in it already, or a file in it
            is damaged.
        OSError: the ratings cannot be written.
    """
    if not folder.is_dir():
        raise ValueError(
            f"label: expected --live the folder of a HumanReward, got {folder}, which is none. "
            "Start the training first."
        )
    with _only_one(folder, annotator), RecordFile(folder / RATINGS) as file, Keys() as keys:
        screen, requests = Screen(), Requests(folder, annotator)
        person = Interview(file, requests.answers, annotator, keys, screen)
        leave_cleanly(lambda: _run(person, requests), screen)
        screen.say(f"{len(requests.answers.of(annotator))} rated in all.")


def _run(person: Interview, requests: Requests) -> None:
    is_idle = False
    while True:
        requests.refresh()
        if requests.waiting:
            is_idle = False
            done = len(requests.answers.of(requests.annotator))
            head = f"{done} rated, {len(requests.waiting)} waiting"
            if person.ask(requests.waiting[0], head) == UNDO:
                person.undo(requests.known, requests.waiting)
            else:
                requests.waiting.popleft()
            continue
        if not is_idle:
            person.screen.say("Waiting for completions; u takes the last rating back, q leaves.")
            is_idle = True
        if person.idle(POLL_SECONDS):
            person.undo(requests.known, requests.waiting)  # too late for training that used it
            is_idle = False


def _question(record: Record) -> Question:
    missing = [name for name in ("prompt", "completion", "scale") if name not in record]
    if missing:
        raise ValueError(
            f"label: expected requests of a HumanReward with prompt, completion and scale, got "
            f"one without {', '.join(missing)}. Pass the folder that the HumanReward was given."
        )
    scale = checked_scale(record["scale"], "label")
    return rating_question(str(record["id"]), record["prompt"], record["completion"], scale)


@contextmanager
def _only_one(folder: Path, annotator: str) -> Iterator[None]:
    """Others may rate beside this annotator, but the same one only once."""
    path = folder / f".rating-{content_id(annotator)}.lock"
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        lock(descriptor, path, wait=False)
        yield
    finally:
        os.close(descriptor)
