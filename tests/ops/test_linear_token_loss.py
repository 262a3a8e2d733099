import importlib
import math

import pytest
import torch
import torch._dynamo.testing
from budget import assert_within_budget
from torch.utils._python_dispatch import TorchDispatchMode

import fastrl
from fastrl import reference
from fastrl.ops import _head

_linear_token_loss = importlib.import_module("fastrl.ops.linear_token_loss")

FLOATS = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    return request.param


@pytest.fixture(autouse=True)
def small_slices(monkeypatch):
    """Many slices of small problems."""
    monkeypatch.setattr(_head, "_CPU_ROWS", 16)
    monkeypatch.setattr(_head, "_GPU_ROWS", 16)
    monkeypatch.setattr(_head, "_GPU_GRADIENT", 40 * 301)  # of two slices


class ClippedLoss:
    """PPO's, with an entropy bonus: needs both statistics and other tensors by row."""

    def __init__(self, rows, device):
        self.advantages = torch.randn(rows, device=device)
        self.old = -5 - torch.rand(rows, device=device)

    def __call__(self, logprobs, entropy, rows):
        ratio = (logprobs - self.old[rows]).exp()
        a = self.advantages[rows].to(logprobs.dtype)
        return -torch.minimum(ratio * a, ratio.clamp(0.8, 1.2) * a) - 0.01 * entropy


