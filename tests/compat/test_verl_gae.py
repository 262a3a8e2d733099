"""verl's compute_gae_advantage_return, against its definition token by token and by hand."""

import math

import pytest
import torch

from fastrl.compat import compute_gae_advantage_return

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
MASKS = [torch.int64, torch.int32, torch.float32, torch.float64, torch.bool]


def case(rows=5, steps=37, dtype=torch.float32):
    """Tool tokens anywhere and padding; a row that keeps nothing, and one that keeps all."""
    rewards, values = torch.randn(2, rows, steps).to(dtype)
    mask = (torch.rand(rows, steps) < 0.6).long()
    mask[0], mask[1], mask[2:, -4:] = 0, 1, 0
    return rewards, values, mask


def definition(rewards, values, mask, gamma, lam):
    """One token after the other, in double precision: advantages before whitening, after it, and
    returns. A token that does not count leaves what follows it as it is."""
    raw = torch.zeros(rewards.shape, dtype=torch.float64)
    for row in range(rewards.shape[0]):
        next_value = next_advantage = 0.0
        for t in reversed(range(rewards.shape[1])):
            if mask[row, t]:
                value = values[row, t].item()
                delta = rewards[row, t].item() + gamma * next_value - value
                next_value, next_advantage = value, delta + gamma * lam * next_advantage
            raw[row, t] = next_advantage
    kept = raw[mask.bool()]
    return (raw - kept.mean()) / (kept.var() + 1e-8).sqrt(), raw + values.double()


def assert_close(actual, expected, dtype):
    assert actual.dtype == dtype
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=tolerance)


def test_by_hand():
    """gamma = lam = 1/2. A_2 = 4 - 2; A_0 = (1 + 2/2 - 4) + A_2 / 4; the mean of both is 1/4."""
    advantages, returns = compute_gae_advantage_return(
        torch.tensor([[1.0, 100, 4, 100]]),
        torch.tensor([[4.0, 100, 2, 100]]),
        torch.tensor([[1, 0, 1, 0]]),
        0.5,
        0.5,
    )
    assert returns.tolist() == [[2.5, 102, 4, 100]]
    expected = torch.tensor([[-1.75, 1.75, 1.75, -0.25]]) / math.sqrt(2 * 1.75**2)
    torch.testing.assert_close(advantages, expected)


@pytest.mark.parametrize("gamma, lam", [(1.0, 1.0), (0.99, 0.95), (0.9, 0.0), (0.0, 0.5)])
@pytest.mark.parametrize("mask_dtype", MASKS)
def test_every_position(mask_dtype, gamma, lam):
    rewards, values, mask = case()
    expected = definition(rewards, values, mask, gamma, lam)
    found = compute_gae_advantage_return(rewards, values, mask.to(mask_dtype), gamma, lam)
    dtype = torch.float64 if mask_dtype == torch.float64 else torch.float32
    for x, y in zip(found, expected, strict=True):
        if dtype == torch.float64:  # float32 values and rewards in any case
            torch.testing.assert_close(x, y, rtol=2e-5, atol=2e-5)
        else:
            assert_close(x, y, dtype)
        assert x.dtype == dtype and not x.requires_grad


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_dtypes(dtype):
    rewards, values, mask = case(dtype=dtype)
    found = compute_gae_advantage_return(rewards, values, mask, 0.99, 0.95)
    for x, y in zip(found, definition(rewards, values, mask, 0.99, 0.95), strict=True):
        assert_close(x, y, dtype)


@pytest.mark.parametrize(
    "rewards, values, mask, result",
    [
        (torch.float32, torch.bfloat16, torch.int64, torch.float32),
        (torch.bfloat16, torch.bfloat16, torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16, torch.bool, torch.bfloat16),
        (torch.float16, torch.bfloat16, torch.int64, torch.float32),
        (torch.float32, torch.float64, torch.int64, torch.float64),
        (torch.int64, torch.float32, torch.int64, torch.float32),
    ],
    ids=str,
)
def test_mixed_dtypes_promote_as_in_torch(rewards, values, mask, result):
    r, v, m = case()
    r = (4 * r).to(rewards)
    found = compute_gae_advantage_return(r, v.to(values), m.to(mask), 0.9, 0.8)
    assert [x.dtype for x in found] == [result, result]
    assert (r * v.to(values) * m.to(mask)).dtype == result  # what verl's products come out as
    for x, y in zip(found, definition(r, v.to(values), m, 0.9, 0.8), strict=True):
        tolerance = max(TOLERANCE[result], TOLERANCE[torch.float32])
        torch.testing.assert_close(x.double(), y, rtol=tolerance, atol=tolerance)


