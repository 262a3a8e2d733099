import math

import pytest
import torch
from budget import assert_within_budget
from torch import library

import fastrl
from fastrl import reference
from fastrl.ops import _head

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
# (rows, D, V): one of each; a single row; several slices of the vocabulary, the last one short; a
# vocabulary of one slice.
SHAPES = [(1, 1, 1), (1, 33, 2000), (65, 24, 3001), (7, 5, 40)]


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    return request.param


@pytest.fixture(autouse=True)
def small_slices(monkeypatch):
    """Many slices of small problems."""
    monkeypatch.setattr(_head, "_CPU_SLICE", 2**14)
    monkeypatch.setattr(_head, "_GPU_SLICE", 2**14)


def problem(shape, dtype, device, bias=True):
    rows, width, vocab = shape
    hidden = torch.randn(rows, width, device=device).to(dtype)
    weight = (torch.randn(vocab, width, device=device) * width**-0.5).to(dtype)
    b = torch.randn(vocab, device=device).to(dtype) if bias else None
    token_ids = torch.randint(vocab, (rows,), device=device)
    if rows > 2:
        token_ids[1] = -100
    return hidden, weight, token_ids, b


def run(function, hidden, weight, token_ids, bias, g, h, **options):
    """Outputs and gradients in float64; g or h None leaves that output out of the loss."""
    leaves = [
        None if x is None else x.detach().clone().requires_grad_() for x in (hidden, weight, bias)
    ]
    logprobs, entropy = function(
        leaves[0], leaves[1], token_ids, bias=leaves[2], return_entropy=True, **options
    )
    parts = [(x * y.to(x.dtype)).sum() for x, y in ((logprobs, g), (entropy, h)) if y is not None]
    sum(parts).backward()
    return [logprobs.detach(), entropy.detach(), *(x.grad for x in leaves if x is not None)]


def double(*tensors):
    return [None if x is None else x.double() for x in tensors]


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_error_budget(device, dtype, shape, softcap):
    hidden, weight, token_ids, bias = problem(shape, dtype, device, bias=softcap is not None)
    g, h = torch.randn(shape[0], device=device), torch.randn(shape[0], device=device)
    options = dict(temperature=0.7, softcap=softcap)
    actual = run(fastrl.linear_token_logprobs, hidden, weight, token_ids, bias, g, h, **options)
    plain = reference.linear_token_logprobs
    eager = run(plain, hidden, weight, token_ids, bias, g, h, **options)
    x, w, b = double(hidden, weight, bias)
    truth = run(plain, x, w, token_ids, b, g, h, **options)
    for i, parts in enumerate(zip(actual, eager, truth, strict=True)):
        assert parts[0].dtype == (torch.float32 if i < 2 else dtype)
        assert_within_budget(*parts, torch.float32 if i < 2 and device == "cpu" else dtype)


def test_likely_tokens_keep_their_digits(device):
    """p = 1 - rest from a head of one-hot rows: relative error, where eager loses every digit."""
    rests = (1e-1, 1e-3, 1e-5, 1e-7)
    vocab = 3000
    logits = torch.full((len(rests), vocab), 0.0)
    for row, rest in zip(logits, rests, strict=True):
        row[:] = math.log(rest / (vocab - 1))
        row[17] = math.log1p(-rest)
    hidden, weight = torch.eye(len(rests), device=device), logits.t().contiguous().to(device)
    ids = torch.full((len(rests),), 17, device=device)
    ones = torch.ones(len(rests), device=device)
    actual = run(fastrl.linear_token_logprobs, hidden, weight, ids, None, ones, None)
    truth = run(
        reference.linear_token_logprobs, hidden.double(), weight.double(), ids, None, ones, None
    )
    for a, t in zip(actual[:2], truth[:2], strict=True):
        assert ((a.double() - t).abs() / t.abs()).max() < 1e-5
    diagonal = actual[3][17].double(), truth[3][17]  # the targets' own entries
    assert ((diagonal[0] - diagonal[1]).abs() / diagonal[1].abs()).max() < 1e-5