def problem(rows, dtype, device):
    hidden = torch.randn(rows, 24, device=device).to(dtype)
    weight = (torch.randn(301, 24, device=device) * 24**-0.5).to(dtype)
    bias = torch.randn(301, device=device).to(dtype)
    token_ids = torch.randint(301, (rows,), device=device)
    token_ids[rows // 2] = -100
    return hidden, weight, token_ids, bias


def run(function, hidden, weight, token_ids, bias, loss_fn, scale=1.0, **options):
    leaves = [x.detach().clone().requires_grad_() for x in (hidden, weight, bias)]
    loss, logprobs, entropy = function(
        leaves[0], leaves[1], token_ids, loss_fn, bias=leaves[2], **options
    )
    assert not logprobs.requires_grad and not entropy.requires_grad
    (scale * loss).backward()
    return [loss.detach(), logprobs, entropy, *(x.grad for x in leaves)]


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("rows", [2, 16, 65])  # one slice, a whole one, several
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_error_budget(device, dtype, rows, softcap):
    hidden, weight, token_ids, bias = problem(rows, dtype, device)
    loss_fn = ClippedLoss(rows, device)
    options = dict(temperature=0.7, softcap=softcap, scale=0.25)
    actual = run(fastrl.linear_token_loss, hidden, weight, token_ids, bias, loss_fn, **options)
    plain = reference.linear_token_loss
    eager = run(plain, hidden, weight, token_ids, bias, loss_fn, **options)
    wide = (x.double() for x in (hidden, weight))
    truth = run(plain, *wide, token_ids, bias.double(), loss_fn, **options)
    for i, parts in enumerate(zip(actual, eager, truth, strict=True)):
        assert parts[0].dtype == (torch.float32 if i < 3 else dtype)
        assert_within_budget(*parts, torch.float32 if i < 3 and device == "cpu" else dtype)


def test_it_takes_three_products(device, monkeypatch):
    calls = []
    product = _head.Head.product
    monkeypatch.setattr(_head.Head, "product", lambda *a, **k: calls.append(1) or product(*a, **k))
    hidden, weight, token_ids, bias = problem(16, torch.float32, device)
    loss_fn = ClippedLoss(16, device)
    run(fastrl.linear_token_loss, hidden, weight, token_ids, bias, loss_fn)
    assert len(calls) == 3
    calls.clear()
    parameter = weight.clone().requires_grad_()
    with torch.no_grad():
        fastrl.linear_token_loss(hidden, parameter, token_ids, loss_fn)
    assert len(calls) == 1
    calls.clear()
    fastrl.linear_token_loss(hidden.clone().requires_grad_(), weight, token_ids, loss_fn)
    assert len(calls) == 2
    calls.clear()
    fastrl.linear_token_loss(hidden, parameter, token_ids, loss_fn)
    assert len(calls) == 2


def test_runs_are_equal_bit_for_bit(device):
    arguments = (*problem(65, torch.float32, device), ClippedLoss(65, device))
    first, second = (run(fastrl.linear_token_loss, *arguments) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_autocast_is_respected(device):
    hidden, weight, token_ids, bias = problem(20, torch.float32, device)
    loss_fn = ClippedLoss(20, device)
    cast = [x.bfloat16() for x in (hidden, weight, bias)]
    expected = run(fastrl.linear_token_loss, *cast[:2], token_ids, cast[2], loss_fn)
    with torch.autocast(device, torch.bfloat16):
        found = run(fastrl.linear_token_loss, hidden, weight, token_ids, bias, loss_fn)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == torch.float32 and torch.equal(a, b.float())


class Launches(TorchDispatchMode):
    """Counts the ops that compute something: on a GPU each is a launch or more."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        aliases = [x.alias_info for x in func._schema.returns]
        is_view = any(x is not None and not x.is_write for x in aliases)
        self.count += not is_view and "empty" not in func.overloadpacket.__name__
        return func(*args, **(kwargs or {}))


def test_a_further_slice_costs_few_launches_beside_those_of_the_loss():
    def launches(rows):
        hidden, weight, token_ids, _ = problem(rows, torch.float32, "cpu")
        token_ids[rows // 2] = 0
        advantages = torch.randn(rows)
        x, w = hidden.requires_grad_(), weight.requires_grad_()
        with Launches() as found:
            fastrl.linear_token_loss(x, w, token_ids, lambda p, e, r: -advantages[r] * p)
        return found.count

    # Three products, two passes over the logits, three launches of the loss and three for its
    # derivatives: nothing that could be done for all slices at once.
    assert launches(64) - launches(32) <= 2 * 12


class HeadOfAGpu(_head.Head):
    """What a GPU is given, in products of float32 on this CPU; `products` are their shapes."""

    products: list[tuple[int, ...]] = []

    def __init__(self, hidden, *rest):
        super().__init__(hidden, *rest)
        self._is_narrow, self.dtype, self.hidden = True, hidden.dtype, hidden
        self.has_half_factors = hidden.dtype == torch.float16

    def product(self, a, b, out, *, add=False):
        self.products.append((*a.shape, b.shape[1]))
        return out.copy_(a.float() @ b.float() + (out if add else 0.0))


def bwd_narrow(out, g, h, logits, *saved):
    _head._bwd_inplace(g, h, logits, *saved)
    out.copy_(logits)


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gradients_of_16_bits_wait_for_each_other(monkeypatch, dtype, softcap):
    monkeypatch.setattr(_linear_token_loss, "Head", HeadOfAGpu)
    monkeypatch.setattr(HeadOfAGpu, "products", [])
    monkeypatch.setattr(_head, "_bwd_narrow", bwd_narrow)
    given = hidden, weight, token_ids, bias = problem(81, dtype, "cpu")
    loss_fn, plain = ClippedLoss(81, "cpu"), reference.linear_token_loss
    actual = run(fastrl.linear_token_loss, *given, loss_fn, softcap=softcap)
    eager = run(plain, *given, loss_fn, softcap=softcap)
    wide = hidden.double(), weight.double(), token_ids, bias.double()
    for parts in zip(actual, eager, run(plain, *wide, loss_fn, softcap=softcap), strict=True):
        assert_within_budget(*parts, dtype)
    # 80 rows that count are five slices: two, two and one, but with a scale each in float16.
    rows = [shape[1] for shape in HeadOfAGpu.products if shape[0] == 301]
    assert rows == ([16] * 5 if dtype == torch.float16 else [32, 32, 16])
    # The largest factor, which scales them, is 0; or there is none.
    for flat_fn in (lambda logprobs, *_: 0 * logprobs, lambda logprobs, *_: logprobs.detach()):
        flat = hidden.clone().requires_grad_()
        fastrl.linear_token_loss(flat, weight, token_ids, flat_fn)[0].backward()
        assert not flat.grad.any()


def test_small_gradients_reach_the_loss_scale(device):
    """Before it they are below what float16 can hold."""
    hidden, weight, token_ids, bias = problem(40, torch.float16, device)

    def tiny(logprobs, entropy, rows):
        return -1e-7 * logprobs

    actual = run(fastrl.linear_token_loss, hidden, weight, token_ids, bias, tiny, scale=2.0**16)
    wide = (x.double() for x in (hidden, weight))
    plain = reference.linear_token_loss
    truth = run(plain, *wide, token_ids, bias.double(), tiny, scale=2.0**16)
    for a, t in zip(actual[3:], truth[3:], strict=True):
        torch.testing.assert_close(a.double(), t, rtol=1e-2, atol=float(1e-3 * t.abs().max()))


def test_a_loss_of_small_differences_is_no_mixing(device):
    """k3 cancels most of its digits: another rounding of exp would show."""
    hidden, weight, token_ids, _ = problem(37, torch.float32, device)
    x = hidden.requires_grad_()
    _, old, _ = fastrl.linear_token_loss(x.detach(), weight, token_ids, lambda p, *_: p)

    def k3(logprobs, entropy, rows):
        gap = old[rows] + 1e-4 - logprobs
        return gap.exp() - 1 - gap

    loss, *_ = fastrl.linear_token_loss(x, weight, token_ids, k3)
    assert loss.isfinite()


def test_ignored_rows_are_never_passed_and_may_hold_anything(device):
    hidden, weight, token_ids, _ = problem(40, torch.float32, device)
    token_ids[::3] = -100
    hidden[token_ids == -100] = math.nan
    seen = []

    def loss_fn(logprobs, entropy, rows):
        seen.append(rows)
        return -logprobs

    x, w = hidden.requires_grad_(), weight.requires_grad_()
    loss, logprobs, entropy = fastrl.linear_token_loss(x, w, token_ids, loss_fn)
    loss.backward()
    torch.testing.assert_close(loss, -logprobs.sum())
    assert not logprobs[::3].any() and not entropy[::3].any() and not x.grad[::3].any()
    assert w.grad.isfinite().all() and x.grad.isfinite().all()
    if device == "cpu":
        assert not (token_ids[torch.cat(seen)] == -100).any()


@pytest.mark.parametrize("rows", [0, 3])
def test_no_row_counts(device, rows):
    x = torch.randn(rows, 3, device=device, requires_grad=True)
    w = torch.randn(5, 3, device=device, requires_grad=True)
    ids = torch.full((rows,), -100, device=device)
    loss, logprobs, _ = fastrl.linear_token_loss(x, w, ids, lambda logprobs, *_: -logprobs)
    loss.backward()
    assert loss == 0 and logprobs.shape == (rows,)
    assert not x.grad.any() and not w.grad.any()


def test_a_loss_that_needs_nothing_has_zero_gradients(device):
    hidden, weight, token_ids, _ = problem(5, torch.float32, device)
    x, w = hidden.requires_grad_(), weight.requires_grad_()
    loss, *_ = fastrl.linear_token_loss(x, w, token_ids, lambda p, *_: torch.ones_like(p))
    loss.backward()
    assert loss == 4 and not x.grad.any() and not w.grad.any()


def test_leading_axes_give_flat_rows(device):
    hidden, weight, token_ids, _ = problem(12, torch.float32, device)
    weights = torch.arange(12.0, device=device)
    loss, logprobs, _ = fastrl.linear_token_loss(
        hidden.view(3, 4, -1), weight, token_ids.view(3, 4), lambda p, e, r: weights[r] * p
    )
    torch.testing.assert_close(loss, (weights * logprobs.flatten()).sum())


def test_a_second_backward_pass_is_refused(device):
    hidden, weight, token_ids, _ = problem(4, torch.float32, device)
    x = hidden.requires_grad_()
    loss, *_ = fastrl.linear_token_loss(x, weight, token_ids, lambda p, *_: p)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="expected one backward pass, got a second"):
        loss.backward()


ROWS = 40
SEQUENCE = torch.arange(ROWS) // 5
FOREIGN = torch.ones(3, requires_grad=True)


def sequence_mean(x, rows):
    sums = torch.zeros(ROWS).index_add(0, SEQUENCE[rows], x)
    return sums[SEQUENCE[rows]] / 5


MIXING = {
    "a mean that is differentiated": lambda p, e, r: p - p.mean(),
    "a mean that is not": lambda p, e, r: p - p.detach().mean(),
    "GSPO": lambda p, e, r: -sequence_mean(p, r).exp(),
    "strides of four": lambda p, e, r: p * torch.roll(p, 4),
    "by the entropy": lambda p, e, r: p * e.flip(0),
    "behind the first rows": lambda p, e, r: p - p.mean() if r[0] > 5 else p,
}


@pytest.mark.parametrize("name", MIXING)
def test_losses_that_mix_tokens_are_refused(name):
    hidden, weight, token_ids, _ = problem(ROWS, torch.float32, "cpu")
    with pytest.raises(ValueError, match="loss_fn to be a function of each token by itself"):
        fastrl.linear_token_loss(hidden.requires_grad_(), weight, token_ids, MIXING[name])


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["a mean that is differentiated", "by the entropy"])
def test_on_a_gpu_they_are_nan(name):
    hidden, weight, token_ids, _ = problem(ROWS, torch.float32, "cuda")
    loss, *_ = fastrl.linear_token_loss(hidden.requires_grad_(), weight, token_ids, MIXING[name])
    assert loss.isnan()


BAD = [
    (3, TypeError, "loss_fn to be callable, got int"),
    (lambda p, e, r: 1.0, TypeError, "loss_fn to return a tensor, got float"),
    (lambda p, e, r: p.sum(), ValueError, r"loss_fn to return \[n\] = \(4,\), got \(\)"),
    (lambda p, e, r: p[:, None], ValueError, r"got \(4, 1\)"),
    (lambda p, e, r: p * FOREIGN[0], ValueError, "close over no tensor that requires grad"),
    (lambda p, e, r: p + (2 * FOREIGN).sum(), ValueError, r"one of shape \(3,\). Detach it"),
]


@pytest.mark.parametrize("loss_fn, error, message", BAD)
def test_bad_losses(loss_fn, error, message):
    ids = torch.zeros(4, dtype=torch.int64)
    with pytest.raises(error, match=message) as caught:
        x = torch.randn(4, 3, requires_grad=True)
        fastrl.linear_token_loss(x, torch.randn(5, 3), ids, loss_fn)
    assert str(caught.value).startswith("linear_token_loss: expected ")


def test_a_compiled_function_breaks_here_and_has_the_same_numbers():
    hidden, weight, token_ids, bias = problem(33, torch.float32, "cpu")
    counter = torch._dynamo.testing.CompileCounter()

    def around(hidden, weight, token_ids, loss_fn, **options):
        loss, *rest = fastrl.linear_token_loss(hidden.tanh(), weight, token_ids, loss_fn, **options)
        return loss * 2, *rest

    given = hidden, weight, token_ids, bias, lambda p, e, r: -p * (r + 1)
    expected = run(around, *given)
    for found, wanted in zip(
        run(torch.compile(around, backend=counter), *given), expected, strict=True
    ):
        assert torch.equal(found, wanted)
    assert counter.frame_count > 1
