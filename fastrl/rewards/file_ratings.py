"""Rewards that people gave before, in a file."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from fastrl.rewards._items import read_completions
from fastrl.rewards._judgements import ratings_of, read_answers
from fastrl.rewards._record_file import read_records
from fastrl.rewards._scale import checked_scale, scaled
from fastrl.rewards._texts import prompt_text, text_of


class FileRatings:
    """The rewards that people gave before, looked up by the texts of prompt and completion.

        reward = 2 (mean rating − low) / (high − low) − 1, in [−1, 1]; None where nobody rated

    Args:
        ratings: JSON lines {"prompt", "completion", "rating"}; or, with `completions`, lines
            {"id", "annotator", "rating"} as `fastrl label --rate` and `--live` write them.
        completions: JSON lines {"id"?, "prompt", "completion"} that were rated; of a HumanReward,
            its requests.jsonl.
        scale: the lowest and the highest rating, whole numbers.
        name: what metrics call it; "<name>/unrated" counts completions without a rating.
    Raises:
        ValueError: a line is not as it should be, a rating is out of the scale, or there is none.
        OSError: a file cannot be read.
    """

    def __init__(
        self,
        ratings: str | Path,
        completions: str | Path | None = None,
        *,
        scale: Sequence[int] = (1, 5),
        name: str = "human",
    ) -> None:
        self.__name__ = name
        self.scale = checked_scale(scale, "FileRatings")
        given: dict[tuple[str, str], list[float]] = {}
        rows = _rated_rows(ratings) if completions is None else _joined(ratings, completions)
        for prompt, completion, rating in rows:
            given.setdefault((prompt, completion), []).append(rating)
        if not given:
            raise ValueError(
                f"FileRatings: expected at least one rating in {ratings}, got none. Rate some of "
                "the completions first."
            )
        self._rewards = {
            texts: scaled(numbers, self.scale, "FileRatings", f"{texts[1][:40]!r} in {ratings}")
            for texts, numbers in given.items()
        }

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Any = None,
        *,
        log_metric: Callable[[str, float], None] | None = None,
        **columns: Any,
    ) -> list[float | None]:
        """Rewards in [−1, 1]; None for what nobody rated."""
        rewards = [
            self._rewards.get((prompt_text(prompt), text_of(completion)))
            for prompt, completion in zip(prompts, completions, strict=True)
        ]
        if log_metric is not None:
            log_metric(f"{self.__name__}/unrated", sum(reward is None for reward in rewards))
        return rewards


def _rated_rows(path: str | Path) -> Iterator[tuple[str, str, float]]:
    for number, row in enumerate(read_records(path), 1):
        texts = (row.get("prompt"), row.get("completion"))
        rating = row.get("rating", "nothing")
        if rating is None:  # skipped
            continue
        if None in texts or isinstance(rating, bool) or not isinstance(rating, int | float):
            raise ValueError(
                'FileRatings: expected "prompt", "completion" and a number as "rating" in record '
                f"{number} of {path}, got {sorted(row)}. Ratings without texts need completions=."
            )
        yield prompt_text(texts[0]), text_of(texts[1]), float(rating)


def _joined(ratings: str | Path, completions: str | Path) -> Iterator[tuple[str, str, float]]:
    texts = {
        str(row["id"]): (prompt_text(row["prompt"]), text_of(row["completion"]))
        for row in read_completions(completions)
    }
    for identity, given in ratings_of(read_answers(ratings)):
        if given and identity not in texts:
            raise ValueError(
                f"FileRatings: expected ratings of the completions in {completions}, got one of "
                f"{identity}. Pass the file that was rated."
            )
        for rating in given.values():
            yield *texts[identity], rating
