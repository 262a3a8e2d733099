"""linear_token_logprobs whose hidden states alone are learned: the gradient of the forward pass."""

import math

import pytest
import torch
from budget import assert_within_budget
from torch import library

import fastrl
from fastrl import reference
from fastrl.ops import _head

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
# A slice has 512 or 256 columns: one of each; one row; a short last slice; one slice.
SHAPES = [(1, 1, 1), (1, 33, 2000), (65, 24, 3001), (7, 5, 40)]


@pytest.fixture(autouse=True)
def small_slices(monkeypatch):
    """Many slices of small problems."""
    monkeypatch.setattr(_head, "_CPU_SLICE", 2**14)
    monkeypatch.setattr(_head, "_GPU_SLICE", 2**14)


def problem(shape, dtype, device):
    rows, width, vocab = shape
    hidden = torch.randn(rows, width, device=device).to(dtype)
    weight = (torch.randn(vocab, width, device=device) * width**-0.5).to(dtype)
    bias = torch.randn(vocab, device=device).to(dtype)
    token_ids = torch.randint(vocab, (rows,), device=device)
    if rows > 2:
        token_ids[1] = -100
    return hidden, weight, token_ids, bias


def run(ops, hidden, weight, token_ids, bias, g, h=None, **options):
    """The log-probs, with h also the entropy, and the gradient of hidden."""
    leaf = hidden.detach().clone().requires_grad_()
    options |= {"bias": bias, "return_entropy": h is not None}
    outputs = ops.linear_token_logprobs(leaf, weight, token_ids, **options)
    outputs, upstream = (outputs, (g, h)) if h is not None else ((outputs,), (g,))
    (grad,) = torch.autograd.grad(
        outputs, leaf, [u.to(x.dtype) for u, x in zip(upstream, outputs, strict=True)]
    )
    return *(x.detach() for x in outputs), grad


def double(*tensors):
    return [None if x is None else x.double() for x in tensors]


@pytest.mark.parametrize("with_entropy", [False, True])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_error_budget(device, dtype, shape, softcap, with_entropy):
    hidden, weight, ids, bias = problem(shape, dtype, device)
    bias = bias if softcap else None
    g, h = torch.randn(2, shape[0], device=device)
    options = dict(temperature=0.7, softcap=softcap, h=h if with_entropy else None)
    actual = run(fastrl, hidden, weight, ids, bias, g, **options)
    eager = run(reference, hidden, weight, ids, bias, g, **options)
    x, w, b = double(hidden, weight, bias)
    truth = run(reference, x, w, ids, b, g, **options)
    assert actual[-1].dtype == dtype
    for i, parts in enumerate(zip(actual, eager, truth, strict=True)):
        is_gradient = i == len(actual) - 1
        of = dtype if is_gradient or device == "cuda" else torch.float32
        assert_within_budget(*parts, of)


def test_outputs_are_those_of_a_learned_head_bit_for_bit(device):
    hidden, weight, ids, bias = problem((65, 24, 3001), torch.float32, device)
    found = []
    for w in (weight, weight.clone().requires_grad_()):
        x = hidden.clone().requires_grad_()
        found.append(fastrl.linear_token_logprobs(x, w, ids, bias=bias, return_entropy=True))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("target", [0, 300, 599])  # in the first slice, the second, the last
def test_likely_tokens_keep_their_digits(device, monkeypatch, target):
    """p = 1 - rest: relative errors, where eager loses every digit. The vocabulary is small: a sum
    of thousands of equal terms in float32 has an error of its own, whoever makes it."""
    monkeypatch.setattr(_head, "_CPU_SLICE", 2**10)
    monkeypatch.setattr(_head, "_GPU_SLICE", 2**10)
    rests = (1e-1, 1e-3, 1e-5, 1e-7)
    logits = torch.zeros(len(rests), 600)
    for row, rest in zip(logits, rests, strict=True):
        row[:] = math.log(rest / 599)
        row[target] = math.log1p(-rest)
    hidden, weight = torch.eye(len(rests), device=device), logits.t().contiguous().to(device)
    ids = torch.full((len(rests),), target, device=device)
    ones = torch.ones(len(rests), device=device)
    actual = run(fastrl, hidden, weight, ids, None, ones)
    truth = run(reference, *double(hidden, weight), ids, None, ones)
    for a, t in zip(actual, truth, strict=True):
        assert ((a.double() - t).abs() / t.abs()).max() < 1e-5


@pytest.mark.parametrize("offset", [0.0, 1e4, -1e4])
def test_offsets_and_slices_without_an_entry(device, offset):
    """Logits far from 0, and -inf in all of the first and the third slice, from a masking bias."""
    hidden, weight, ids, _ = problem((9, 16, 1300), torch.float32, device)
    bias = torch.full((1300,), offset, device=device)
    bias[:256], bias[512:768] = -math.inf, -math.inf
    ids = torch.randint(256, 512, (9,), device=device)
    ids[3], ids[4] = 1299, 5  # in the last slice; masked
    g = torch.randn(9, device=device)
    actual = run(fastrl, hidden, weight, ids, bias, g)
    eager = run(reference, hidden, weight, ids, bias, g)
    truth = run(reference, *double(hidden, weight), ids, bias.double(), g)
    for parts in zip(actual, eager, truth, strict=True):
        assert_within_budget(*parts, torch.float32)


