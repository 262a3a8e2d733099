import math

import pytest
import torch
from budget import assert_within_budget
from torch import library
from torch._subclasses.fake_tensor import FakeTensorMode

import fastrl
from fastrl import reference

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
# One column; odd and prime; one vector of any width and its neighbours; a block; more than one
# stretch of the vocabulary, with a tail.
VOCABULARIES = [1, 2, 7, 16, 31, 33, 1024, 1025, 2049, 16384, 40001]


def run(function, logits, token_ids, g, h, **options):
    logits = logits.detach().clone().requires_grad_()
    logprobs, entropy = function(logits, token_ids, return_entropy=True, **options)
    (logprobs * g + entropy * h).sum().backward()
    return logprobs.detach(), entropy.detach(), logits.grad


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("vocab", VOCABULARIES)
def test_error_budget(any_kernel, dtype, vocab):
    logits = (3 * torch.randn(6, vocab)).to(dtype)
    logits[1] -= 1e4 if dtype == torch.float32 else 100.0  # all very negative
    logits[2, torch.randperm(vocab)[: vocab // 2]] = -math.inf
    logits[3] = 2.0  # every entry is the maximum
    token_ids = torch.randint(vocab, (6,))
    token_ids[2] = logits[2].argmax()
    token_ids[5] = -100
    g, h = torch.randn(6), torch.randn(6)
    logits, token_ids, g, h = (x.to(any_kernel) for x in (logits, token_ids, g, h))
    options = {"temperature": 0.7}
    ours = run(fastrl.token_logprobs, logits, token_ids, g, h, **options)
    eager = run(reference.token_logprobs, logits, token_ids, g, h, **options)
    truth = run(
        reference.token_logprobs, logits.double(), token_ids, g.double(), h.double(), **options
    )
    for actual, plain, exact in zip(ours, eager, truth, strict=True):
        assert_within_budget(actual, plain, exact, dtype if actual is ours[2] else torch.float32)


@pytest.mark.parametrize("log10_rest", [-1, -3, -5, -7, -8])
@pytest.mark.parametrize("offset", [0.0, 1e4, -1e4])
def test_likely_and_unlikely_tokens_keep_their_digits(any_kernel, log10_rest, offset):
    """p = 1 - 10^k: relative error, where log_softmax in float32 loses every digit."""
    vocab = 5000
    logits = torch.full((2, vocab), math.log(10.0**log10_rest / (vocab - 1)))
    logits[:, 17] = math.log1p(-(10.0**log10_rest))
    logits = (logits + offset).to(any_kernel)
    token_ids = torch.tensor([17, 3], device=any_kernel)
    for g, h in ((1.0, 0.0), (0.0, 1.0)):
        ours = run(fastrl.token_logprobs, logits, token_ids, g, h)
        truth = run(reference.token_logprobs, logits.double(), token_ids, g, h)
        for actual, exact in zip(ours, truth, strict=True):
            error = (actual.double() - exact).abs() / exact.abs()
            assert error.max() <= 1e-5


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("rows", [2, 9, 70])  # rows that are shared out, and threads that are
def test_a_row_alone_is_bitwise_the_row_in_a_batch(any_kernel, rows, dtype):
    logits = torch.randn(rows, 40001, device=any_kernel).to(dtype)
    token_ids = torch.randint(40001, (rows,), device=any_kernel)
    together = run(fastrl.token_logprobs, logits, token_ids, 1.0, 0.5, temperature=0.9)
    for row in range(0, rows, 8):
        own = logits[row].clone(), token_ids[row]
        alone = run(fastrl.token_logprobs, *own, 1.0, 0.5, temperature=0.9)
        assert all(torch.equal(a, t[row]) for a, t in zip(alone, together, strict=True))


@pytest.mark.parametrize("rows", [3, 70])
def test_threads_and_alignment_do_not_change_a_bit(rows):
    logits, token_ids = torch.randn(rows, 50001), torch.randint(50001, (rows,))
    results = []
    threads = torch.get_num_threads()
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(run(fastrl.token_logprobs, logits, token_ids, 1.0, 0.5))
    torch.set_num_threads(threads)
    shifted = torch.empty(rows * 50001 + 1)[1:].view(rows, 50001).copy_(logits)
    results.append(run(fastrl.token_logprobs, shifted, token_ids, 1.0, 0.5))
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


def test_strided_leading_axes_and_columns(device):
    logits = torch.randn(4, 6, 300, device=device)
    token_ids = torch.randint(100, (4, 5), device=device)
    for view in (
        logits[:, :-1, :100],
        logits[:, 1:, ::3],
        logits[:, ::2, :100][:, [0, 1, 2, 0, 1]],
    ):
        ours = run(fastrl.token_logprobs, view, token_ids, 1.0, 1.0)
        direct = fastrl.token_logprobs(view, token_ids)
        copied = run(fastrl.token_logprobs, view.contiguous(), token_ids, 1.0, 1.0)
        assert torch.equal(direct, copied[0])
        assert all(torch.equal(a, b) for a, b in zip(ours, copied, strict=True))


def test_gradient_of_a_view_reaches_its_base(device):
    base = torch.randn(3, 5, 40, device=device, requires_grad=True)
    token_ids = torch.randint(40, (3, 4), device=device)
    fastrl.token_logprobs(base[:, :-1], token_ids).sum().backward()
    ours, base.grad = base.grad, None
    reference.token_logprobs(base[:, :-1], token_ids).sum().backward()
    torch.testing.assert_close(ours, base.grad)
    assert not base.grad[:, -1].any()


@pytest.mark.parametrize("dtype", FLOATS)
def test_inplace_backward_writes_the_gradient_over_the_logits(device, dtype):
    x = torch.randn(5, 333, device=device).to(dtype).requires_grad_()
    token_ids = torch.randint(333, (5,), device=device)
    token_ids[2] = -100
    grads = []
    for inplace in (False, True):
        logits = x * 1.0
        logprobs, entropy = fastrl.token_logprobs(
            logits, token_ids, return_entropy=True, inplace_backward=inplace
        )
        (2 * logprobs + entropy).sum().backward()
        grads.append((x.grad, logits.detach()))
        x.grad = None
    assert torch.equal(grads[0][0], grads[1][0])
    assert torch.equal(grads[1][1], grads[1][0])  # the logits are the gradient now
    assert not torch.equal(grads[0][1], grads[0][0])


def test_inplace_backward_spares_rows_that_share_memory(device):
    """Their gradients are not one."""
    leaf = torch.randn(1, 7, device=device).requires_grad_()
    ids, upstream = torch.tensor([0, 1, 1, 3], device=device), torch.randn(4, device=device)
    windows = (leaf * 2).expand(4, 7), (leaf * 2).view(7).unfold(0, 4, 1)
    for logits in windows:
        plain, ours = (
            torch.autograd.grad(
                fastrl.token_logprobs(logits, ids, inplace_backward=inplace) @ upstream,
                leaf, retain_graph=True,
            )[0]
            for inplace in (False, True)
        )  # fmt: skip
        torch.testing.assert_close(ours, plain)


def test_inplace_backward_is_loud_where_the_logits_are_needed_again(device):
    x = torch.randn(2, 9, device=device, requires_grad=True)
    logits, token_ids = x * 1.0, torch.tensor([1, 2], device=device)
    loss = fastrl.token_logprobs(logits, token_ids, inplace_backward=True).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_entropy_alone_and_logprob_alone(device):
    logits = torch.randn(4, 70, device=device)
    token_ids = torch.randint(70, (4,), device=device)
    for pick in (0, 1):
        x, y = logits.clone().requires_grad_(), logits.double().requires_grad_()
        fastrl.token_logprobs(x, token_ids, return_entropy=True)[pick].sum().backward()
        reference.token_logprobs(y, token_ids, return_entropy=True)[pick].sum().backward()
        torch.testing.assert_close(x.grad.double(), y.grad, rtol=1e-5, atol=1e-7)


def test_ignored_rows_may_hold_anything(device):
    logits = torch.randn(4, 50, device=device)
    logits[1], logits[3] = math.nan, -math.inf
    token_ids = torch.tensor([3, -1, 4, -1], device=device)
    out = run(fastrl.token_logprobs, logits, token_ids, 1.0, 1.0, ignore_index=-1)
    assert not out[0][[1, 3]].any() and not out[1][[1, 3]].any() and not out[2][[1, 3]].any()
    assert all(x.isfinite().all() for x in out)


def test_rows_without_a_distribution_are_nan_and_leave_the_others_alone(device):
    logits = torch.randn(6, 40001, device=device)
    logits[0, 3], logits[1, 2400], logits[2] = math.nan, math.inf, -math.inf
    for row, end in ((3, 4096), (4, 33000)):  # NaN before anything finite: a block, a stretch
        logits[row, :end] = -math.inf
        logits[row, 7] = math.nan
    logits[5, :33000] = -math.inf  # a stretch without a number, and a distribution behind it
    token_ids = torch.full((6,), 40000, device=device)
    out = run(fastrl.token_logprobs, logits, token_ids, 1.0, 1.0)
    for x in out:
        assert x[:5].isnan().all() if x.dim() == 1 else x[:5].isnan().any(1).all()
        assert x[5].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_number_of_sixteen_bits_is_read_as_it_is(any_kernel, dtype):
    """A row of one logit each: its maximum, and the logit of its token."""
    bits = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    logits, ids = bits[:, None].to(any_kernel), torch.zeros(2**16, dtype=torch.int64)
    call = torch.ops.fastrl.token_logprobs_fwd
    logprobs, _, row_max, _ = call(logits, ids.to(any_kernel), 1.0, -100, False, False)
    finite = bits.isfinite()
    assert torch.equal(row_max.cpu()[finite], bits.float()[finite])
    assert not logprobs.cpu()[finite].any() and logprobs.cpu()[~finite].isnan().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_are_rounded_to_sixteen_bits_as_torch_rounds(any_kernel, dtype):
    """The gradient of a token of probability 0 is that of its log-probability: every number of 16
    bits, what lies half way to the next one, and around it; NaN of any bits stays one."""
    if any_kernel != "cpu":
        pytest.skip("one of the C++ kernels")
    exact = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).float()
    half_way = torch.cat([exact, (exact[1:] + exact[:-1]) / 2])
    upstream = torch.cat(
        [half_way, half_way.nextafter(half_way + 1), half_way.nextafter(-half_way)]
    )
    upstream = torch.cat([upstream, torch.tensor([0x7FFFFFFF, -1]).int().view(torch.float32)])
    logits = torch.tensor([0.0, -math.inf], dtype=dtype).repeat(len(upstream), 1).requires_grad_()
    logprobs = fastrl.token_logprobs(logits, torch.ones(len(upstream), dtype=torch.int64))
    (grad,) = torch.autograd.grad(logprobs, logits, upstream)
    expected = upstream.to(dtype)
    assert torch.equal(grad[:, 1].isnan(), expected.isnan())
    assert torch.equal(grad[:, 1].nan_to_num(1.5), expected.nan_to_num(1.5))


def test_a_token_that_cannot_be_drawn_has_the_gradient_of_the_reference(any_kernel):
    """Its share of the entropy's is 0, where 0 times -inf would be nan."""
    logits = torch.randn(2, 40, device=any_kernel)
    logits[0, 3], logits[1, 3] = -math.inf, -1e4
    token_ids = torch.tensor([3, 3], device=any_kernel)
    ours = run(fastrl.token_logprobs, logits, token_ids, 1.0, 1.0)
    exact = run(reference.token_logprobs, logits.double(), token_ids, 1.0, 1.0)
    torch.testing.assert_close(ours[2].double(), exact[2], rtol=1e-5, atol=1e-6)


def test_a_gradient_too_large_for_the_caches_has_the_same_bits(any_kernel):
    """It is written past them, where a row is aligned for that: one in 16 here."""
    logits = torch.randn(4111, 4099, device=any_kernel)  # 67 MB
    token_ids = torch.arange(4111, device=any_kernel) % 4099
    few = slice(None, None, 150)
    large, small = (
        run(fastrl.token_logprobs, logits[rows], token_ids[rows], 1.0, 0.5)[2]
        for rows in (slice(None), few)
    )
    assert torch.equal(large[few], small)


@pytest.mark.parametrize("temperature", [1e-40, 1e-20, 1e37])
def test_temperatures_at_the_ends(any_kernel, temperature):
    logits = torch.tensor([[2.0, 0.0, -math.inf], [1.0, 1.0, -1.0]], device=any_kernel)
    token_ids = torch.tensor([0, 1], device=any_kernel)
    logprobs, entropy, grad = run(
        fastrl.token_logprobs, logits, token_ids, 1.0, 1.0, temperature=temperature
    )
    ties = [0.0, math.log(2)] if temperature < 1 else [math.log(2), math.log(3)]
    expected = torch.tensor(ties, device=any_kernel)
    torch.testing.assert_close(entropy, expected)
    torch.testing.assert_close(logprobs, -expected)
    assert not grad.isnan().any()


def test_empty_batches(device):
    logits = torch.randn(0, 30, device=device, requires_grad=True)
    none = torch.empty(0, dtype=torch.int64, device=device)
    logprobs = fastrl.token_logprobs(logits, none)
    logprobs.sum().backward()
    assert logprobs.shape == (0,) and logits.grad.shape == (0, 30)
    out = fastrl.token_logprobs(torch.randn(2, 0, 5, device=device), none.view(2, 0))
    assert out.shape == (2, 0)


def test_all_rows_ignored_and_a_fresh_output_is_written_in_full(device):
    logits = torch.randn(3, 11, device=device, requires_grad=True)
    token_ids = torch.full((3,), -100, device=device)
    logprobs, entropy = fastrl.token_logprobs(logits, token_ids, return_entropy=True)
    (logprobs + entropy).sum().backward()
    assert not logprobs.any() and not entropy.any() and not logits.grad.any()


def test_kept_renormalises(device):
    logits = torch.randn(2, 8, device=device, requires_grad=True)
    ids = torch.tensor([1, 3, 0, 2, 5], device=device)
    bounds = torch.tensor([0, 2, 5], dtype=torch.int32, device=device)
    token_ids = torch.tensor([3, 7], device=device)
    logprobs = fastrl.token_logprobs(logits, token_ids, kept=(ids, bounds))
    expected = logits[0, 3] - logits[0, [1, 3]].logsumexp(0)
    torch.testing.assert_close(logprobs[0], expected)
    assert logprobs[1] == -math.inf


@pytest.mark.parametrize("return_entropy", [False, True])
def test_opcheck(device, return_entropy):
    logits = torch.randn(3, 40, device=device, requires_grad=True)
    token_ids = torch.tensor([1, -100, 39], device=device)
    arguments = (logits, token_ids, 0.8, -100, return_entropy, False)
    library.opcheck(torch.ops.fastrl.token_logprobs_fwd.default, arguments)
    logprobs, entropy, row_max, log_total = torch.ops.fastrl.token_logprobs_fwd(*arguments)
    saved = (logprobs, entropy if return_entropy else None, row_max, log_total)
    g = torch.randn(3, device=device)
    grads = (g, 2 * g if return_entropy else None)
    x = logits.detach()
    backward = (
        *grads,
        x,
        token_ids,
        *(s if s is None else s.detach() for s in saved),
        0.8,
        -100,
        0,
    )
    library.opcheck(torch.ops.fastrl.token_logprobs_bwd.default, backward)
    library.opcheck(torch.ops.fastrl.token_logprobs_bwd_.default, backward)


# The in-place form through Inductor, whose mutation analysis is what could go wrong.
@pytest.mark.parametrize("inplace, backend", [(False, "aot_eager"), (True, "inductor")])
def test_compiles_without_a_break_or_a_recompile(device, inplace, backend):
    def loss(x, token_ids):
        logprobs, entropy = fastrl.token_logprobs(
            x * 2.0, token_ids, temperature=0.7, return_entropy=True, inplace_backward=inplace
        )
        return (logprobs - 0.1 * entropy).sum()

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend=backend)
    for rows in (3, 5):
        x = torch.randn(rows, 40, device=device, requires_grad=True)
        token_ids = torch.randint(40, (rows,), device=device)
        with torch._dynamo.config.patch(error_on_recompile=rows != 3):
            compiled(x, token_ids).backward()
        ours, x.grad = x.grad, None
        loss(x, token_ids).backward()
        torch.testing.assert_close(ours, x.grad)


