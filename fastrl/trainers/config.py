"""What a run is made of. Every field has a default; a value that cannot work, or that the chosen
algorithm would not look at, is an error here."""

import math
from dataclasses import dataclass
from typing import ClassVar

from fastrl.reference.group_advantages import ESTIMATORS
from fastrl.trainers._shared_config import TrainerConfig
from fastrl.trainers.algorithms import ALGORITHMS, Algorithm

__all__ = ["ActorCriticConfig", "PolicyGradientConfig", "TrainerConfig"]

_REDUCTIONS = ("token_mean", "sequence_mean", "sequence_mean_token_sum", "token_sum")


@dataclass(frozen=True, kw_only=True)
class PolicyGradientConfig(TrainerConfig):
    """`TrainerConfig`, and:

    Args:
        algorithm: "reinforce" | "rloo" | "grpo" | "dr_grpo" | "dapo" | "gspo" | "cispo", see
            `fastrl.trainers.algorithms`. The next fields change a part of it; None: its own.
        advantage: "returns", or an estimator of `fastrl.group_advantages`.
        advantage_k: of "max_at_k"; at most completions_per_prompt.
        reduction: how the losses of tokens add up.
        clip_low, clip_high: distance of the ratio's bounds from 1. Not with "reinforce".
        dual_clip: bound of the ratio where the advantage is negative; None: none. Not with
            "reinforce" and "cispo".
        baseline: with advantage "returns", what is taken off a token's reward-to-go: "none";
            "running_mean", of earlier steps at the same position; or "rloo", of the other
            completions of the same prompt at the same position (`fastrl.trainers.baselines`).
        baseline_decay: what "running_mean" keeps of its past per step, in [0, 1].
    Raises:
        ValueError: a value that cannot work, or one that nothing reads.
    """

    ALGORITHMS: ClassVar[tuple[str, ...]] = tuple(ALGORITHMS)
    BASELINES: ClassVar[tuple[str, ...]] = ("none", "running_mean", "rloo")

    algorithm: str = "reinforce"
    advantage: str | None = None
    advantage_k: int | None = None
    reduction: str | None = None
    clip_low: float | None = None
    clip_high: float | None = None
    dual_clip: float | None = None
    baseline: str = "none"
    baseline_decay: float = 0.9

    def __post_init__(self) -> None:
        super().__post_init__()
        own = ALGORITHMS[self.algorithm]
        for name in ("advantage", "reduction", "clip_low", "clip_high", "mask_truncated"):
            if getattr(self, name) is None:
                object.__setattr__(self, name, getattr(own, name))
        self._check_choice("advantage", ("returns", *ESTIMATORS))
        self._check_choice("reduction", _REDUCTIONS)
        self._check_range("clip_low", 0.0, 1.0)
        self._check_range("clip_high", 0.0, math.inf)
        if self.dual_clip is not None:
            self._check_range("dual_clip", 1.0, math.inf, above=True)
        if (self.advantage == "max_at_k") != (self.advantage_k is not None):
            self._fail('advantage_k with advantage "max_at_k" and no other', self.advantage_k)
        if self.advantage_k is not None:
            self._check_int("advantage_k", 1)
            if self.advantage_k > self.completions_per_prompt:
                count = self.completions_per_prompt
                self._fail(f"advantage_k <= completions_per_prompt = {count}", self.advantage_k)
        self._check_choice("baseline", self.BASELINES)
        if self.baseline != "none" and self.advantage != "returns":
            self._fail(f'baseline "none" with advantage {self.advantage!r}', self.baseline)
        if self.dual_clip is not None and not self.loss.startswith("ppo"):
            self._fail(f"no dual_clip with algorithm {self.algorithm!r}", self.dual_clip)
        self._check_range("baseline_decay", 0.0, 1.0)
        compares = self.advantage != "returns" or self.baseline == "rloo"
        if compares and self.completions_per_prompt < 2:
            by = 'baseline "rloo"' if self.advantage == "returns" else f"{self.advantage!r}"
            self._fail(f"completions_per_prompt >= 2 with {by}", self.completions_per_prompt)
        has_ratio = self.loss != "policy_gradient"
        self._check_ratio(has_ratio)
        of_algorithm = f"with algorithm {self.algorithm!r}, which has no ratio"
        self._check_used(has_ratio, of_algorithm, "clip_low", default=own.clip_low)
        self._check_used(has_ratio, of_algorithm, "clip_high", default=own.clip_high)
        of_sums = f"with advantage {self.advantage!r}, which sums the rewards of a completion"
        self._check_used(self.advantage == "returns", of_sums, "gamma")
        has_mean = self.baseline == "running_mean"
        self._check_used(has_mean, 'without baseline "running_mean"', "baseline_decay")

    @property
    def loss(self) -> str:
        """The algorithm's; see `fastrl.trainers.algorithms.Algorithm`."""
        own: Algorithm = ALGORITHMS[self.algorithm]
        return own.loss


