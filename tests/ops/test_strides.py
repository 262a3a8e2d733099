"""Memory not laid out as usual: columns, lone rows with a step, nothing at all."""

import pytest
import torch
from returns_cases import INPUTS, OPS, call, case, on_tensors

import fastrl
from fastrl.ops.token_logprobs import _overlaps

IDS = torch.tensor([[2, 0], [4, 1], [3, 0]])[:, 0]  # a column: 3 ids, two numbers apart


def every_other(x):
    """The same numbers with a step of two along the last axis."""
    wide = torch.zeros(*x.shape[:-1], 2 * x.shape[-1], dtype=x.dtype)
    wide[..., ::2] = x
    return wide[..., ::2]


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("shape", [(1, 6), (1, 1, 6), (6,)])
def test_returns_of_a_lone_row_with_a_step(op, shape):
    arguments = case(op, "mask bootstrap_value terminated", shape, torch.float32)
    found = []
    for layout in (torch.Tensor.contiguous, every_other):
        given = on_tensors(lambda x, lay=layout: lay(x) if x.dim() else x, arguments)
        leaves = [given[name].requires_grad_() for name in INPUTS[op]]
        outputs = call(fastrl, op, given)
        grads = torch.autograd.grad(sum(x.sum() for x in outputs), leaves, allow_unused=True)
        found.append([*outputs, *(x for x in grads if x is not None)])
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("shape", [(6, 4), (6, 2, 3)])
def test_of_steps_first_the_results_lie_as_tracing_expects(shape):
    rewards = torch.randn(shape).movedim(0, -1)
    real = fastrl.discounted_returns(rewards, gamma=0.9)
    traced = fastrl.discounted_returns(rewards.to("meta"), gamma=0.9)
    assert traced.shape == real.shape and traced.stride() == real.stride() == rewards.stride()


@pytest.mark.parametrize(
    "shape, strides, is_shared",
    [
        ((2, 3), (3, 1), False),
        ((2, 3), (2, 1), True),
        ((2, 3), (6, 2), False),
        ((2, 3), (4, 2), True),
        ((4, 3), (1, 4), False),
        ((4, 3), (0, 1), True),
        ((1, 3), (2, 1), False),  # a lone row's step leads nowhere
    ],
)
def test_entries_that_share_memory_are_known(shape, strides, is_shared):
    assert _overlaps(torch.zeros(20).as_strided(shape, strides)) == is_shared


def test_token_ids_may_be_a_column():
    hidden, weight = torch.randn(3, 4, requires_grad=True), torch.randn(5, 4)

    def loss(logprobs, entropy, rows):
        return logprobs

    def all_of(ids):
        total, logprobs, _ = fastrl.linear_token_loss(hidden, weight, ids, loss)
        (grad,) = torch.autograd.grad(total, hidden)
        of_linear = fastrl.linear_token_logprobs(hidden, weight, ids)
        (of_linear_grad,) = torch.autograd.grad(of_linear.sum(), hidden)
        stats = fastrl.token_stats(hidden, weight, ids)
        return logprobs, grad, of_linear, of_linear_grad, *stats

    for column, dense in zip(all_of(IDS), all_of(IDS.contiguous()), strict=True):
        assert torch.equal(column, dense)


@pytest.mark.parametrize("rows", [(0,), (2, 0)])
def test_no_rows_and_a_step_along_the_vocabulary(rows):
    logits = torch.zeros(*rows, 14)[..., ::2].requires_grad_()
    ids = torch.zeros(rows, dtype=torch.int64)
    logprobs = fastrl.token_logprobs(logits, ids)
    logprobs.sum().backward()
    assert logprobs.shape == rows and logits.grad.shape == (*rows, 7)
    kept = torch.zeros(0, dtype=torch.int64), torch.zeros(1, dtype=torch.int32)
    assert fastrl.token_logprobs(logits, ids, kept=kept).shape == rows
    assert fastrl.sample_tokens(logits)[0].shape == rows


def test_a_head_without_a_width_is_refused():
    with pytest.raises(ValueError, match=r"weight \[V, D\], V >= 1 and D >= 1, got \(5, 0\)"):
        fastrl.linear_token_logprobs(torch.zeros(3, 0), torch.zeros(5, 0), IDS)
