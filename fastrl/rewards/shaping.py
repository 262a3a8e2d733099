"""Potential-based shaping: reward that comes earlier, with the same best policy."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fastrl.rewards._calling import accepted, as_float, is_async, own_arguments, parameters_of
from fastrl.rewards._states import load_states, stateful, states
from fastrl.rewards.metric import MetricReward
from fastrl.rewards.token_pieces import TokenPieces


class PotentialShaping:
    """A reward function plus the change of a potential, one reward per token.

        r'_t = r_t + F_t,   F_t = γ Φ(s_{t+1}) − Φ(s_t),   Φ(terminal) = 0

    s_t is the prompt and the first t ids of the completion; the state behind the last id is
    terminal. Ids that the policy did not write, as a trainer's is_target says, are no steps: s_t
    is then all that stands before its t-th one, and F is 0 at theirs. From any state,
    Σ_k γ^k F_{t+k} = −Φ(s_t): every policy gains or loses the same, so the best policies, the
    advantages and the policy gradient are those of r, for any Φ; a return is less by Φ(s_t), from
    the start by Φ(s_0), which depends on the prompt alone. That needs the γ of the trainer, and
    rewards that are summed as they are (not whitened or clipped token by token). In algorithms
    that use one return for the whole completion (RLOO, GRPO), Φ(s_0) is a constant of the group
    and F has no effect at all.

    Args:
        reward_function: what is shaped. A number for a whole completion stands at its last id
            that the policy wrote; None stays None. It is called with the arguments that it takes,
            as trainers do.
        potential: Φ: a metric's reward (`ChrF(tokenizer=...)`: its scores of prefixes, times its
            scale, incrementally; 0 throughout where it has no reference), or a function
            f(prompt, prefix) -> float, called for every prefix: of texts with a tokenizer,
            else of tuples of ids.
        gamma: γ, in [0, 1].
        tokenizer: for a potential that is a function of texts.
        name: what metrics call it; None: "shaped_<name of the function>".
    Raises:
        ValueError: gamma out of range; later, a list of rewards of the wrong length, or a
            potential that is not finite.
        TypeError: the function or the potential cannot be called, or is asynchronous.
    Reference: Ng, Harada and Russell 1999, theorem 1; Grześ 2017 for Φ(terminal) = 0.
    """

    def __init__(
        self,
        reward_function: Callable[..., Any],
        potential: MetricReward | Callable[[Any, Any], float],
        gamma: float = 1.0,
        *,
        tokenizer: Any = None,
        name: str | None = None,
    ) -> None:
        for argument, value in (("reward_function", reward_function), ("potential", potential)):
            has_to_wait = callable(value) and is_async(value)
            if not callable(value) or has_to_wait:
                got = "an asynchronous one" if has_to_wait else type(value).__name__
                raise TypeError(
                    f"PotentialShaping: expected {argument} a function, got {got}. "
                    "Pass one that gives its result when it is called."
                )
        if not 0.0 <= gamma <= 1.0:
            raise ValueError(
                f"PotentialShaping: expected gamma in [0, 1], got {gamma}. "
                "Pass the gamma of the trainer."
            )
        self.reward_function, self.potential, self.gamma = reward_function, potential, gamma
        inner = getattr(reward_function, "__name__", type(reward_function).__name__)
        self.__name__ = f"shaped_{inner}" if name is None else name
        self._pieces = None if tokenizer is None else TokenPieces(tokenizer)
        self._parameters = parameters_of(reward_function)

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Sequence[Sequence[int]],
        *,
        is_target: Sequence[Sequence[bool]] | None = None,
        **columns: Any,
    ) -> list[Any]:
        """Rewards of a batch.

        Args:
            is_target: for each completion a bool per id, False where the policy did not write it;
                None: it wrote all.
            columns: for the reward function and the potential.
        Returns:
            A list of floats per completion, one per id; None where the function has no opinion.
        Raises:
            what the reward function and the potential raise.
        """
        if is_target is None:
            is_target = [[True] * len(ids) for ids in completion_ids]
        given = {"prompts": prompts, "completions": completions, "completion_ids": completion_ids}
        given["is_target"] = is_target
        own = own_arguments(accepted({**given, **columns}, self._parameters))
        rewards = self.reward_function(**own)
        rewards = rewards.tolist() if hasattr(rewards, "tolist") else rewards
        if len(rewards) != len(completion_ids):
            raise ValueError(
                f"PotentialShaping: expected {len(completion_ids)} rewards of {self.__name__}, "
                f"got {len(rewards)}. Return one entry for each completion."
            )
        potentials = self._potentials(prompts, completions, completion_ids, columns)
        return [
            self._shaped(reward, phi, [i for i, own in enumerate(row) if own], index)
            for index, (reward, phi, row) in enumerate(
                zip(rewards, potentials, is_target, strict=True)
            )
        ]

    def state_dict(self) -> dict[str, Any]:
        """The states of the reward function and of the potential, of those that have one."""
        return states(self._parts)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Give them the states that `state_dict` had.

        Raises:
            ValueError: those with a state are others.
        """
        parts = stateful(self._parts)
        if parts.keys() != state.keys():
            raise ValueError(
                f"PotentialShaping: expected states of {sorted(parts)}, got {sorted(state)}. "
                "Build it as it was when the state was saved."
            )
        load_states(self._parts, state)

    @property
    def _parts(self) -> dict[str, Any]:
        return {"reward_function": self.reward_function, "potential": self.potential}

    def _potentials(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Sequence[Sequence[int]],
        columns: Mapping[str, Any],
    ) -> list[list[float]]:
        """Φ of the start and after each id, as if nothing ended."""
        if isinstance(self.potential, MetricReward):
            scores = self.potential.prefix_scores(completions, completion_ids, **columns)
            return [
                [0.0] * (len(ids) + 1) if of_prefixes is None else of_prefixes
                for of_prefixes, ids in zip(scores, completion_ids, strict=True)
            ]
        function = self.potential
        return [
            [float(function(prompt, prefix)) for prefix in self._prefixes(ids)]
            for prompt, ids in zip(prompts, completion_ids, strict=True)
        ]

    def _prefixes(self, ids: Sequence[int]) -> list[Any]:
        if self._pieces is None:
            return [tuple(ids[:end]) for end in range(len(ids) + 1)]
        pieces = self._pieces(ids)
        return ["".join(pieces[:end]) for end in range(len(ids) + 1)]

    def _shaped(self, reward: Any, phi: list[float], own: list[int], index: int) -> Any:
        """One completion's rewards; own: the ids that the policy wrote, by index."""
        count = len(phi) - 1
        reward = as_float(reward.tolist() if hasattr(reward, "tolist") else reward)
        if reward is None or not own:  # without ids there is no step that could be shaped
            return reward
        row = reward
        if isinstance(reward, float):
            row = [0.0] * count
            row[own[-1]] = reward
        if len(row) != count:
            raise ValueError(
                f"PotentialShaping: expected {count} rewards for completion {index}, one for each "
                f"of its completion_ids, got {len(row)}. Count the EOS, or return one float."
            )
        phi = [*(phi[i] for i in own), 0.0]
        if not all(map(math.isfinite, phi)):
            raise ValueError(
                f"PotentialShaping: expected a finite potential of completion {index}, got {phi}. "
                "Repair the potential: rewards would be lost in it."
            )
        shaped = list(row)
        for i, before, after in zip(own, phi, phi[1:], strict=False):
            shaped[i] = as_float(row[i]) + self.gamma * after - before
        return shaped
