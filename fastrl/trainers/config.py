"""What a run is made of. Every field has a default; a value that cannot work is an error here."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, ClassVar


@dataclass(frozen=True, kw_only=True)
class TrainerConfig:
    """What both trainers share.

    Args:
        gamma: discount per token, in [0, 1]; 0 is the purely immediate reward.
        prompts_per_step: prompts sampled from in a step.
        completions_per_prompt: completions of each prompt.
        max_new_tokens: a completion's greatest length; one that reaches it has ended there,
            and nothing follows (see the trainers).
        temperature: of the policy, when sampling and when learning; above 0.
        eos_token_id: the token that ends a completion and counts as its last; None: none does.
        reward_weights: a factor for each reward function; None: 1 each.
        kl_coef: weight of the penalty on the KL divergence from the starting model.
        kl_estimator: "k2" | "k3" of `fastrl.ops.kl_penalty`. On the policy's own samples the
            gradient of k2 is that of the divergence; k3's, which GRPO takes, is not. (That of k1
            is 0 on average.) What is reported is always k3, unbiased and never negative.
        entropy_coef: weight of the entropy bonus.
        learning_rate, weight_decay: of AdamW.
        max_grad_norm: gradients are scaled down to this norm; None: never.
        max_steps: steps of the whole run, those before a resume included.
        max_bad_steps: so many steps in a row without an update stop the run.
        seed: decides the order of prompts and every sampled token.
        output_dir: checkpoints are written to `output_dir/checkpoint`; None: none are.
        save_every: steps between checkpoints; 0: only after the last step.
    """

    ALGORITHMS: ClassVar[tuple[str, ...]] = ()

    algorithm: str = ""
    gamma: float = 1.0
    prompts_per_step: int = 8
    completions_per_prompt: int = 8
    max_new_tokens: int = 32
    temperature: float = 1.0
    eos_token_id: int | None = None
    reward_weights: tuple[float, ...] | None = None
    kl_coef: float = 0.0
    kl_estimator: str = "k2"
    entropy_coef: float = 0.0
    learning_rate: float = 3e-4
    weight_decay: float = 0.0
    max_grad_norm: float | None = 1.0
    max_steps: int = 100
    max_bad_steps: int = 5
    seed: int = 0
    output_dir: str | None = None
    save_every: int = 0

    def __post_init__(self) -> None:
        if self.reward_weights is not None:
            object.__setattr__(self, "reward_weights", tuple(self.reward_weights))
            for weight in self.reward_weights:
                self._check_number("reward_weights", weight, -math.inf, math.inf)
        if self.output_dir is not None:
            object.__setattr__(self, "output_dir", str(self.output_dir))
        self._check_choice("algorithm", self.ALGORITHMS)
        self._check_choice("kl_estimator", ("k2", "k3"))
        self._check_range("gamma", 0.0, 1.0)
        for name in ("prompts_per_step", "completions_per_prompt", "max_new_tokens"):
            self._check_int(name, 1)
        self._check_int("max_bad_steps", 1)
        for name in ("max_steps", "save_every", "seed"):
            self._check_int(name, 0)
        if self.eos_token_id is not None:
            self._check_int("eos_token_id", 0)
        for name in ("temperature", "learning_rate"):
            self._check_range(name, 0.0, math.inf, above=True)
        for name in ("kl_coef", "entropy_coef", "weight_decay"):
            self._check_range(name, 0.0, math.inf)
        if self.max_grad_norm is not None:
            self._check_range("max_grad_norm", 0.0, math.inf, above=True)

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON types."""
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in dataclasses.asdict(self).items()
        }

    def _check_choice(self, name: str, choices: tuple[str, ...]) -> None:
        value = getattr(self, name)
        if value not in choices:
            self._fail(f"{name} one of {', '.join(map(repr, choices))}", value)

    def _check_int(self, name: str, low: int) -> None:
        value = getattr(self, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < low:
            self._fail(f"{name} a whole number >= {low}", value)

    def _check_range(self, name: str, low: float, high: float, *, above: bool = False) -> None:
        self._check_number(name, getattr(self, name), low, high, above=above)

    def _check_number(
        self, name: str, value: Any, low: float, high: float, *, above: bool = False
    ) -> None:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if is_number and math.isfinite(value) and low <= value <= high:
            if not (above and value == low):
                return
        if math.isinf(high):
            wanted = "finite" if math.isinf(low) else f"{'>' if above else '>='} {low:g}"
        else:
            wanted = f"in [{low:g}, {high:g}]"
        self._fail(f"{name} a number {wanted}", value)

    def _fail(self, expected: str, value: object) -> None:
        name = type(self).__name__
        raise ValueError(
            f"{name}: expected {expected}, got {value!r}. Leave it out for the default."
        )


@dataclass(frozen=True, kw_only=True)
class PolicyGradientConfig(TrainerConfig):
    """`TrainerConfig`, and:

    Args:
        algorithm: "reinforce".
        baseline: what is taken off a token's reward-to-go before it is learned from.
            "none"; "running_mean", of earlier steps at the same position; or "rloo", of the other
            completions of the same prompt at the same position (`fastrl.trainers.baselines`).
        baseline_decay: what "running_mean" keeps of its past per step, in [0, 1].
    """

    ALGORITHMS: ClassVar[tuple[str, ...]] = ("reinforce",)
    BASELINES: ClassVar[tuple[str, ...]] = ("none", "running_mean", "rloo")

    algorithm: str = "reinforce"
    baseline: str = "none"
    baseline_decay: float = 0.9

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_choice("baseline", self.BASELINES)
        self._check_range("baseline_decay", 0.0, 1.0)
        if self.baseline == "rloo" and self.completions_per_prompt < 2:
            self._fail('completions_per_prompt >= 2 with baseline "rloo"', 1)


@dataclass(frozen=True, kw_only=True)
class ActorCriticConfig(TrainerConfig):
    """`TrainerConfig`, and:

    Args:
        algorithm: "a2c".
        advantage: "returns": discounted rewards to the end, less the value; or "gae".
        gae_lambda: of "gae", in [0, 1]; 1 is the same as "returns".
        critic_coef: weight of the critic's loss.
        whiten_advantages: bring the actor's advantages to mean 0 and deviation 1 in every step.
    """

    ALGORITHMS: ClassVar[tuple[str, ...]] = ("a2c",)

    algorithm: str = "a2c"
    advantage: str = "returns"
    gae_lambda: float = 0.95
    critic_coef: float = 0.5
    whiten_advantages: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_choice("advantage", ("returns", "gae"))
        self._check_range("gae_lambda", 0.0, 1.0)
        self._check_range("critic_coef", 0.0, math.inf)
        if not isinstance(self.whiten_advantages, bool):
            self._fail("whiten_advantages True or False", self.whiten_advantages)
