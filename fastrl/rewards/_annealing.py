"""A coefficient that falls over training."""

from typing import Any


def check_coefficient(owner: str, scale: float, anneal_steps: int | None) -> None:
    """Raises ValueError where they cannot be used."""
    if not 0 <= scale < float("inf"):
        raise ValueError(
            f"{owner}: expected scale finite and >= 0, got {scale!r}. Pass what a state that was "
            "never seen is worth."
        )
    if anneal_steps is not None and not (isinstance(anneal_steps, int) and anneal_steps >= 1):
        raise ValueError(
            f"{owner}: expected anneal_steps to be an integer >= 1, got {anneal_steps!r}. Pass "
            "None to keep the scale as it is."
        )


def annealed(owner: str, scale: float, anneal_steps: int | None, trainer_state: Any) -> float:
    """scale · max(0, 1 − global_step / anneal_steps); scale where anneal_steps is None.

    Raises:
        ValueError: anneal_steps without a trainer's state.
    """
    if anneal_steps is None:
        return scale
    if trainer_state is None:
        raise ValueError(
            f"{owner}: expected trainer_state with anneal_steps = {anneal_steps}, got none. Pass "
            "an object with global_step, or anneal_steps = None."
        )
    return scale * max(0.0, 1.0 - trainer_state.global_step / anneal_steps)
