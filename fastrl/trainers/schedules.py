"""What changes from step to step: learning rate, temperature, and steered coefficients."""

import math

from fastrl.trainers.config import TrainerConfig


def learning_rate(config: TrainerConfig, step: int) -> float:
    """Of step `step`, counted from 0."""
    rate = config.learning_rate
    if step < config.warmup_steps:
        return rate * (step + 1) / config.warmup_steps
    left = 1 - (step - config.warmup_steps) / max(1, config.max_steps - config.warmup_steps)
    if config.lr_schedule == "linear":
        return rate * max(0.0, left)
    if config.lr_schedule == "cosine":
        return rate * 0.5 * (1 + math.cos(math.pi * (1 - max(0.0, left))))
    return rate


def temperature(config: TrainerConfig, step: int) -> float:
    """Of step `step`, counted from 0; temperature_end in the last one."""
    if config.temperature_end is None or config.max_steps < 2:
        return config.temperature
    done = min(1.0, step / (config.max_steps - 1))
    return config.temperature + done * (config.temperature_end - config.temperature)


class KLController:
    """kl_coef, fixed, or steered so that the divergence comes to a target.

        e = clip(kl / target - 1, -0.2, 0.2),   coef <- coef (1 + e min(1, completions / horizon))

    Reference: Ziegler et al. 2019, arXiv:1909.08593, section 2.2.
    """

    def __init__(self, coef: float, target: float | None, horizon: int) -> None:
        self.coef, self._target, self._horizon = coef, target, horizon

    def update(self, kl: float, completions: int) -> None:
        """After a step whose mean divergence per token was kl."""
        if self._target is not None and math.isfinite(kl):
            error = min(0.2, max(-0.2, kl / self._target - 1))
            # Not to 0, where it would stay, however many completions a step has.
            self.coef *= 1 + error * min(1.0, completions / self._horizon)

    def state_dict(self) -> dict[str, float]:
        return {"coef": self.coef}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.coef = state["coef"]


class EntropyController:
    """entropy_coef, fixed, or steered so that the policy's entropy comes to a target.

    coef <- max(0, coef + rate (target - entropy))
    """

    def __init__(self, coef: float, target: float | None, rate: float) -> None:
        self.coef, self._target, self._rate = coef, target, rate

    def update(self, entropy: float) -> None:
        """After a step whose mean entropy per token was entropy, nats."""
        if self._target is not None and math.isfinite(entropy):
            self.coef = max(0.0, self.coef + self._rate * (self._target - entropy))

    def state_dict(self) -> dict[str, float]:
        return {"coef": self.coef}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.coef = state["coef"]
