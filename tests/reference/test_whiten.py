import statistics
from fractions import Fraction

import pytest
import torch

from fastrl.reference import whiten

NAN = float("nan")


def test_by_hand():
    # mean 3, variance (4 + 1 + 9) / 2 = 7
    x = torch.tensor([[1.0, NAN], [2.0, 6.0]], dtype=torch.float64)
    got = whiten(x, torch.tensor([[True, False], [True, True]]))
    expected = torch.tensor([[-2.0, 0.0], [-1.0, 3.0]], dtype=torch.float64) / (7 + 1e-8) ** 0.5
    torch.testing.assert_close(got, expected)


def test_zero_mean_and_unit_variance():
    torch.manual_seed(0)
    got = whiten(1e4 + 3 * torch.randn(1000))
    assert abs(got.mean().item()) < 1e-5
    assert abs(got.var().item() - 1) < 1e-5


@pytest.mark.parametrize(
    ("offset", "dtype"), [(0.0, torch.float32), (1e6, torch.float32), (2.0**40, torch.float64)]
)
def test_moments_are_exact_at_any_offset(offset, dtype):
    """Against fractions: nothing of the result's own precision is lost to the offset."""
    torch.manual_seed(1)
    x = (offset + torch.randn(501, dtype=torch.float64)).to(dtype)
    exact = [Fraction(number) for number in x.tolist()]
    mean, variance = statistics.mean(exact), statistics.variance(exact)
    expected = [float(number - mean) / (float(variance) + 1e-8) ** 0.5 for number in exact]
    eps = torch.finfo(dtype).eps
    truth = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(whiten(x).double(), truth, rtol=8 * eps, atol=8 * eps)


def test_what_counts_and_is_not_finite_shows():
    for bad in (NAN, float("inf")):
        assert whiten(torch.tensor([1.0, bad, 3.0])).isnan().all()


def test_fewer_than_two_entries():
    got = whiten(torch.tensor([5.0, NAN]), torch.tensor([True, False]))
    assert got.tolist() == [0.0, 0.0]
    assert whiten(torch.full((3,), NAN), torch.zeros(3, dtype=torch.bool)).tolist() == [0.0] * 3
    assert whiten(torch.zeros(0)).shape == (0,)


def test_equal_entries():
    assert whiten(torch.full((4,), 0.1)).abs().max() < 1e-3


def test_dtype_and_detached():
    x = torch.randn(4, requires_grad=True)
    assert not whiten(x).requires_grad
    assert whiten(x.bfloat16()).dtype == torch.float32
