"""Two episodes small enough to be worked out by hand, and random ones, for the returns' tests."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

NAN = float("nan")


@pytest.fixture
def masked_row() -> dict[str, Any]:
    """Six steps: 1 and 5 do not exist, 3 ends the episode, the value after the last step is 32."""
    return {
        "rewards": torch.tensor([[1.0, NAN, 4.0, 2.0, 8.0, NAN]]),
        "values": torch.tensor([[2.0, NAN, 8.0, 4.0, 16.0, NAN]]),
        "q_values": torch.tensor([[1.0, NAN, 4.0, 6.0, 8.0, NAN]]),
        "log_ratio": torch.tensor([[2.0, NAN, 0.5, 1.0, 4.0, NAN]]).log(),
        "terminated": torch.tensor([[False, True, False, True, False, True]]),
        "mask": torch.tensor([[True, False, True, True, True, False]]),
        "bootstrap_value": torch.tensor([32.0]),
    }


@pytest.fixture
def broken_row() -> dict[str, Any]:
    """Four steps: 1 is truncated, 2 is truncated and terminated, so terminated."""
    return {
        "rewards": torch.tensor([[1.0, 2.0, 4.0, 8.0]]),
        "values": torch.tensor([[2.0, 4.0, 8.0, 16.0]]),
        "q_values": torch.tensor([[1.0, 3.0, 8.0, 8.0]]),
        "log_ratio": torch.tensor([[0.5, 2.0, 1.0, 0.25]]).log(),
        "next_values": torch.tensor([[4.0, 10.0, 16.0, 32.0]]),
        "terminated": torch.tensor([[False, False, True, False]]),
        "truncated": torch.tensor([[False, True, True, False]]),
    }


@pytest.fixture
def packed_rows(masked_row: dict[str, Any], broken_row: dict[str, Any]) -> dict[str, Any]:
    """masked_row, an empty segment and broken_row, packed."""
    first = masked_row | {
        "next_values": torch.tensor([[8.0, NAN, 4.0, 99.0, 32.0, NAN]]),
        "truncated": torch.tensor([[False, True, False, False, False, False]]),
    }
    second = broken_row | {"mask": torch.ones(1, 4, dtype=torch.bool)}
    packed = {name: torch.cat([first[name][0], second[name][0]]) for name in second}
    return packed | {"cu_seqlens": torch.tensor([0, 6, 6, 10], dtype=torch.int32)}


@pytest.fixture
def random_rows() -> Callable[..., dict[str, Any]]:
    """float64 inputs [B, T] with every kind of flag inside the rows."""

    def make(batch: int, steps: int, seed: int = 0) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(seed)

        def normal() -> torch.Tensor:
            return torch.randn(batch, steps, generator=generator, dtype=torch.float64)

        def chance(p: float) -> torch.Tensor:
            return torch.rand(batch, steps, generator=generator) < p

        return {
            "rewards": normal(),
            "values": normal(),
            "q_values": normal(),
            "log_ratio": normal(),
            "next_values": normal(),
            "gamma": 0.5 + 0.5 * torch.sigmoid(normal()),
            "gae_lambda": torch.sigmoid(normal()),
            "terminated": chance(0.15),
            "truncated": chance(0.15),
            "mask": chance(0.7),
        }

    return make
