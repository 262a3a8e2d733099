"""Rewards from a service of one's own: batches of completions go there, numbers come back."""

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fastrl.rewards._answer_cache import AnswerCache, digest
from fastrl.rewards._requests import JSONClient
from fastrl.rewards._service import Asker, NoAnswer
from fastrl.rewards._transport import Transport


class HTTPReward:
    """Rewards of an HTTP service.

    It gets, with POST, {"prompts": [...], "completions": [...]} with one entry for each
    completion of a batch, as reward functions get them (texts, chat messages, or ids without a
    tokenizer), and a list under each name in `columns`; with immediate=True also
    "completion_ids". It answers {"rewards": [...]}: a number for each completion, or with
    immediate=True a list with a number for each of its ids; null where it has no opinion.

    An answer that is anything else (not JSON, another length, NaN, an infinite number) gives no
    completion of that batch a reward, and is counted. A request that fails is sent again after a
    connection that broke, a timeout, or status 408, 429 and from 500 on; the wait doubles each
    time, is drawn at random from its upper half, and is at least what the server asks for in
    Retry-After, for all requests of the call. Redirects are not followed.

    What is logged, counted in completions but for the retries: "{name}/failures" (of requests
    that failed for good), "{name}/parse_errors", "{name}/cached" (not asked, as the answer was
    known or is asked for by another completion of the call), "{name}/retries".

    Args:
        url: http or https.
        batch_size: completions in a request, at most.
        concurrency: requests at a time, at most.
        timeout: seconds for a request, from the connection to the answer's last byte.
        retries: further requests after one that failed, at most.
        headers: sent with each request; no keys.
        key_variable: name of the environment variable with the key, which is read for each call,
            sent as "Authorization: Bearer <key>", and kept nowhere. Over http, it can be read on
            the way. None: no key is sent.
        columns: names of the dataset's columns that the service gets.
        cache_size: answers to keep, the ones used last; 0: ask for each completion, also for
            equal ones. A service that compares the completions of a batch needs 0.
        cache_file: file to which answers are appended, and from which they are read at the start.
            Texts do not stand in it, only their hashes.
        immediate: the service gives a reward for each token.
        errors: what a request that failed for good does: "none" gives no reward and warns,
            "raise" raises. A redirect and status 401, 404 and 405 raise in both cases, as no wait
            mends them.
        deadline: seconds for a call with all its requests; those not done by then have failed.
            None: any.
        backoff: seconds before the first retry.
        max_wait: seconds before a retry, at most; if the server asks for more, the request has
            failed.
        max_bytes: of an answer; a longer one has failed.
        name: what metrics call it.
    Raises:
        ValueError: an argument cannot be used; in a call: the key or a column is missing.
        TypeError: in a call: what is sent is not JSON.
        RequestError: in a call: see errors.
    """

    def __init__(
        self,
        url: str,
        *,
        batch_size: int = 32,
        concurrency: int = 4,
        timeout: float = 30.0,
        retries: int = 4,
        headers: Mapping[str, str] | None = None,
        key_variable: str | None = None,
        columns: Sequence[str] = (),
        cache_size: int = 10_000,
        cache_file: str | os.PathLike[str] | None = None,
        immediate: bool = False,
        errors: str = "none",
        deadline: float | None = None,
        backoff: float = 0.5,
        max_wait: float = 60.0,
        max_bytes: int = 1 << 24,
        name: str = "http",
    ) -> None:
        self.__name__ = name
        self.immediate = immediate
        self.columns = [columns] if isinstance(columns, str) else list(columns)
        transport = Transport(
            concurrency=concurrency,
            timeout=timeout,
            retries=retries,
            backoff=backoff,
            max_wait=max_wait,
            deadline=deadline,
            max_bytes=max_bytes,
            headers=headers,
            key_variable=key_variable,
        )
        self._url = url
        self._asker = Asker(
            JSONClient("HTTPReward", url, transport),
            AnswerCache("HTTPReward", cache_size, cache_file),
            name=name,
            batch_size=batch_size,
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
    ) -> list[Any]:
        """One reward for each completion, None where there is none."""
        sent = {"prompts": prompts, "completions": completions}
        if self.immediate:
            if completion_ids is None:
                raise ValueError(
                    "HTTPReward: expected completion_ids with immediate = True, got none. Pass "
                    "the ids of each completion."
                )
            sent["completion_ids"] = [[int(i) for i in ids] for ids in completion_ids]
        for column in self.columns:
            if column not in columns:
                raise ValueError(
                    f"HTTPReward: expected the column {column!r} of the dataset, got columns "
                    f"{sorted(columns)}. Name columns that the dataset has."
                )
            sent[column] = columns[column]
        rows = [dict(zip(sent, row, strict=True)) for row in zip(*sent.values(), strict=True)]
        return self._asker([self._key(row) for row in rows], rows, log_metric)

    def _key(self, row: dict[str, Any]) -> str:
        try:
            return digest(self._url, self.immediate, row)
        except (TypeError, ValueError) as error:
            raise TypeError(
                f"HTTPReward: expected prompts, completions and columns that JSON knows, got "
                f"{error}. Name only columns of texts, numbers, bools, lists and dicts."
            ) from error

    def _body(self, rows: list[dict[str, Any]]) -> dict[str, list[Any]]:
        return {name: [row[name] for row in rows] for name in rows[0]}

    def _read(self, body: bytes, rows: list[dict[str, Any]]) -> list[Any]:
        reply = json_of(body)
        rewards = reply.get("rewards") if isinstance(reply, dict) else None
        if not isinstance(rewards, list) or len(rewards) != len(rows):
            raise NoAnswer
        if not self.immediate:
            return [None if reward is None else number_of(reward) for reward in rewards]
        return [
            None if reward is None else _numbers(reward, len(row["completion_ids"]))
            for reward, row in zip(rewards, rows, strict=True)
        ]


def json_of(body: bytes | str) -> Any:
    """What JSON says, without the NaN and Infinity that it does not know.

    Raises:
        NoAnswer: it is not JSON.
    """
    try:
        return json.loads(body, parse_constant=_refuse)
    except (ValueError, RecursionError):  # a decoding error is a ValueError as well
        raise NoAnswer from None


def number_of(value: Any) -> float:
    """A finite number.

    Raises:
        NoAnswer: it is none.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise NoAnswer
    try:
        number = float(value)
    except OverflowError:
        raise NoAnswer from None
    if not math.isfinite(number):
        raise NoAnswer
    return number


def _numbers(value: Any, length: int) -> list[float]:
    if not isinstance(value, list) or len(value) != length:
        raise NoAnswer
    return [number_of(entry) for entry in value]


def _refuse(name: str) -> float:
    raise ValueError(name)