@pytest.mark.parametrize("temperature", [1e-3, 1e3])
def test_temperatures_of_every_size(device, temperature):
    hidden, weight, ids, bias = problem((9, 16, 1300), torch.float16, device)
    g = torch.randn(9, device=device)
    actual = run(fastrl, hidden, weight, ids, bias, g, temperature=temperature)
    eager = run(reference, hidden, weight, ids, bias, g, temperature=temperature)
    wide = double(hidden, weight, bias)
    truth = run(reference, *wide[:2], ids, wide[2], g, temperature=temperature)
    for parts in zip(actual, eager, truth, strict=True):
        assert_within_budget(*parts, torch.float16)


@pytest.mark.parametrize("ignore_index", [-100, 600])  # 600: what a vocabulary of 600 lacks
def test_what_is_ignored_may_hold_anything(device, ignore_index):
    hidden, weight, ids, bias = problem((6, 8, 600), torch.float32, device)
    ids[1:4] = ignore_index
    g = torch.randn(6, device=device)
    options = {"ignore_index": ignore_index}
    clean = run(fastrl, hidden, weight, ids, bias, g, **options)
    hidden[1:4], g[2] = math.nan, math.nan
    dirty = run(fastrl, hidden, weight, ids, bias, g, **options)
    for a, b in zip(clean, dirty, strict=True):
        assert torch.equal(a, b) and not b[1:4].any() and b[4:].any()


def test_a_nan_stays_in_its_row(device):
    arguments = problem((6, 8, 600), torch.float32, device)
    g = torch.ones(6, device=device)
    clean = run(fastrl, *arguments, g)
    arguments[0][4, 3] = math.nan
    for a, b in zip(clean, run(fastrl, *arguments, g), strict=True):
        assert b[4].isnan().all() and torch.equal(a[:4], b[:4]) and torch.equal(a[5], b[5])


@pytest.mark.gpu
def test_ids_outside_the_vocabulary_give_nan():
    hidden, weight, ids, bias = problem((6, 8, 600), torch.float32, "cuda")
    ids[2], ids[3] = 600, -1
    for x in run(fastrl, hidden, weight, ids, bias, torch.ones(6, device="cuda")):
        assert x[2:4].isnan().all() and x[4:].isfinite().all() and x[0].isfinite().all()


@pytest.mark.parametrize("rows", [0, 3])
def test_no_row_counts(device, rows):
    hidden, weight = torch.randn(rows, 3, device=device), torch.randn(5, 3, device=device)
    ids = torch.full((rows,), -100, device=device)
    logprobs, grad = run(fastrl, hidden, weight, ids, None, torch.ones(rows, device=device))
    assert logprobs.shape == (rows,) and grad.shape == (rows, 3)
    assert not logprobs.any() and not grad.any()


def test_leading_axes_and_autocast(device):
    hidden = torch.randn(3, 8, 4, device=device).transpose(1, 2).requires_grad_()
    weight, ids = torch.randn(90, 8, device=device), torch.randint(90, (3, 4), device=device)
    with torch.autocast(device, torch.bfloat16):
        out = fastrl.linear_token_logprobs(hidden, weight, ids)
    (grad,) = torch.autograd.grad(out.sum(), hidden)
    assert out.dtype == grad.dtype == torch.float32 and grad.shape == hidden.shape
    (exact,) = torch.autograd.grad(
        reference.linear_token_logprobs(hidden, weight, ids).sum(), hidden
    )
    torch.testing.assert_close(grad, exact, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_opcheck(device, softcap):
    hidden, weight, ids, bias = problem((5, 6, 40), torch.float32, device)
    hidden = hidden.t().contiguous().t().requires_grad_()
    arguments = (hidden, weight, ids, bias, 0.8, softcap, -100, True)
    library.opcheck(torch.ops.fastrl.linear_token_logprobs_frozen.default, arguments)


def test_it_compiles_without_a_break(device):
    def loss(x, w, ids):
        return fastrl.linear_token_logprobs(x * 2.0, w, ids).sin().sum()

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    hidden, weight, ids, _ = problem((5, 6, 40), torch.float32, device)
    hidden.requires_grad_()
    for f in (loss, compiled):
        (grad,) = torch.autograd.grad(f(hidden, weight, ids), hidden)
        (exact,) = torch.autograd.grad(
            reference.linear_token_logprobs(hidden * 2.0, weight, ids).sin().sum(), hidden
        )
        torch.testing.assert_close(grad, exact, rtol=1e-5, atol=1e-6)


def test_a_second_derivative_is_refused(device):
    hidden, weight, ids, _ = problem((5, 6, 40), torch.float32, device)
    hidden.requires_grad_()
    out = fastrl.linear_token_logprobs(hidden, weight, ids).sin().sum()
    (plain,) = torch.autograd.grad(out, hidden, retain_graph=True)
    (recorded,) = torch.autograd.grad(out, hidden, create_graph=True)
    assert torch.equal(plain, recorded)
    with pytest.raises(NotImplementedError, match="linear_token_logprobs: expected to be diff"):
        recorded.sum().backward()