@pytest.mark.parametrize("g, h", [(True, False), (False, True)])
def test_either_gradient_alone(device, g, h):
    arguments = problem((9, 4, 700), torch.float32, device)
    g, h = (torch.randn(9, device=device) if wanted else None for wanted in (g, h))
    actual = run(fastrl.linear_token_logprobs, *arguments, g, h)
    x, w, b = double(*arguments[:2], arguments[3])
    truth = run(reference.linear_token_logprobs, x, w, arguments[2], b, g, h)
    for a, t in zip(actual, truth, strict=True):
        torch.testing.assert_close(a.double(), t, rtol=1e-4, atol=1e-5)


def test_what_is_frozen_takes_no_product(device, monkeypatch):
    calls = []
    product = _head.Head.product
    monkeypatch.setattr(_head.Head, "product", lambda *a, **k: calls.append(1) or product(*a, **k))
    hidden, weight, token_ids, _ = problem((3, 4, 50), torch.float32, device)
    expected = {(True, True): 4, (True, False): 2, (False, True): 3}
    for (needs_hidden, needs_weight), count in expected.items():
        x, w = (
            hidden.clone().requires_grad_(needs_hidden),
            weight.clone().requires_grad_(needs_weight),
        )
        calls.clear()
        fastrl.linear_token_logprobs(x, w, token_ids).sum().backward()
        assert len(calls) == count
        assert (x.grad is not None, w.grad is not None) == (needs_hidden, needs_weight)


def test_ignored_rows_may_hold_anything_and_are_not_computed(device, monkeypatch):
    hidden, weight, token_ids, bias = problem((6, 8, 600), torch.float32, device)
    token_ids[3:5] = -100
    clean = run(
        fastrl.linear_token_logprobs,
        hidden,
        weight,
        token_ids,
        bias,
        *torch.ones(2, 6, device=device),
    )
    rows = []
    logits = _head.Head.logits
    monkeypatch.setattr(
        _head.Head,
        "logits",
        lambda self, *a, **k: rows.append(len(self.hidden)) or logits(self, *a, **k),
    )
    hidden[token_ids == -100] = math.nan
    dirty = run(
        fastrl.linear_token_logprobs,
        hidden,
        weight,
        token_ids,
        bias,
        *torch.ones(2, 6, device=device),
    )
    for a, b in zip(clean, dirty, strict=True):
        assert torch.equal(a, b) and a.isfinite().all()
    assert not any(x[token_ids == -100].any() for x in dirty[:3])
    assert device != "cpu" or set(rows) == {3}


@pytest.mark.parametrize("rows", [0, 2])
def test_no_row_counts(device, rows):
    hidden = torch.randn(rows, 3, device=device, requires_grad=True)
    weight = torch.randn(5, 3, device=device, requires_grad=True)
    ids = torch.full((rows,), -100, device=device)
    logprobs, entropy = fastrl.linear_token_logprobs(hidden, weight, ids, return_entropy=True)
    (logprobs + entropy).sum().backward()
    assert logprobs.shape == entropy.shape == (rows,)
    assert not logprobs.any() and not hidden.grad.any() and not weight.grad.any()