def test_discounts_as_tensors():
    arguments = case()
    expected = compute_gae_advantage_return(*arguments, 0.5, 0.25)
    for shape in ((), (1,)):
        gamma, lam = torch.full(shape, 0.5), torch.full(shape, 0.25, requires_grad=True)
        found = compute_gae_advantage_return(*arguments, gamma, lam)
        assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))
    by_name = compute_gae_advantage_return(
        token_level_rewards=arguments[0], values=arguments[1], response_mask=arguments[2],
        gamma=0.5, lam=0.25,
    )  # fmt: skip
    assert all(torch.equal(x, y) for x, y in zip(by_name, expected, strict=True))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_stands_at_masked_tokens_reaches_no_other(bad):
    rewards, values, mask = case()
    expected = compute_gae_advantage_return(rewards, values, mask, 0.99, 0.95)
    rewards, values = (x.masked_fill(mask == 0, bad) for x in (rewards, values))
    advantages, returns = compute_gae_advantage_return(rewards, values, mask, 0.99, 0.95)
    assert torch.equal(advantages, expected[0])
    assert torch.equal(returns[mask == 1], expected[1][mask == 1])
    assert not returns[mask == 0].isfinite().any()  # A + values, and that is what values holds


def test_strides_gradients_and_compiling():
    rewards, values, mask = case()
    expected = compute_gae_advantage_return(rewards, values, mask, 0.99, 0.95)
    strided = [x.T.contiguous().T for x in (rewards, values, mask)]
    strided[1].requires_grad_()
    found = compute_gae_advantage_return(*strided, 0.99, 0.95)
    compiled = torch.compile(compute_gae_advantage_return, fullgraph=True)
    for x, y in zip(found, expected, strict=True):
        assert torch.equal(x, y) and not x.requires_grad
    for x, y in zip(compiled(rewards, values, mask, 0.99, 0.95), expected, strict=True):
        torch.testing.assert_close(x, y)


def test_one_step():
    advantages, returns = compute_gae_advantage_return(
        torch.tensor([[3.0], [1.0], [9.0]]), torch.zeros(3, 1), torch.tensor([[1], [1], [0]]), 1, 1
    )
    assert returns.tolist() == [[3.0], [1.0], [0.0]]
    torch.testing.assert_close(advantages, torch.tensor([[1.0], [-1], [-2]]) / math.sqrt(2))


ONES = torch.ones(2, 3)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"response_mask": 0 * ONES}, ValueError, "at least two tokens, got 0. One advantage has"),
        ({"response_mask": (torch.arange(6) == 4).view(2, 3)},
         ValueError, "at least two tokens, got 1"),
        ({"response_mask": 0.5 * ONES}, ValueError, "response_mask of 0 and 1, got other numbers"),
        ({"response_mask": 2 * ONES.long()}, ValueError, "response_mask of 0 and 1"),
        ({"response_mask": ONES[:, :2]}, ValueError, r"response_mask \(2, 3\) like values"),
        ({"token_level_rewards": ONES[:1]}, ValueError, r"token_level_rewards \(2, 3\) like"),
        ({"values": ONES.long()}, TypeError, "values of dtype float32"),
        ({"gamma": 1.5}, ValueError, r"gamma in \[0, 1\]"),
        ({"lam": torch.ones(2)}, ValueError, r"lam of one entry, got \(2,\)"),
        ({k: ONES[:0] for k in ("token_level_rewards", "values", "response_mask")},
         ValueError, "at least two tokens, got 0"),
        ({k: ONES[:, :0] for k in ("token_level_rewards", "values", "response_mask")},
         ValueError, "at least two tokens, got 0"),
    ],
)  # fmt: skip
def test_what_is_refused(change, error, message):
    arguments = {
        "token_level_rewards": ONES, "values": ONES, "response_mask": ONES, "gamma": 1.0, "lam": 1.0
    }  # fmt: skip
    with pytest.raises(error, match=message):
        compute_gae_advantage_return(**(arguments | change))