def test_out_of_range_ids_raise_where_looking_is_free():
    logits = torch.randn(2, 5)
    with pytest.raises(ValueError, match=r"token_ids in \[0, 5\) or ignore_index = -100, got 5"):
        fastrl.token_logprobs(logits, torch.tensor([1, 5]))
    with pytest.raises(ValueError, match="got -1"):
        fastrl.token_logprobs(logits, torch.tensor([-100, -1]))


def test_fake_tensors_hold_nothing_to_check():
    with FakeTensorMode():
        logits, token_ids = torch.randn(2, 5), torch.tensor([1, 2])
        assert fastrl.token_logprobs(logits, token_ids).shape == (2,)


def test_elsewhere_out_of_range_ids_give_nan_and_are_not_read(device):
    """Looking would break a graph, or synchronise. Nor is there a gradient to learn from."""
    torch._dynamo.reset()
    compiled = torch.compile(fastrl.token_logprobs, fullgraph=True, backend="aot_eager")
    logits = torch.randn(2, 5, device=device, requires_grad=True)
    out = compiled(logits, torch.tensor([1, 2**40], device=device))
    assert out[0].isfinite() and out[1].isnan()
    out.sum().backward()
    assert logits.grad[0].isfinite().all() and logits.grad[1].isnan().all()


