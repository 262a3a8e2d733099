import math

import pytest
import torch
from budget import assert_within_budget
from torch import library

import fastrl
from fastrl import reference
from fastrl.ops import _head


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    return request.param


@pytest.fixture(autouse=True)
def small_slices(monkeypatch):
    """Many slices of small problems."""
    monkeypatch.setattr(_head, "_CPU_SLICE", 2**13)
    monkeypatch.setattr(_head, "_GPU_SLICE", 2**13)


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_error_budget(device, dtype, softcap):
    hidden, weight = torch.randn(20, 8, device=device).to(dtype), torch.randn(999, 8).to(dtype)
    weight, bias = weight.to(device), torch.randn(999, device=device).to(dtype)
    token_ids = torch.randint(999, (20,), device=device)
    logits = hidden.float() @ weight.float().t() + bias.float()
    token_ids[:5], token_ids[7] = logits.argmax(-1)[:5], -100
    options = dict(temperature=0.7, softcap=softcap)
    actual = fastrl.token_stats(hidden, weight, token_ids, bias=bias, **options)
    eager = reference.token_stats(hidden, weight, token_ids, bias=bias, **options)
    wide = [x.double() for x in (hidden, weight)]
    truth = reference.token_stats(*wide, token_ids, bias=bias.double(), **options)
    assert actual._fields == truth._fields
    for a, e, t in zip(actual[:4], eager[:4], truth[:4], strict=True):
        assert a.dtype == torch.float32
        assert_within_budget(a, e, t, torch.float32 if device == "cpu" else dtype)
    assert torch.equal(actual.is_top1, truth.is_top1) and actual.is_top1.tolist()[:5] == [True] * 5
    assert not any(x[7] for x in actual)


def test_runs_are_equal_bit_for_bit_and_autocast_is_respected(device):
    hidden, weight = torch.randn(20, 8, device=device), torch.randn(999, 8, device=device)
    ids = torch.randint(999, (20,), device=device)
    cast = fastrl.token_stats(hidden.bfloat16(), weight.bfloat16(), ids)
    for _ in range(2):
        with torch.autocast(device, torch.bfloat16):
            found = fastrl.token_stats(hidden, weight, ids)
        assert all(torch.equal(a, b) for a, b in zip(found, cast, strict=True))


def test_the_first_of_equals_is_top_1(device):
    """Equals in one slice and in two."""
    weight = torch.zeros(700, 1, device=device)
    weight[[3, 5, 600]] = 2.0
    ids = torch.tensor([3, 5, 600, 4], device=device)
    stats = fastrl.token_stats(torch.ones(4, 1, device=device), weight, ids)
    assert stats.is_top1.tolist() == [True, False, False, False]


def test_an_ignored_id_that_is_the_likeliest(device):
    weight = torch.tensor([[1.0], [0.0]], device=device)
    ids = torch.tensor([0, 0], device=device)
    stats = fastrl.token_stats(torch.ones(2, 1, device=device), weight, ids, ignore_index=0)
    assert not any(x.any() for x in stats)


def test_uniform_and_certain_rows(device):
    """log sum p^2 is -log V of the uniform distribution, and near 0 of a certain one."""
    weight = torch.zeros(64, 2, device=device)
    weight[1, 1] = 40.0
    ids = torch.tensor([0, 1], device=device)
    stats = fastrl.token_stats(torch.eye(2, device=device), weight, ids)
    expected = torch.tensor([-math.log(64), 0.0], device=device)
    torch.testing.assert_close(stats.log_sum_sq_probs, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(stats.mean_logits, torch.tensor([0, 40 / 64], device=device))


def test_empty(device):
    none = torch.empty(0, dtype=torch.int64, device=device)
    stats = fastrl.token_stats(torch.empty(0, 3, device=device), torch.randn(5, 3).to(device), none)
    assert all(x.shape == (0,) for x in stats)


def test_opcheck(device):
    ids = torch.tensor([1, -100, 39], device=device)
    arguments = (torch.randn(3, 4, device=device), torch.randn(40, 4, device=device), ids)
    library.opcheck(torch.ops.fastrl.token_stats.default, (*arguments, None, 0.8, None, -100))
