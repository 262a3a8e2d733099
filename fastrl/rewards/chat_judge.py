"""Scores of a chat model that judges completions by a rubric."""

import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fastrl.rewards._answer_cache import AnswerCache, digest
from fastrl.rewards._arguments import check_whole
from fastrl.rewards._judge_texts import (
    TEMPLATE,
    check_template,
    conversation,
    system_message,
    user_message,
)
from fastrl.rewards._references import references_in
from fastrl.rewards._requests import JSONClient
from fastrl.rewards._service import Asker, NoAnswer
from fastrl.rewards._texts import text_of
from fastrl.rewards._transport import Transport, parts_of
from fastrl.rewards.http_reward import json_of, number_of

_SCORE = re.compile(r"Score: *(-?[0-9]+(?:\.[0-9]+)?)", re.IGNORECASE)


class ChatJudge:
    """The score that a chat model gives a completion, on a scale from 0 to 1.

        reward = mean over samples of (score − low) / (high − low)

    The model is asked through an OpenAI-compatible endpoint, `{base_url}/chat/completions`, once
    for each sample. The rubric is the system message; prompt, reference and completion stand in
    the user's message, each in a fence. The last line of the answer must be "Score: N", or the
    answer or its last line the JSON {"score": N}, with N inside the scale; an answer that was cut
    off by max_tokens, and any other, counts as a parse error and as no sample. A completion
    without samples gets no reward.

    A completion cannot close its fence: each of its lines begins with a bar, the closing line has
    a code made of a hash over the texts, and marks by which servers tell turns apart are broken
    up. Still, a judge reads what it judges: no judge is proof against a text that talks it into a
    high score, and training finds such texts. Watch it with a reward that is not trained on.

    Requests are sent, repeated and counted, errors treated and the key kept as by `HTTPReward`,
    in answers (samples) where that counts completions. Answers are cached by model, rubric, texts
    and settings, each sample by its number, so that more samples go on from fewer.

    Args:
        base_url: such as "http://localhost:8000/v1".
        model: what the endpoint calls the model.
        rubric: what makes a completion good, in words.
        scale: the lowest and the highest score.
        key_variable: see HTTPReward; None for an endpoint without keys.
        template: the user's message, with {prompt}, {completion} and {reference}; None: all three.
        temperature: of the model's sampling; None: the endpoint's own.
        max_tokens: of an answer; None: the endpoint's own.
        samples: answers for each completion; more than one needs a temperature.
        reference: the dataset's column with a text, or a list of texts, to compare with, None in
            it: no reward; None: no reference.
        extra: further entries of a request's body, such as {"max_completion_tokens": 500}.
        concurrency, timeout, retries, headers, cache_size, cache_file, errors, deadline, backoff,
            max_wait, max_bytes, name: see HTTPReward.
    Raises:
        ValueError: an argument cannot be used; in a call: the key or the column of references is
            missing, or references are not texts.
        TypeError: in a call: completions or prompts are not texts.
        RequestError: in a call: a request failed for good, see errors of HTTPReward.
    Reference: Zheng et al. 2023, "Judging LLM-as-a-Judge", arXiv:2306.05685.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        rubric: str,
        *,
        scale: Sequence[float] = (1, 10),
        key_variable: str | None = "OPENAI_API_KEY",
        template: str | None = None,
        temperature: float | None = 0.0,
        max_tokens: int | None = 512,
        samples: int = 1,
        reference: str | None = None,
        extra: Mapping[str, Any] | None = None,
        concurrency: int = 4,
        timeout: float = 60.0,
        retries: int = 4,
        headers: Mapping[str, str] | None = None,
        cache_size: int = 100_000,
        cache_file: str | os.PathLike[str] | None = None,
        errors: str = "none",
        deadline: float | None = None,
        backoff: float = 0.5,
        max_wait: float = 60.0,
        max_bytes: int = 1 << 22,
        name: str = "judge",
    ) -> None:
        self.__name__ = name
        self.scale = _checked_scale(scale)
        self.template = TEMPLATE if template is None else template
        check_template(self.template, "ChatJudge", needs_reference=reference is not None)
        _check(rubric, samples, temperature)
        self.samples, self.reference = samples, reference
        body = {"model": model, "temperature": temperature, "max_tokens": max_tokens}
        self._settings = {k: v for k, v in body.items() if v is not None} | dict(extra or {})
        self._system = system_message(rubric, self.scale)
        transport = Transport(
            concurrency, timeout, retries, backoff, max_wait, deadline, max_bytes, headers,
            key_variable,
        )  # fmt: skip
        self._asker = Asker(
            JSONClient("ChatJudge", _endpoint(base_url), transport),
            AnswerCache("ChatJudge", cache_size, cache_file),
            name=name,
            batch_size=1,
            errors=errors,
            to_body=self._body,
            read=self._read,
        )

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Sequence[Sequence[int]] | None = None,
        *,
        log_metric: Callable[[str, float], None] | None = None,
        **columns: Any,
    ) -> list[float | None]:
        """A reward in [0, 1] for each completion, None where there is none."""
        references = self._references(columns, len(completions))
        messages: dict[int, str] = {}  # by completion
        rows = zip(prompts, completions, references, strict=True)
        for index, (prompt, completion, text) in enumerate(rows):
            texts = {"prompt": conversation(prompt), "completion": text_of(completion)}
            if self.reference is not None:
                if text is None:
                    continue
                texts["reference"] = text
            messages[index] = user_message(self.template, texts)
        asked = [(message, i) for message in messages.values() for i in range(self.samples)]
        keys = [digest(self._system, self._settings, message, i) for message, i in asked]
        scores = self._asker(keys, [message for message, _ in asked], log_metric)
        low, high = self.scale
        rewards: list[float | None] = [None] * len(completions)
        for number, index in enumerate(messages):
            of_one = scores[number * self.samples : (number + 1) * self.samples]
            given = [(score - low) / (high - low) for score in of_one if score is not None]
            if given:
                rewards[index] = math.fsum(given) / len(given)
        return rewards

    def _references(self, columns: Mapping[str, Any], count: int) -> list[str | None]:
        if self.reference is None:
            return [None] * count
        given = references_in(columns, self.reference, "ChatJudge")
        return [None if texts is None else "\n\n".join(texts) for texts in given]

    def _body(self, messages: list[str]) -> dict[str, Any]:
        return {
            **self._settings,
            "messages": [
                {"role": "system", "content": self._system},
                {"role": "user", "content": messages[0]},
            ],
        }

    def _read(self, body: bytes, messages: list[str]) -> list[float]:
        try:
            choice = json_of(body)["choices"][0]
            content, reason = choice["message"]["content"], choice.get("finish_reason")
        except (KeyError, IndexError, TypeError, AttributeError):
            raise NoAnswer from None
        # Of an answer that was cut off, "Score: 10" may be left as "Score: 1".
        if not isinstance(content, str) or reason == "length":
            raise NoAnswer
        score = score_in(content)
        if not self.scale[0] <= score <= self.scale[1]:
            raise NoAnswer
        return [score]


def score_in(content: str) -> float:
    """The score in an answer's last line, or in an answer of JSON.

    Raises:
        NoAnswer: there is none.
    """
    content = content.strip()
    last = content.splitlines()[-1].strip() if content else ""
    match = _SCORE.fullmatch(last)
    if match:
        return number_of(float(match.group(1)))
    answer = json_of(content if content.startswith("{") else last)
    if not isinstance(answer, dict) or "score" not in answer:
        raise NoAnswer
    return number_of(answer["score"])


def _endpoint(base_url: str) -> str:
    parts = parts_of("ChatJudge", base_url)  # some services have a version behind a "?"
    return parts._replace(path=parts.path.rstrip("/") + "/chat/completions").geturl()


def _checked_scale(scale: Sequence[float]) -> tuple[float, float]:
    low, high = (float(end) for end in scale) if len(scale) == 2 else (math.nan, math.nan)
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ValueError(
            f"ChatJudge: expected scale with a lowest and a higher highest score, got {scale!r}. "
            "Pass two numbers, such as (1, 10)."
        )
    return low, high


def _check(rubric: str, samples: int, temperature: float | None) -> None:
    if not isinstance(rubric, str) or not rubric.strip():
        raise ValueError(
            f"ChatJudge: expected rubric of text, got {rubric!r}. Say what makes a completion good."
        )
    check_whole("ChatJudge", "samples", samples, 1)
    if samples > 1 and temperature == 0:
        raise ValueError(
            f"ChatJudge: expected temperature above 0 with samples = {samples}, got 0. Pass a "
            "temperature, or one sample: at 0 all are the same."
        )