def test_leading_axes_and_strides(device):
    hidden = torch.randn(3, 8, 4, device=device).transpose(1, 2).requires_grad_()  # [3, 4, 8]
    weight = torch.randn(8, 90, device=device).t().requires_grad_()
    token_ids = torch.randint(90, (4, 3), device=device).t()
    out = fastrl.linear_token_logprobs(hidden, weight, token_ids)
    expected = reference.linear_token_logprobs(hidden, weight, token_ids)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    a = torch.autograd.grad(out.sin().sum(), (hidden, weight))
    b = torch.autograd.grad(expected.sin().sum(), (hidden, weight))
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_runs_are_equal_bit_for_bit(device):
    arguments = problem((65, 24, 3001), torch.float32, device)
    g, h = torch.randn(2, 65, device=device)
    first, second = (run(fastrl.linear_token_logprobs, *arguments, g, h) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_row_alone_is_close_to_the_row_in_a_batch(device):
    """Not equal: the products are the vendor's."""
    hidden, weight, token_ids, _ = problem((65, 64, 3001), torch.float32, device)
    together = fastrl.linear_token_logprobs(hidden, weight, token_ids)
    alone = fastrl.linear_token_logprobs(hidden[4], weight, token_ids[4])
    torch.testing.assert_close(alone, together[4], rtol=1e-5, atol=1e-5)


def test_it_holds_no_more_than_a_slice(device, monkeypatch):
    widths = []
    logits = _head.Head.logits

    def spy(self, rows, columns, **options):
        widths.append(columns.stop - columns.start)
        return logits(self, rows, columns, **options)

    monkeypatch.setattr(_head.Head, "logits", spy)
    hidden, weight, token_ids, _ = problem((32, 4, 2000), torch.float32, device)
    fastrl.linear_token_logprobs(hidden, weight, token_ids)
    assert widths == [512, 512, 512, 464]


def test_autocast_is_respected(device):
    hidden, weight, token_ids, bias = problem((6, 16, 300), torch.float32, device)
    with torch.autocast(device, torch.bfloat16):
        x, w = hidden.requires_grad_(), weight.requires_grad_()
        out = fastrl.linear_token_logprobs(x, w, token_ids, bias=bias)
    cast = [t.detach().bfloat16().requires_grad_() for t in (hidden, weight, bias)]
    expected = fastrl.linear_token_logprobs(cast[0], cast[1], token_ids, bias=cast[2])
    assert out.dtype == torch.float32 and torch.equal(out, expected)
    out.sum().backward()
    expected.sum().backward()
    for leaf, own in zip((x, w), cast, strict=False):
        assert leaf.grad.dtype == torch.float32 and torch.equal(leaf.grad, own.grad.float())


def test_mixed_dtypes_are_promoted(device):
    hidden, weight, token_ids, bias = problem((6, 16, 300), torch.float32, device)
    narrow = hidden.bfloat16()
    out = fastrl.linear_token_logprobs(narrow, weight, token_ids, bias=bias)
    expected = reference.linear_token_logprobs(narrow.float(), weight, token_ids, bias=bias)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_opcheck(device, softcap):
    hidden, weight, ids, bias = problem((5, 6, 40), torch.float32, device)
    hidden = hidden.t().contiguous().t()  # what the gradient's strides must not follow
    for x in (hidden, weight, bias):
        x.requires_grad_()
    arguments = (hidden, weight, ids, bias, 0.8, softcap, -100, True)
    library.opcheck(torch.ops.fastrl.linear_token_logprobs_fwd.default, arguments)
    x, w, b = (t.detach() for t in (hidden, weight, bias))
    state = (x, w, ids, b, 0.8, softcap, -100, 3, True)
    library.opcheck(torch.ops.fastrl.linear_token_logprobs_state.default, state)
    state = (x.contiguous(), ids.clamp(0, 5), 0.8, -100, 3, True)
    library.opcheck(torch.ops.fastrl.token_logprobs_state.default, state)
    saved = torch.ops.fastrl.linear_token_logprobs_fwd(x, w, ids, b, *arguments[4:])
    g, h = torch.randn(2, 5, device=device)
    for needs in ((True, True, True), (False, True, False)):
        backward = (g, h, x, w, ids, b, *saved, 0.8, softcap, -100, 0, *needs)
        library.opcheck(torch.ops.fastrl.linear_token_logprobs_bwd.default, backward)


@pytest.mark.parametrize("shape", [(5, 6), (0, 3)])
def test_opcheck_of_memory(shape):
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    like = torch.zeros(0, dtype=torch.bfloat16)
    library.opcheck(torch.ops.fastrl.empty_matrix.default, (like, *shape), test_utils=checks)


def test_compiles_without_a_break(device):
    def loss(x, w, ids):
        logprobs, entropy = fastrl.linear_token_logprobs(x * 2.0, w, ids, return_entropy=True)
        return (logprobs - 0.1 * entropy).sum()

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    hidden, weight, ids, _ = problem((5, 6, 40), torch.float32, device)
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    ours = torch.autograd.grad(compiled(*leaves, ids), leaves)
    plain = torch.autograd.grad(loss(*leaves, ids), leaves)
    torch.testing.assert_close(ours, plain)


@torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True)
def test_rows_that_a_mask_picks_compile_whole(device):
    """How many there are is known to no graph, and none may ask."""

    def loss(x, w, ids, mask):
        x, ids = x[mask], ids[mask]
        logprobs = fastrl.linear_token_logprobs(x, w, ids) + fastrl.token_logprobs(x @ w.T, ids)
        returns = fastrl.discounted_returns(logprobs[None], gamma=0.9)
        return logprobs.sum() + returns.sin().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    hidden, weight, ids, _ = problem((5, 6, 40), torch.float32, device)
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    for count in (3, 5, 0):
        mask = torch.arange(5, device=device) < count
        ours = torch.autograd.grad(compiled(*leaves, ids, mask), leaves)
        plain = torch.autograd.grad(loss(*leaves, ids, mask), leaves)
        torch.testing.assert_close(ours, plain)


