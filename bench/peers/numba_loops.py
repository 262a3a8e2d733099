"""The returns as a person writes them with numba: one pass, one thread, nothing vectorised.

An argument that is None is compiled away: each case runs a loop with just what it needs.
"""

from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]


@numba.njit
def gae(
    rewards: Floats, values: Floats, bounds: Any, bootstrap_value: Any, next_values: Any,
    terminated: Any, mask: Any, gamma: np.float32, gae_lambda: np.float32,
) -> tuple[Floats, Floats]:  # fmt: skip
    """Flat rewards and values [N]; row s is bounds[s]:bounds[s + 1]."""
    advantages, returns = np.empty_like(rewards), np.empty_like(rewards)
    for s in range(len(bounds) - 1):
        advantage = np.float32(0)
        following = np.float32(0)
        if bootstrap_value is not None:
            following = bootstrap_value[s]
        for t in range(bounds[s + 1] - 1, bounds[s] - 1, -1):
            if mask is not None:
                if not mask[t]:
                    advantages[t] = 0
                    returns[t] = 0
                    continue
            if next_values is not None:
                following = next_values[t]
            discount = gamma
            if terminated is not None:
                discount = np.float32(0) if terminated[t] else gamma
            delta = rewards[t] + discount * following - values[t]
            advantage = delta + discount * gae_lambda * advantage
            advantages[t] = advantage
            returns[t] = advantage + values[t]
            following = values[t]
    return advantages, returns


@numba.njit
def lambda_returns(
    rewards: Floats, values: Floats, bounds: Any, bootstrap_value: Any, terminated: Any,
    gamma: np.float32, gae_lambda: np.float32,
) -> Floats:  # fmt: skip
    returns = np.empty_like(rewards)
    for s in range(len(bounds) - 1):
        following = np.float32(0)
        if bootstrap_value is not None:
            following = bootstrap_value[s]
        then = following
        for t in range(bounds[s + 1] - 1, bounds[s] - 1, -1):
            discount = gamma
            if terminated is not None:
                discount = np.float32(0) if terminated[t] else gamma
            mixed = (np.float32(1) - gae_lambda) * following + gae_lambda * then
            then = rewards[t] + discount * mixed
            returns[t] = then
            following = values[t]
    return returns


@numba.njit
def discounted_returns(rewards: Floats, bounds: Any, terminated: Any, gamma: np.float32) -> Floats:
    returns = np.empty_like(rewards)
    for s in range(len(bounds) - 1):
        then = np.float32(0)
        for t in range(bounds[s + 1] - 1, bounds[s] - 1, -1):
            discount = gamma
            if terminated is not None:
                discount = np.float32(0) if terminated[t] else gamma
            then = rewards[t] + discount * then
            returns[t] = then
    return returns
