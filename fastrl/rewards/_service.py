"""Questions to a service: each asked once, in batches, and what came of them counted."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fastrl.rewards._answer_cache import AnswerCache
from fastrl.rewards._arguments import check_whole
from fastrl.rewards._requests import JSONClient
from fastrl.rewards._transport import RequestError

# No wait mends these: a redirect, a wrong key, a wrong address, not POST.
_HOPELESS = {401, 404, 405}


class NoAnswer(ValueError):
    """A reply from which no answer can be read."""


class Asker:
    """Asks for what is not in the cache.

    Args:
        client: sends the requests.
        cache: the answers so far.
        name: the first part of the metrics' names.
        batch_size: questions in a request, at most.
        errors: what a request that got no answer does: "raise" its error, or give "none" for its
            questions and warn.
        to_body: makes a request's body of questions.
        read: the answers in a reply to as many questions; raises NoAnswer.
    Raises:
        ValueError: batch_size or errors cannot be used.
    """

    def __init__(
        self,
        client: JSONClient,
        cache: AnswerCache,
        *,
        name: str,
        batch_size: int,
        errors: str,
        to_body: Callable[[list[Any]], Any],
        read: Callable[[bytes, list[Any]], list[Any]],
    ) -> None:
        if errors not in ("none", "raise"):
            raise ValueError(
                f'{client.owner}: expected errors "none" or "raise", got {errors!r}. Pass "none" '
                "to go on without the rewards of requests that failed."
            )
        remedy = "Pass how many completions go into a request."
        check_whole(client.owner, "batch_size", batch_size, 1, remedy)
        self.client, self.cache, self.name, self.batch_size = client, cache, name, batch_size
        self._raises, self._to_body, self._read = errors == "raise", to_body, read

    def __call__(
        self,
        keys: Sequence[str],
        questions: Sequence[Any],
        log_metric: Callable[[str, float], None] | None = None,
    ) -> list[Any]:
        """The answer to each question, None where there is none; equal keys are one question.

        Without a cache, every question is asked.

        Raises:
            RequestError: a request failed, with errors="raise"; or where no wait mends it.
        """
        if self.cache.size == 0:
            keys = [f"{i}" for i in range(len(keys))]
        answers = {key: self.cache[key] for key in keys if key in self.cache}
        missing = {k: q for k, q in zip(keys, questions, strict=True) if k not in answers}
        counts = dict.fromkeys(("failures", "parse_errors", "retries"), 0)
        counts["cached"] = len(keys) - len(missing)
        try:
            self._ask(missing, answers, counts)
        finally:
            if log_metric is not None:
                for count, number in counts.items():
                    log_metric(f"{self.name}/{count}", number)
        return [answers.get(key) for key in keys]

    def _ask(
        self, missing: Mapping[str, Any], answers: dict[str, Any], counts: dict[str, int]
    ) -> None:
        """Put the answers of `missing` into `answers`, those of failed requests left out."""
        keys = list(missing)
        batches = [keys[i : i + self.batch_size] for i in range(0, len(keys), self.batch_size)]
        bodies = [self._to_body([missing[key] for key in batch]) for batch in batches]
        failed: RequestError | None = None
        replies = self.client.post(bodies)
        try:
            for index, reply in replies:
                batch = batches[index]
                counts["retries"] += reply.retries
                if reply.error is not None:
                    counts["failures"] += len(batch)
                    failed = reply.error
                    if self._raises or _is_hopeless(failed):
                        raise failed
                    continue
                assert reply.body is not None
                try:
                    read = self._read(reply.body, [missing[key] for key in batch])
                except NoAnswer:
                    counts["parse_errors"] += len(batch)
                    continue
                new = dict(zip(batch, read, strict=True))
                answers.update(new)
                self.cache.add(new)  # at once: a process that is killed keeps what it has paid for
        finally:
            replies.close()
        if failed is not None:
            warnings.warn(
                f"{failed} {counts['failures']} answers are missing in this call.",
                RuntimeWarning,
                stacklevel=4,
            )


def _is_hopeless(error: RequestError) -> bool:
    status = error.status or 0
    return status in _HOPELESS or 300 <= status < 400
