"""A bonus for states that were seldom visited: counts of token n-grams, or of completions."""

import hashlib
import math
from array import array
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from fastrl.rewards._annealing import annealed, check_coefficient
from fastrl.rewards._arguments import check_whole

State = str | bytes | int | Sequence[int]


class CountNovelty:
    """The count-based bonus of each token's state.

        bonus_t = c / sqrt(N(s_t)),   N(s_t) = decay^k · earlier visits + visits in o_0 … o_t

    s_t is the n-gram of token ids that ends at t (shorter before the n-th token; a completion's
    n-grams do not reach into its prompt). The visits of a completion count at once, this one
    included, so that saying the same again and again is worth less each time; those of the other
    completions of a call count from the next call on, so their order does not matter. Before
    each call, the counts of all earlier ones are multiplied by `decay`: what was not visited for
    long becomes new again. c = scale · max(0, 1 − global_step / anneal_steps).

    The bonus is never negative, so longer completions get more of it; with n=0, where a whole
    completion is one state, they do not.

    Args:
        n: tokens of a state; 0: a whole completion is one state, and gets c / sqrt(N) once.
        state: instead of n-grams, a function of a completion's ids that gives a list with one
            state (text, bytes, an integer or a list of integers) for each id.
        scale: the bonus of a state that is visited for the first time.
        decay: in (0, 1]; 1: nothing is forgotten.
        anneal_steps: steps after which there is no bonus, which falls evenly until then; None:
            it is never annealed.
        immediate: one float per token; False: their sum. With n=0 always one per completion.
        max_states: counts to keep; beyond them the smallest are forgotten.
        name: what metrics call it; "{name}/states" and "{name}/coefficient" are logged.
    Raises:
        ValueError: an argument cannot be used; in a call: `state` gives a list of another length.
    Reference: Strehl and Littman 2008, "An analysis of model-based interval estimation for Markov
    decision processes"; Bellemare et al. 2016, arXiv:1606.01868.
    """

    def __init__(
        self,
        n: int = 3,
        *,
        state: Callable[[Sequence[int]], Sequence[State]] | None = None,
        scale: float = 1.0,
        decay: float = 1.0,
        anneal_steps: int | None = None,
        immediate: bool = True,
        max_states: int = 1_000_000,
        name: str = "novelty",
    ) -> None:
        check_coefficient("CountNovelty", scale, anneal_steps)
        _check(n, decay, max_states)
        self.__name__ = name
        self.n, self.state, self.scale, self.decay = n, state, scale, decay
        self.anneal_steps, self.immediate, self.max_states = anneal_steps, immediate, max_states
        self._calls = 0
        # By the hash of a state: visits, as they were after the call in which it was last seen.
        self._counts: dict[int, tuple[float, int]] = {}

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Sequence[Sequence[int]],
        *,
        trainer_state: Any = None,
        log_metric: Callable[[str, float], None] | None = None,
        **columns: Any,
    ) -> list[Any]:
        """The bonus of each completion; then their visits are counted."""
        scale = annealed("CountNovelty", self.scale, self.anneal_steps, trainer_state)
        states = [self._states([int(i) for i in ids]) for ids in completion_ids]
        self._calls += 1
        bonuses: list[Any] = []
        for row in states:
            seen: Counter[int] = Counter()
            bonus = []
            for key in row:
                seen[key] += 1
                bonus.append(scale / math.sqrt(self._earlier(key) + seen[key]))
            is_per_token = self.immediate and not self._is_whole
            bonuses.append(bonus if is_per_token else math.fsum(bonus))
        for key, visits in Counter(key for row in states for key in row).items():
            self._counts[key] = self._earlier(key) + visits, self._calls
        self._forget()
        if log_metric is not None:
            log_metric(f"{self.__name__}/states", len(self._counts))
            log_metric(f"{self.__name__}/coefficient", scale)
        return bonuses

    def state_dict(self) -> dict[str, Any]:
        """The counts, and how many calls there were."""
        counts = self._counts.values()
        return {
            "calls": self._calls,
            "states": torch.tensor(list(self._counts), dtype=torch.int64),
            "visits": torch.tensor([visits for visits, _ in counts], dtype=torch.float64),
            "last_calls": torch.tensor([call for _, call in counts], dtype=torch.int64),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from the counts of `state_dict`."""
        counts = zip(state["visits"].tolist(), state["last_calls"].tolist(), strict=True)
        self._counts = dict(zip(state["states"].tolist(), counts, strict=True))
        self._calls = int(state["calls"])

    @property
    def _is_whole(self) -> bool:
        return self.n == 0 and self.state is None

    def _states(self, ids: list[int]) -> list[int]:
        """A hash of the state of each id, or of the whole."""
        if self.state is not None:
            states = list(self.state(ids))
            if len(states) != len(ids):
                raise ValueError(
                    f"CountNovelty: expected state to give {len(ids)} states, one for each of "
                    f"the ids, got {len(states)}. Return a list of that length."
                )
            return [_hash(state) for state in states]
        if self.n == 0:
            return [_hash(ids)]
        return [_hash(ids[max(0, end - self.n) : end]) for end in range(1, len(ids) + 1)]

    def _earlier(self, key: int) -> float:
        visits, call = self._counts.get(key, (0.0, self._calls))
        return visits * self.decay ** (self._calls - call)

    def _forget(self) -> None:
        """Keep the largest counts, three quarters of max_states, when there are too many."""
        if len(self._counts) > self.max_states:
            # Of equal ones, those seen last; then by hash, so that their order does not matter.
            order = sorted(
                self._counts,
                key=lambda key: (self._earlier(key), self._counts[key][1], key),
                reverse=True,
            )
            kept = order[: max(1, self.max_states * 3 // 4)]
            self._counts = {key: self._counts[key] for key in kept}


def _hash(state: State) -> int:
    """64 bits that are the same in every process; a text's, bytes' and ids' differ."""
    if isinstance(state, str):
        data = b"t" + state.encode("utf-8", "surrogatepass")
    elif isinstance(state, bytes):
        data = b"b" + state
    elif isinstance(state, int):
        data = b"n" + array("q", [state]).tobytes()
    else:
        data = b"i" + array("q", state).tobytes()
    digest = hashlib.blake2b(data, digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def _check(n: int, decay: float, max_states: int) -> None:
    check_whole("CountNovelty", "n", n, 0)
    check_whole("CountNovelty", "max_states", max_states, 1)
    if not 0 < decay <= 1:
        raise ValueError(
            f"CountNovelty: expected decay in (0, 1], got {decay!r}. Pass 1 to forget nothing."
        )
