"""Rounding to float32 hides nearly every difference of two doubles: a row's bits, unrounded."""

import pytest
import torch
from returns_cases import GIVEN, OPS, case, on_tensors, outputs_and_gradients

import fastrl

LENGTH = 45  # some vectors and a rest, at every width


def column(v):
    return v.movedim(-1, 0).contiguous().movedim(0, -1) if v.dim() > 1 else v


@pytest.mark.parametrize("given", GIVEN)
@pytest.mark.parametrize("op", OPS)
def test_a_row_gives_the_same_bits_in_every_layout(simd_level, op, given):
    batch = case(op, given, (11, LENGTH), torch.float64)
    weights = torch.randn(2, 11, LENGTH)
    together = outputs_and_gradients(fastrl, op, batch, weights)
    for row in (0, 10):
        one = on_tensors(lambda v, row=row: v[row], batch)
        alone = outputs_and_gradients(fastrl, op, one, weights[:, row])
        for actual, expected in zip(alone, together, strict=True):
            assert torch.equal(actual, expected[row])
    columns = outputs_and_gradients(fastrl, op, on_tensors(column, batch), weights)
    for actual, expected in zip(columns, together, strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("n", [2, 3, 6, 7, 50])
def test_n_steps_of_a_row_do_not_look_at_longer_rows(simd_level, n):
    """Where n reaches over the row, over the row behind it, and over neither."""
    lengths = [6, 3, 1, 6, 40]
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    packed = [torch.randn(int(bounds[-1]), dtype=torch.float64) for _ in range(3)]
    rewards, values, grad = packed

    def run(rewards, values, grad, **layout):
        leaves = rewards.detach().requires_grad_(), values.detach().requires_grad_()
        returns = fastrl.n_step_returns(*leaves, gamma=0.97, n=n, **layout)
        return returns.detach(), *torch.autograd.grad(returns, leaves, grad)

    together = run(rewards, values, grad, cu_seqlens=bounds.int())
    for start, end in zip(bounds.tolist(), bounds.tolist()[1:], strict=False):
        alone = run(*(x[start:end] for x in packed))
        for actual, expected in zip(alone, together, strict=True):
            assert torch.equal(actual, expected[start:end])
