"""What the training of a preference model is made of."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from fastrl.ops._checks import fail

_OP = "PreferenceConfig"


@dataclass(frozen=True, kw_only=True)
class PreferenceConfig:
    """Settings of `train_preference_model`; see there for the loss.

    Args:
        epochs: passes over the pairs.
        max_steps: gradient steps, in as many epochs as they take; None: those of `epochs`.
        pairs_per_step: pairs in a gradient step; those of one prompt stand together.
        learning_rate, weight_decay: of AdamW.
        warmup_steps: steps in which the learning rate rises from 0.
        lr_schedule: "constant" | "linear" | "cosine", to 0 after the last step.
        max_grad_norm: gradients are scaled down to this norm; None: never.
        margin: m, what the chosen completion's score has to lead by, nats; None: each pair's own
            "margin", and 0 where it has none.
        centering: c, weight of the squared sum of both scores, which holds their mean at 0.
        label_smoothing: share of the judgements that are taken for wrong, in [0, 0.5).
        ties: "half": a tie's target is 1/2, without a margin; "drop": it is not learned from.
        token_loss: "last": the loss of both whole completions; "mean": averaged over the prefixes
            of 1, 2, ... tokens of both, of which the shorter one stays whole when it has ended, so
            that early tokens learn what they are worth.
        freeze_trunk: train the value head alone.
        micro_batch_tokens: most tokens, those of prompts included, that are learned from at a
            time; their gradients add up to the whole's. None: all at once.
        max_bad_steps: so many steps in a row whose loss or gradient is not finite stop the run.
        seed: decides the order of the pairs.
    Raises:
        ValueError: a value that cannot work.
    """

    epochs: int = 1
    max_steps: int | None = None
    pairs_per_step: int = 32
    learning_rate: float = 1e-4
    weight_decay: float = 0.0
    warmup_steps: int = 0
    lr_schedule: str = "constant"
    max_grad_norm: float | None = 1.0
    margin: float | None = None
    centering: float = 0.0
    label_smoothing: float = 0.0
    ties: str = "half"
    token_loss: str = "last"
    freeze_trunk: bool = False
    micro_batch_tokens: int | None = None
    max_bad_steps: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        for name, low in {
            "epochs": 1, "max_steps": 0, "pairs_per_step": 1, "warmup_steps": 0,
            "micro_batch_tokens": 1, "max_bad_steps": 1, "seed": 0,
        }.items():  # fmt: skip
            self._check_whole(name, low)
        for name in ("learning_rate", "max_grad_norm"):
            self._check_number(name, above=True)
        for name in ("weight_decay", "margin", "centering", "label_smoothing"):
            self._check_number(name)
        if self.label_smoothing >= 0.5:
            # From there on the judgements say nothing, or the opposite.
            raise self._wrong("label_smoothing below 0.5", self.label_smoothing)
        self._check_choice("lr_schedule", ("constant", "linear", "cosine"))
        self._check_choice("ties", ("half", "drop"))
        self._check_choice("token_loss", ("last", "mean"))
        self._check_choice("freeze_trunk", (True, False))

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON types."""
        return dataclasses.asdict(self)

    def learning_rate_at(self, step: int, steps: int) -> float:
        """Of step `step` of `steps`, counted from 0."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        left = 1 - (step - self.warmup_steps) / max(1, steps - self.warmup_steps)
        if self.lr_schedule == "linear":
            return self.learning_rate * left
        if self.lr_schedule == "cosine":
            return self.learning_rate * 0.5 * (1 + math.cos(math.pi * (1 - left)))
        return self.learning_rate

    def _check_whole(self, name: str, low: int) -> None:
        value = getattr(self, name)
        if value is None and _may_be_none(name):
            return
        if not isinstance(value, int) or isinstance(value, bool) or value < low:
            raise self._wrong(f"{name} a whole number >= {low}", value)

    def _check_number(self, name: str, *, above: bool = False) -> None:
        value = getattr(self, name)
        if value is None and _may_be_none(name):
            return
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not 0 <= value < math.inf or (above and value == 0):
            raise self._wrong(f"{name} a number {'>' if above else '>='} 0", value)

    def _check_choice(self, name: str, choices: tuple[Any, ...]) -> None:
        value = getattr(self, name)
        if not any(value is choice or value == choice for choice in choices):
            raise self._wrong(f"{name} one of {', '.join(map(repr, choices))}", value)

    @staticmethod
    def _wrong(expected: str, value: object) -> ValueError:
        return fail(_OP, expected, repr(value), "Leave it out for the default.")


def _may_be_none(name: str) -> bool:
    return name in ("max_steps", "micro_batch_tokens", "max_grad_norm", "margin")