def test_a_graph_of_the_backward_pass_may_be_asked_for(device):
    hidden, weight, ids, _ = problem((5, 6, 40), torch.float32, device)
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    out = fastrl.linear_token_logprobs(*leaves, ids).sum()
    plain = torch.autograd.grad(out, leaves, retain_graph=True)
    recorded = torch.autograd.grad(out, leaves, create_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(plain, recorded, strict=True))


def test_meta_tensors_have_shapes():
    with torch.device("meta"):
        ids = torch.zeros(2, 3, dtype=torch.int64)
        out = fastrl.linear_token_logprobs(torch.zeros(2, 3, 4), torch.zeros(5, 4), ids)
    assert out.shape == (2, 3) and out.device.type == "meta"


def test_out_of_range_ids(device):
    hidden, weight, _, _ = problem((2, 4, 30), torch.float32, device)
    ids = torch.tensor([3, 30], device=device)
    if device == "cpu":
        with pytest.raises(ValueError, match=r"token_ids in \[0, 30\)"):
            fastrl.linear_token_logprobs(hidden, weight, ids)
    compiled = torch.compile(fastrl.linear_token_logprobs, fullgraph=True, backend="aot_eager")
    out = compiled(hidden, weight, ids)
    assert out[0].isfinite() and out[1].isnan()


X, W, IDS = torch.zeros(2, 3), torch.zeros(5, 3), torch.zeros(2, dtype=torch.int64)
BAD = [
    (dict(hidden=X.double()), TypeError, "hidden of dtype float32"),
    (dict(weight=[1.0]), TypeError, "weight as a tensor, got list"),
    (dict(weight=torch.zeros(3)), ValueError, r"weight \[V, D\]"),
    (dict(weight=torch.zeros(0, 3)), ValueError, r"V >= 1"),
    (dict(hidden=torch.zeros(2, 4)), ValueError, r"hidden \[\.\.\., 3\]"),
    (dict(token_ids=IDS.int()), TypeError, "token_ids of dtype int64"),
    (dict(token_ids=IDS[:1]), ValueError, r"token_ids \(2,\)"),
    (dict(bias=torch.zeros(4)), ValueError, r"bias \[5\], got \(4,\)"),
    (dict(bias=torch.zeros(5).double()), TypeError, "bias of dtype"),
    (dict(temperature=0.0), ValueError, "temperature > 0"),
    (dict(temperature=1e38), ValueError, r"temperature in \[0, 1e\+37\]"),
    (dict(softcap=-1.0), ValueError, "softcap > 0"),
    (dict(softcap=math.inf), ValueError, "softcap > 0 and finite"),
    (dict(ignore_index=None), TypeError, "ignore_index as an int"),
]


@pytest.mark.parametrize("name", ["linear_token_logprobs", "linear_token_loss", "token_stats"])
@pytest.mark.parametrize("arguments, error, message", BAD)
def test_bad_arguments(name, arguments, error, message):
    good = {"hidden": X, "weight": W, "token_ids": IDS}
    if name == "linear_token_loss":
        good["loss_fn"] = lambda logprobs, entropy, rows: logprobs
    with pytest.raises(error, match=message) as caught:
        getattr(fastrl, name)(**(good | arguments))
    assert str(caught.value).startswith(f"{name}: expected ")


def test_a_vocab_start_wants_a_group():
    with pytest.raises(ValueError, match="group with vocab_start"):
        fastrl.linear_token_logprobs(X, W, IDS, vocab_start=3)