@dataclass(frozen=True, kw_only=True)
class ActorCriticConfig(TrainerConfig):
    """`TrainerConfig`, and:

    Args:
        algorithm: "a2c" | "ppo" | "vtrace". "a2c": one gradient step on -log pi A; "ppo": the
            clipped surrogate, for several epochs and minibatches; "vtrace": -log pi A with
            corrections for tokens that an earlier policy sampled, so that each step can learn
            from replayed rollouts too.
        advantage: "returns": discounted rewards to the end, less the value; or "gae". None:
            "returns" for a2c, "gae" for ppo; vtrace has its own.
        gae_lambda: of "gae" and V-trace, in [0, 1]; 1 is the same as "returns".
        critic_coef: weight of the critic's loss.
        value_clip: of ppo, how far a value may move from that of the sampling critic; None: freely.
            (After a single gradient step it has not moved yet.)
        clip_low, clip_high, dual_clip: of ppo, distance of the ratio's bounds from 1.
        whiten_advantages: bring the actor's advantages to mean 0 and deviation 1 in every step;
            None: for ppo.
        rho_clip, c_clip: of vtrace, see `fastrl.vtrace`.
        replay_size: of vtrace, rollouts of earlier steps that are kept; 0: none.
        replay_per_step: of vtrace, how many of them a step learns from beside its own.
    Raises:
        ValueError: a value that cannot work, or one that nothing reads.
    """

    ALGORITHMS: ClassVar[tuple[str, ...]] = ("a2c", "ppo", "vtrace")

    algorithm: str = "a2c"
    advantage: str | None = None
    gae_lambda: float = 0.95
    critic_coef: float = 0.5
    value_clip: float | None = None
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = None
    whiten_advantages: bool | None = None
    rho_clip: float = 1.0
    c_clip: float = 1.0
    replay_size: int = 0
    replay_per_step: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        is_ppo, is_vtrace = self.algorithm == "ppo", self.algorithm == "vtrace"
        if self.advantage is None:
            advantage = "vtrace" if is_vtrace else "gae" if is_ppo else "returns"
            object.__setattr__(self, "advantage", advantage)
        if self.whiten_advantages is None:
            object.__setattr__(self, "whiten_advantages", is_ppo)
        if self.mask_truncated is None:
            object.__setattr__(self, "mask_truncated", False)
        self._check_choice("advantage", ("vtrace",) if is_vtrace else ("returns", "gae"))
        self._check_range("gae_lambda", 0.0, 1.0)
        self._check_range("critic_coef", 0.0, math.inf)
        self._check_range("clip_low", 0.0, 1.0)
        for name in ("clip_high", "rho_clip", "c_clip"):
            self._check_range(name, 0.0, math.inf)
        if self.value_clip is not None:
            self._check_range("value_clip", 0.0, math.inf, above=True)
        if self.dual_clip is not None:
            self._check_range("dual_clip", 1.0, math.inf, above=True)
            if not is_ppo:
                self._fail(f"no dual_clip with algorithm {self.algorithm!r}", self.dual_clip)
        self._check_bool("whiten_advantages")
        self._check_int("replay_size", 0)
        self._check_int("replay_per_step", 1)
        if self.replay_size and not is_vtrace:
            self._fail('replay_size 0 without algorithm "vtrace"', self.replay_size)
        self._check_ratio(is_ppo)
        self._check_used(is_ppo, 'without algorithm "ppo"', "clip_low", "clip_high", "value_clip")
        self._check_used(is_vtrace, 'without algorithm "vtrace"', "rho_clip", "c_clip")
        has_lambda = self.advantage != "returns"
        self._check_used(has_lambda, 'with advantage "returns"', "gae_lambda")
        self._check_used(self.replay_size > 0, "with replay_size 0", "replay_per_step")
