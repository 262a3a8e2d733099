"""What both trainers' runs are made of. A value that cannot work is an error here."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, ClassVar


@dataclass(frozen=True, kw_only=True)
class TrainerConfig:
    """What both trainers share.

    Sampling:
        prompts_per_step: prompts sampled from in a step.
        completions_per_prompt: completions of each prompt.
        max_new_tokens: a completion's greatest length; one that reaches it has ended there,
            and nothing follows (see the trainers).
        max_rows: most completions that are sampled at a time; None: all of a step.
        temperature: of the policy, when sampling and when learning; above 0.
        temperature_end: what it has come to at max_steps, in equal steps; None: it stays.
        eos_token_id: one or several tokens that end a completion and count as its last; "auto":
            those of the model's or the tokenizer's configuration, if any; None: none.
        stop_strings: texts that end a completion (needs a tokenizer).
        max_prompt_tokens: a longer prompt is an error; None: any length.
        chat_template_kwargs: for the tokenizer's chat template.
    Rewards:
        gamma: discount per token, in [0, 1]; 0 is the purely immediate reward. Algorithms that
            compare a prompt's completions by the sums of their rewards take 1 alone.
        reward_weights: a factor for each reward function; None: 1 each.
        reward_timeout: seconds after which a reward function counts as hanging; None: never.
        reward_errors: "raise" what a reward function raises, or "mask" its completions.
        mask_truncated: do not learn from completions that reached max_new_tokens; None: as the
            algorithm has it.
    What is learned:
        kl_coef: weight of the penalty on the KL divergence from the starting model.
        kl_in: the penalty is a part of the "loss", or of each token's "reward".
        kl_estimator: "k2" | "k3" of `fastrl.ops.kl_penalty`, in the reward "k1" too; None: "k2", in
            the reward "k1". On the policy's own samples k1 as a reward, with gamma = 1, has the
            gradient of the divergence of whole completions, and k2 as a loss that of each token's,
            given the tokens before it; k3's as a loss, which GRPO takes, is neither. As a loss the
            tokens that another policy sampled are weighed with their importance. What is reported
            is always k3, unbiased and never negative.
        kl_target: the divergence per token that kl_coef is steered to; None: kl_coef stays.
        kl_horizon: completions after which a divergence far off has changed kl_coef by 20 %.
        kl_every: steps between two measurements of the divergence where kl_coef is 0; 0: it is
            never measured, and no copy of the starting model is kept.
        entropy_coef: weight of the entropy bonus.
        entropy_target: nats per token that entropy_coef is steered to; None: entropy_coef stays.
        entropy_rate: what a step adds to entropy_coef per nat that is missing.
        importance_cap: bound of the weight of tokens that another engine sampled, and in the KL
            loss of those that are replayed.
    The update:
        epochs: how often each rollout is learned from.
        minibatches: gradient steps in an epoch, each on some of the prompts.
        micro_batch_tokens: most tokens, those of prompts included, that are learned from at a
            time; their gradients add up to the whole's. None: all at once.
        precision: "float32", or "bfloat16" by autocast: head and log-probs stay in float32.
        gradient_checkpointing: compute layers again in the backward pass.
        dropout: as the model has it while learning; False: none, so that the update sees the
            policy that sampled.
        learning_rate, weight_decay: of AdamW.
        warmup_steps: steps in which the learning rate rises from 0.
        lr_schedule: "constant" | "linear" | "cosine", to 0 at max_steps.
        max_grad_norm: gradients are scaled down to this norm; None: never.
    The run:
        max_steps: steps of the whole run, those before a resume included.
        max_bad_steps: so many steps in a row without an update stop the run.
        seed: decides the order of prompts and every sampled token.
        output_dir: checkpoints are written to `output_dir/checkpoint`; None: none are.
        save_every: steps between checkpoints; 0: only after the last step.
    """

    ALGORITHMS: ClassVar[tuple[str, ...]] = ()

    unread: ClassVar[tuple[str, ...]] = ()  # fields that nothing reads beside the values of others

    algorithm: str = ""
    prompts_per_step: int = 8
    completions_per_prompt: int = 8
    max_new_tokens: int = 32
    max_rows: int | None = None
    temperature: float = 1.0
    temperature_end: float | None = None
    eos_token_id: int | tuple[int, ...] | str | None = "auto"
    stop_strings: tuple[str, ...] = ()
    max_prompt_tokens: int | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    gamma: float = 1.0
    reward_weights: tuple[float, ...] | None = None
    reward_timeout: float | None = None
    reward_errors: str = "raise"
    mask_truncated: bool | None = None
    kl_coef: float = 0.0
    kl_in: str = "loss"
    kl_estimator: str | None = None
    kl_target: float | None = None
    kl_horizon: int = 10_000
    kl_every: int = 1
    entropy_coef: float = 0.0
    entropy_target: float | None = None
    entropy_rate: float = 0.01
    importance_cap: float = 2.0
    epochs: int = 1
    minibatches: int = 1
    micro_batch_tokens: int | None = None
    precision: str = "float32"
    gradient_checkpointing: bool = False
    dropout: bool = False
    learning_rate: float = 3e-4
    weight_decay: float = 0.0
    warmup_steps: int = 0
    lr_schedule: str = "constant"
    max_grad_norm: float | None = 1.0
    max_steps: int = 100
    max_bad_steps: int = 5
    seed: int = 0
    output_dir: str | None = None
    save_every: int = 0

    def __post_init__(self) -> None:
        self._check_lists()
        if self.output_dir is not None:
            object.__setattr__(self, "output_dir", str(self.output_dir))
        in_reward = self.kl_in == "reward"
        if self.kl_estimator is None:
            object.__setattr__(self, "kl_estimator", "k1" if in_reward else "k2")
        self._check_choice("algorithm", self.ALGORITHMS)
        self._check_choice("kl_in", ("loss", "reward"))
        self._check_choice("kl_estimator", ("k1", "k2", "k3") if in_reward else ("k2", "k3"))
        self._check_choice("reward_errors", ("raise", "mask"))
        self._check_choice("precision", ("float32", "bfloat16"))
        self._check_choice("lr_schedule", ("constant", "linear", "cosine"))
        self._check_choice("mask_truncated", (None, True, False))
        for name in ("gradient_checkpointing", "dropout"):
            self._check_bool(name)
        self._check_range("gamma", 0.0, 1.0)
        for name in (
            "prompts_per_step", "completions_per_prompt", "max_new_tokens", "max_bad_steps",
            "kl_horizon", "epochs", "minibatches",
        ):  # fmt: skip
            self._check_int(name, 1)
        for name in ("max_steps", "save_every", "seed", "kl_every", "warmup_steps"):
            self._check_int(name, 0)
        if self.seed >= 2**63:
            self._fail("seed below 2 ** 63", self.seed)
        for name in ("temperature", "learning_rate", "importance_cap"):
            self._check_range(name, 0.0, math.inf, above=True)
        for name in ("kl_coef", "entropy_coef", "entropy_rate", "weight_decay"):
            self._check_range(name, 0.0, math.inf)
        for name in (
            "max_grad_norm", "temperature_end", "reward_timeout", "kl_target", "entropy_target"
        ):  # fmt: skip
            if getattr(self, name) is not None:
                self._check_range(name, 0.0, math.inf, above=True)
        for name in ("max_rows", "micro_batch_tokens", "max_prompt_tokens"):
            if getattr(self, name) is not None:
                self._check_int(name, 1)
        self._check_together()

    def _check_lists(self) -> None:
        """Fields that are lists, which JSON and TOML have in the place of tuples."""
        if self.reward_weights is not None:
            object.__setattr__(self, "reward_weights", tuple(self.reward_weights))
            for weight in self.reward_weights:
                self._check_number("reward_weights", weight, -math.inf, math.inf)
        stops = self.stop_strings
        stops = (stops,) if isinstance(stops, str) else tuple(stops or ())
        object.__setattr__(self, "stop_strings", stops)
        if not all(isinstance(stop, str) and stop for stop in stops):
            self._fail("stop_strings texts that are not empty", stops)
        eos = self.eos_token_id
        if isinstance(eos, str):
            if eos != "auto":
                self._fail('eos_token_id "auto" or whole numbers >= 0', eos)
        elif eos is not None and not isinstance(eos, int):
            object.__setattr__(self, "eos_token_id", tuple(eos))
        for token in eos if isinstance(eos, list | tuple) else (eos,):
            if token is not None and token != "auto":
                self._check_whole("eos_token_id", token, 0)

    def _check_together(self) -> None:
        if self.kl_target is not None and self.kl_coef == 0:
            self._fail("kl_coef > 0 with kl_target, which it is steered from", self.kl_coef)
        self._check_used(self.kl_target is not None, "without kl_target", "kl_horizon")
        self._check_used(self.entropy_target is not None, "without entropy_target", "entropy_rate")
        if self.minibatches > self.prompts_per_step:
            self._fail(
                f"minibatches <= prompts_per_step = {self.prompts_per_step}", self.minibatches
            )

    def _check_ratio(self, has_ratio: bool) -> None:
        """Without an importance ratio a rollout serves one gradient step."""
        if not has_ratio and self.epochs * self.minibatches > 1:
            self._fail(
                f"epochs = minibatches = 1 with algorithm {self.algorithm!r}, which has no ratio "
                "to the policy that sampled",
                (self.epochs, self.minibatches),
            )

    def _check_used(self, is_used: bool, where: str, *names: str, default: Any = None) -> None:
        """Fields that nothing reads `where` stay at their default there; that stands in `to_dict`,
        and is no error."""
        object.__setattr__(self, "unread", (*self.unread, *(() if is_used else names)))
        for name in () if is_used else names:
            own = type(self).__dataclass_fields__[name].default if default is None else default
            if getattr(self, name) != own:
                self._fail(f"{name} {own} {where}", getattr(self, name))

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON types."""
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in dataclasses.asdict(self).items()
        }

    def _check_choice(self, name: str, choices: tuple[Any, ...]) -> None:
        value = getattr(self, name)
        if value not in choices:
            self._fail(f"{name} one of {', '.join(map(repr, choices))}", value)

    def _check_bool(self, name: str) -> None:
        if not isinstance(getattr(self, name), bool):
            self._fail(f"{name} True or False", getattr(self, name))

    def _check_int(self, name: str, low: int) -> None:
        self._check_whole(name, getattr(self, name), low)

    def _check_whole(self, name: str, value: Any, low: int) -> None:
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