IDS = torch.zeros(2, dtype=torch.int64)
BAD = [
    (dict(logits=torch.zeros(2, 3, dtype=torch.float64)), TypeError, "got torch.float64"),
    (dict(logits=[1.0]), TypeError, r"logits as a tensor, got list\. Use torch.as_tensor"),
    (dict(token_ids=IDS.int()), TypeError, "token_ids of dtype int64, got torch.int32"),
    (dict(token_ids=IDS[:1]), ValueError, r"token_ids \(2,\) like the leading axes"),
    (dict(logits=torch.zeros(2, 0)), ValueError, "V >= 1"),
    (dict(temperature=0.0), ValueError, "temperature > 0 and finite, got 0.0"),
    (dict(temperature=-1.0), ValueError, "temperature > 0"),
    (dict(temperature=1e38), ValueError, r"temperature in \[0, 1e\+37\], got 1e\+38"),
    (dict(temperature=10**400), ValueError, "temperature > 0 and finite, got 1000"),
    (dict(temperature=math.nan), ValueError, "temperature > 0"),
    (dict(temperature="1"), TypeError, r"temperature as a number, got str\. Use float"),
    (dict(ignore_index=None), TypeError, "ignore_index as an int"),
    (dict(ignore_index=2**63), ValueError, "ignore_index of 64 bits"),
    (dict(kept=IDS), TypeError, "kept as"),
    (dict(kept=(IDS,)), TypeError, "kept as"),
    (dict(kept=(IDS[:, None], torch.tensor([0, 1, 2]).int())), ValueError, r"kept ids \[K\]"),
    (dict(kept=(IDS, torch.tensor([0, 2]).int())), ValueError, r"kept cu_seqlens \[3\]"),
    (dict(kept=(IDS - 1, torch.tensor([0, 1, 2]).int())), ValueError, r"kept ids in \[0, 3\)"),
    (dict(kept=(IDS + 7, torch.tensor([0, 1, 2]).int())), ValueError, r"kept ids in \[0, 3\)"),
    (dict(kept=(IDS, torch.tensor([0, 1, 3]).int())), ValueError, "cu_seqlens from 0 to N = 2"),
    (dict(vocab_start=3), ValueError, "group with vocab_start"),
]


@pytest.mark.parametrize("arguments, error, message", BAD)
def test_bad_arguments(arguments, error, message):
    good = {"logits": torch.zeros(2, 3), "token_ids": IDS}
    with pytest.raises(error, match=message) as caught:
        fastrl.token_logprobs(**(good | arguments))
    assert str(caught.value).startswith("token_logprobs: expected ")
