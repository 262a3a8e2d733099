"""What attention gives a row or a tree does not depend on what else is in the batch, on where it
stands there, or on how its tensors lie in memory: not in a bit."""

import itertools

import pytest
import torch
from attention_cases import assert_same_bits, inputs, layout_of, run

HALF, SINGLE, WINDOW = torch.float16, torch.float32, {"window": 40}


def i32(*numbers):
    return torch.tensor(numbers, dtype=torch.int32)


@pytest.mark.parametrize("options", [{}, WINDOW, {"causal": False}], ids=str)
def test_a_row_in_a_batch(interpreted, options):
    tensors = inputs((3, 1, 1, 150, 170, 32), HALF)
    ends = {"key_start": i32(0, 30, 5), "key_end": i32(170, 170, 90)}
    together = run(interpreted, tensors, **ends, **options)
    for row in range(3):
        of_row = {name: end[row : row + 1] for name, end in ends.items()}
        alone = run(interpreted, [x[row : row + 1] for x in tensors], **of_row, **options)
        assert_same_bits(alone, [x[row : row + 1] for x in together])


@pytest.mark.parametrize(
    "T, dtype, options", [(110, HALF, {}), (110, HALF, WINDOW), (50, SINGLE, {})]
)
def test_a_row_without_its_padding(interpreted, T, dtype, options):
    """43 tokens on the left, or on the right: blocks are counted from a row's first key."""
    tensors = inputs((1, 2, 1, T, T, 32), dtype)
    alone = run(interpreted, tensors, **options)

    def padded(x, left, right):
        sides = [torch.randn(*x.shape[:2], n, *x.shape[3:]).to(x.dtype) for n in (left, right)]
        return torch.cat([sides[0], x, sides[1]], dim=2)

    left = [padded(x, 43, 0) for x in tensors]
    found = run(interpreted, left, key_start=i32(43), **options)
    assert_same_bits([x[:, :, 43:] for x in found], alone)
    right = [padded(x, 0, 43) if i in (1, 2) else x for i, x in enumerate(tensors)]
    output, lse, grad_query, *grads = run(interpreted, right, key_end=i32(T), **options)
    assert_same_bits([output, lse, grad_query, *(x[:, :, :T] for x in grads)], alone)


TREE = ([50, 60, 0, 70, 30], [-1, 0, 1, 1, 0])
BEFORE = ([17, 40], [-1, 0])
AFTER = ([90, 5], [-1, 0])


def forest(*trees):
    lengths = [length for lengths, _ in trees for length in lengths]
    starts = itertools.accumulate((len(lengths) for lengths, _ in trees), initial=0)
    prefix = [p if p < 0 else p + s for (_, ps), s in zip(trees, starts, strict=False) for p in ps]
    return layout_of(lengths, prefix)


@pytest.mark.parametrize("dtype, options", [(HALF, {}), (HALF, WINDOW), (SINGLE, WINDOW)])
def test_a_tree_among_others(interpreted, dtype, options):
    alone, together = forest(TREE), forest(BEFORE, TREE, AFTER)
    first, N = 57, alone.num_tokens
    tensors = inputs((1, 1, 1, together.num_tokens, together.num_tokens, 32), dtype)
    own = [x[:, :, first : first + N].clone() for x in tensors]
    found = run(interpreted, tensors, layout=together, **options)
    expected = run(interpreted, own, layout=alone, **options)
    assert_same_bits([x[:, :, first : first + N] for x in found], expected)


def test_a_completion_among_others(interpreted):
    """Output, lse and the gradient of a query depend on what it continues alone."""
    lengths = [70, 30, 45, 100]
    layout = layout_of(lengths, [-1, 0, 0, 0])
    tensors = inputs((1, 2, 1, 245, 245, 32), HALF)
    together = run(interpreted, tensors, layout=layout)
    starts = [0, 70, 100, 145]
    for s in (1, 2, 3):
        own = torch.cat([torch.arange(70), torch.arange(starts[s], starts[s] + lengths[s])])
        pair = layout_of([70, lengths[s]], [-1, 0])
        alone = run(interpreted, [x[:, :, own] for x in tensors], layout=pair)
        assert_same_bits(alone[:3], [x[:, :, own] for x in together[:3]])


def test_a_window_that_ends_nowhere(interpreted):
    """Masked or not, and in whichever order the edges come."""
    layout = layout_of([70, 30, 45], [-1, 0, 0])
    tensors = inputs((1, 1, 1, 145, 145, 32), HALF)
    assert_same_bits(
        run(interpreted, tensors, layout=layout, window=144),  # of 145 keys
        run(interpreted, tensors, layout=layout, window=10**9),
    )


LAYOUTS = {
    "heads behind tokens": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "a part of a projection": lambda x: torch.cat([x, x], dim=-1)[..., : x.shape[-1]],
    "off 16 bytes": lambda x: torch.cat([x.flatten()[:1], x.flatten()])[1:].view(x.shape),
    "odd strides": lambda x: torch.cat([x, x[..., :1]], dim=-1)[..., :-1],
    "rows that are not dense": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "every other token": lambda x: x.repeat_interleave(2, dim=2)[:, :, ::2],
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_strides(interpreted, name):
    D = 20 if name == "odd strides" else 32
    *tensors, grad_lse = inputs((2, 2, 2, 40, 40, D), HALF)
    expected = run(interpreted, [*tensors, grad_lse])
    lying = [LAYOUTS[name](x) for x in tensors]
    before = [x.clone() for x in lying]
    found = run(interpreted, [*lying, grad_lse])
    assert_same_bits(found, expected)
    assert_same_bits(lying, before)
    # As the op's fake tells torch.compile, whatever the inputs' strides are.
    assert all(x.transpose(1, 2).is_contiguous() for x in (found[0], *found[2:]))


def test_tensors_that_lie_each_in_its_own_way(interpreted):
    *tensors, grad_lse = inputs((2, 4, 2, 40, 40, 32), HALF)
    expected = run(interpreted, [*tensors, grad_lse])
    for i in (0, 1, 3):
        tensors[i] = LAYOUTS["every other token" if i == 0 else "heads behind tokens"](tensors[i])
    found = run(interpreted, [*tensors, grad_lse.mT.contiguous().mT])
    assert_same_bits(found, expected)


def test_broadcast_keys_and_gradients(interpreted):
    query, key, value, grad_output, grad_lse = inputs((2, 2, 2, 40, 40, 32), HALF)
    one = [x[:1, :1].expand(2, 2, 40, 32) for x in (key, value)]
    grad_output = grad_output[:, :, :1, :1].expand(2, 2, 40, 32)
    found = run(interpreted, [query, *one, grad_output, grad_lse])
    copies = [x.contiguous() for x in (query, *one, grad_output, grad_lse)]
    assert_same_bits(found, run(interpreted, copies))
