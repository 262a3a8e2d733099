"""Rewards that people give while the run waits."""

import logging
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fastrl.rewards._asking import Interview, Leave, rating_question
from fastrl.rewards._judgements import Answers, content_id
from fastrl.rewards._record_file import Record, RecordFile, Tail
from fastrl.rewards._scale import checked_scale, scaled
from fastrl.rewards._terminal import Keys, Screen
from fastrl.rewards._texts import prompt_text, text_of

REQUESTS, RATINGS = "requests.jsonl", "ratings.jsonl"
_log = logging.getLogger(__name__)


class HumanReward:
    """People rate each completion as it is sampled, and the next update learns from it.

        reward = 2 (mean rating − low) / (high − low) − 1, in [−1, 1]

    Each completion becomes a line {"id", "prompt", "completion", "step", "number", "scale",
    "annotators"} of FOLDER/requests.jsonl, and the run waits until FOLDER/ratings.jsonl has lines
    {"id", "annotator", "rating"} of enough people, which `fastrl label --live FOLDER` writes in
    another terminal. A rating of null is someone who skipped the completion and is not waited
    for. The id is that of prompt, completion, step and number in the batch: a run that is resumed
    asks nothing that was answered before. What is no longer waited for gets a line {"id",
    "closed": true}. Evaluations of a training ask nobody: they are often as many prompts again,
    and this function has no opinion there. A run that shall stop after its step waits for the
    step's ratings first, unless there is a timeout.

    Args:
        folder: made if it is not there.
        scale: the lowest and the highest rating, whole numbers.
        annotators: people that have to answer for each completion; the mean of their ratings
            counts.
        timeout: seconds to wait for a batch; completions without any rating then get None (no
            opinion), and the others the mean of those that came. None: any time.
        poll_seconds: between two looks at the ratings.
        name: what metrics call it; "<name>/unrated" counts completions without a rating.
        terminal: ask in this terminal instead, one person, here and now.
        annotator: who that person is.
        evaluations: ask in `Trainer.evaluate` as well, as the evaluations of a recipe's held-out
            prompts are. An OverOptimizationMonitor and `fastrl eval` always ask: that is what they
            are for.
    Raises:
        ValueError: an argument is out of range; later, a rating is, or a file is damaged.
        TypeError: later, completions are no text.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        scale: Sequence[int] = (1, 5),
        annotators: int = 1,
        timeout: float | None = None,
        poll_seconds: float = 0.2,
        name: str = "human",
        terminal: bool = False,
        annotator: str = "terminal",
        evaluations: bool = False,
    ) -> None:
        self.folder, self.scale = Path(folder), checked_scale(scale, "HumanReward")
        _check_waiting(annotators, timeout, poll_seconds, terminal)
        self.annotators, self.timeout, self.poll_seconds = annotators, timeout, poll_seconds
        self.__name__ = name
        self.terminal, self.annotator, self.evaluations = terminal, annotator, evaluations
        self.folder.mkdir(parents=True, exist_ok=True)
        self._requests = Tail(self.folder / REQUESTS)
        self._ratings = Tail(self.folder / RATINGS)
        self._open_requests: dict[str, Record] = {}  # by id, also those that were answered
        self._answers = Answers()
        self._has_said = False

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Any = None,
        *,
        trainer_state: Any = None,
        log_metric: Callable[[str, float], None] | None = None,
        **columns: Any,
    ) -> list[float | None]:
        """Rewards in [−1, 1], or None; returns when people have answered, or after the timeout."""
        if getattr(trainer_state, "is_evaluation", False) and not self.evaluations:
            return [None] * len(completions)
        step = getattr(trainer_state, "global_step", None)
        requests = self._as_requests(prompts, completions, step)
        self._refresh()
        self._open(requests)
        end = math.inf if self.timeout is None else time.monotonic() + self.timeout
        if self.terminal:
            self._ask(requests, end)
        else:
            self._wait([request["id"] for request in requests], end)
        self._close([request["id"] for request in requests])
        rewards = [self._reward(request["id"]) for request in requests]
        if log_metric is not None:
            log_metric(f"{self.__name__}/unrated", sum(reward is None for reward in rewards))
        return rewards

    def _as_requests(
        self, prompts: Sequence[Any], completions: Sequence[Any], step: int | None
    ) -> list[Record]:
        requests = []
        pairs = zip(prompts, completions, strict=True)
        for number, (prompt, completion) in enumerate(pairs):
            texts = {"prompt": prompt_text(prompt), "completion": text_of(completion)}
            identity = content_id(texts["prompt"], texts["completion"], step, number)
            place = {"step": step, "number": number}
            how = {"scale": list(self.scale), "annotators": self.annotators}
            requests.append({"id": identity, **texts, **place, **how})
        return requests

    def _refresh(self) -> None:
        for record in self._requests():
            self._open_requests.pop(str(record["id"]), None)
            if not record.get("closed", False):
                self._open_requests[str(record["id"])] = record
        for record in self._ratings():
            self._answers.add(record)

    def _has_answer(self, identity: str) -> bool:
        return len(self._answers.by_item.get(identity, {})) >= self.annotators

    def _open(self, requests: list[Record]) -> None:
        """Ask for what is not asked for already, as by the run that is resumed.

        What else is open was asked by a run that was killed, or with another scale or number of
        annotators: nobody waits for that.
        """
        asked = {r["id"] for r in requests if self._is_open_as(r)}
        old = [identity for identity in self._open_requests if identity not in asked]
        new = [r for r in requests if r["id"] not in asked and not self._has_answer(r["id"])]
        self._append([*self._closing(old), *new])
        self._refresh()

    def _is_open_as(self, request: Record) -> bool:
        known = self._open_requests.get(request["id"], {})
        return all(known.get(name) == request[name] for name in ("scale", "annotators"))

    def _close(self, ids: list[str]) -> None:
        """Nobody has to rate what is not waited for any more."""
        self._append(self._closing(ids))

    def _closing(self, ids: list[str]) -> list[Record]:
        """Lines that close those without enough answers; the others are never asked again."""
        return [
            {"id": identity, "closed": True} for identity in ids if not self._has_answer(identity)
        ]

    def _append(self, records: list[Record]) -> None:
        if records:
            with RecordFile(self.folder / REQUESTS) as file:
                file.append(*records)

    def _wait(self, ids: list[str], end: float) -> None:
        while not all(map(self._has_answer, ids)) and time.monotonic() < end:
            if not self._has_said:
                command = f"fastrl label --live {self.folder}"
                _log.warning("HumanReward waits for people's ratings: %s", command)
                self._has_said = True
            time.sleep(min(self.poll_seconds, max(0.0, end - time.monotonic())))
            self._refresh()

    def _ask(self, requests: list[Record], end: float) -> None:
        """In this terminal; who quits leaves the rest of the batch without a rating."""
        questions = [
            rating_question(r["id"], r["prompt"], r["completion"], self.scale)
            for r in requests
            if not self._has_answer(r["id"])
        ]
        try:
            with Keys() as keys, RecordFile(self.folder / RATINGS) as file:
                person = Interview(file, self._answers, self.annotator, keys, Screen())
                person.run(questions, end)
        except Leave:
            return
        except EOFError as error:
            raise EOFError(
                "HumanReward: expected answers on standard input with terminal=True, got its end. "
                "Run it in a terminal, or rate with `fastrl label --live` in another one."
            ) from error

    def _reward(self, identity: str) -> float | None:
        records = self._answers.by_item.get(identity, {}).values()
        ratings = [r["rating"] for r in records if r.get("rating") is not None]
        return scaled(ratings, self.scale, "HumanReward", f"{identity} in {self._ratings.path}")


def _check_waiting(
    annotators: int, timeout: float | None, poll_seconds: float, terminal: bool
) -> None:
    if type(annotators) is not int or annotators < 1 or (terminal and annotators > 1):
        wanted = "1 with terminal=True" if terminal else "a whole number >= 1"
        raise ValueError(
            f"HumanReward: expected annotators {wanted}, got {annotators}. "
            "Say how many people answer for each completion."
        )
    if timeout is not None and not timeout > 0:
        raise ValueError(
            f"HumanReward: expected timeout above 0 seconds, got {timeout}. "
            "Pass None to wait for any time."
        )
    if not 0 < poll_seconds < math.inf:
        raise ValueError(
            f"HumanReward: expected poll_seconds finite and above 0, got {poll_seconds}. "
            "Pass the seconds between two looks at the ratings."
        )
