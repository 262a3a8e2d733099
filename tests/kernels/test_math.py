import math

import pytest
import torch

# Where the series is used, where it is not, and on both sides of the bounds between.
LOG1P = [-1e-30, 1e-8, -1e-8, 1e-3, -0.2999, -0.3001, -0.9, 0.4999, 0.5001, 1.0, 3e4, 1e30]
EXPM1 = [-1e-30, -1e-8, -1e-3, -0.1, -0.3, -0.4999, -0.5001, -0.7, -1.0, -1.5, -10.0, -80.0, -1e4]


@pytest.mark.parametrize("function, points", [("log1p", LOG1P), ("expm1", EXPM1)])
def test_relative_error(interpreted, function, points):
    x = torch.tensor(points + [points[0]] * (16 - len(points)))
    exact = getattr(torch, function)(x.double())
    actual = interpreted("math_probe", "probe", function, x)
    assert ((actual.double() - exact).abs() / exact.abs()).max() < 3e-7


def test_at_the_ends(interpreted):
    """0 is exactly 0, -1 is nothing counted at all, and NaN stays."""
    x = torch.tensor([0.0, -1.0, math.inf, math.nan])
    out = interpreted("math_probe", "probe", "log1p", x)
    assert out[:3].tolist() == [0.0, -math.inf, math.inf] and out[3].isnan()
    x = torch.tensor([0.0, -0.0, -math.inf, math.nan])
    out = interpreted("math_probe", "probe", "expm1", x)
    assert out[:3].tolist() == [0.0, 0.0, -1.0] and out[3].isnan()


@pytest.mark.parametrize("size", [1, 2, 64, 4096])
def test_a_sum_adds_neighbours_first(interpreted, size):
    x = torch.randn(size)
    expected = x
    while expected.numel() > 1:
        expected = expected[::2] + expected[1::2]
    assert torch.equal(interpreted("math_probe", "probe", "ordered_sum", x), expected)
