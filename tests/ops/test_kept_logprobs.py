"""token_logprobs(kept=): log-probabilities renormalised over the ids that a row was drawn from."""

import math

import pytest
import torch
from budget import assert_within_budget
from torch import library

import fastrl
from fastrl import reference

FLOATS = [torch.float32, torch.bfloat16, torch.float16]


def kept_of(sets, device):
    bounds = torch.tensor([0, *(len(s) for s in sets)]).cumsum(0).int()
    return torch.cat([torch.as_tensor(s, dtype=torch.int64) for s in sets]).to(device), bounds.to(
        device
    )


def run(function, logits, token_ids, kept, g, h, **options):
    logits = logits.detach().clone().requires_grad_()
    logprobs, entropy = function(logits, token_ids, kept=kept, return_entropy=True, **options)
    loss = logprobs[logprobs.isfinite()] * g[logprobs.isfinite()]
    (loss.sum() + (entropy * h).sum()).backward()
    return logprobs.detach(), entropy.detach(), logits.grad


# One id; a vector of any width and its neighbours; a block; more than one stretch; all of them.
@pytest.mark.parametrize("dtype", FLOATS)
def test_error_budget(any_kernel, dtype):
    vocab, sizes = 40001, [1, 2, 15, 16, 17, 33, 2049, 33000, 40001]
    logits = (3 * torch.randn(len(sizes), vocab)).to(dtype)
    logits[2] -= 1e4 if dtype == torch.float32 else 100.0
    sets = [torch.randperm(vocab)[:size] for size in sizes]
    logits[4, sets[4][3:9]] = -math.inf
    logits[5] = 2.0
    token_ids = torch.stack([s[len(s) // 2] for s in sets])
    token_ids[4] = sets[4][0]
    token_ids[6] = -100
    g, h = torch.randn(len(sizes)), torch.randn(len(sizes))
    logits, token_ids, g, h = (x.to(any_kernel) for x in (logits, token_ids, g, h))
    arguments = (token_ids, kept_of(sets, any_kernel))
    ours = run(fastrl.token_logprobs, logits, *arguments, g, h, temperature=0.7)
    eager = run(reference.token_logprobs, logits, *arguments, g, h, temperature=0.7)
    truth = run(
        reference.token_logprobs, logits.double(), *arguments, g.double(), h.double(),
        temperature=0.7,
    )  # fmt: skip
    for actual, plain, exact in zip(ours, eager, truth, strict=True):
        assert_within_budget(actual, plain, exact, dtype if actual is ours[2] else torch.float32)


@pytest.mark.parametrize("log10_rest", [-1, -3, -5, -7, -8])
@pytest.mark.parametrize("offset", [0.0, 1e4, -1e4])
def test_likely_and_unlikely_tokens_keep_their_digits(any_kernel, log10_rest, offset):
    """p = 1 - 10^k among the kept, and beside them ids that would outweigh them all."""
    vocab, count = 6000, 5000
    logits = torch.full((2, vocab), 5.0)
    logits[:, :count] = math.log(10.0**log10_rest / (count - 1))
    logits[:, 17] = math.log1p(-(10.0**log10_rest))
    logits = (logits + offset).to(any_kernel)
    token_ids = torch.tensor([17, 3], device=any_kernel)
    kept = kept_of([torch.randperm(count), torch.arange(count)], any_kernel)
    for g, h in ((1.0, 0.0), (0.0, 1.0)):
        g, h = (torch.full((2,), x, device=any_kernel) for x in (g, h))
        ours = run(fastrl.token_logprobs, logits, token_ids, kept, g, h)
        truth = run(reference.token_logprobs, logits.double(), token_ids, kept, g, h)
        for actual, exact in zip(ours, truth, strict=True):
            inside = exact != 0
            assert torch.equal(actual != 0, inside)
            error = (actual.double() - exact)[inside].abs() / exact[inside].abs()
            assert error.max() <= 1e-5


@pytest.mark.parametrize("dtype", FLOATS)
def test_with_all_ids_kept_the_bits_are_those_of_the_whole_row(any_kernel, dtype):
    logits = torch.randn(3, 40001, device=any_kernel).to(dtype)
    token_ids = torch.tensor([5, 40000, 33000], device=any_kernel)
    kept = kept_of([torch.arange(40001)] * 3, any_kernel)
    options = {"temperature": 1.3, "return_entropy": True}
    ours = fastrl.token_logprobs(logits, token_ids, kept=kept, **options)
    whole = fastrl.token_logprobs(logits, token_ids, **options)
    if any_kernel == "cpu":
        assert all(torch.equal(a, b) for a, b in zip(ours, whole, strict=True))
    else:  # where a row is no one program's, and its stretches are added up at the end
        torch.testing.assert_close(ours, whole, rtol=1e-6, atol=0)


def test_a_row_alone_and_threads_do_not_change_a_bit(device):
    logits = torch.randn(9, 50001, device=device)
    sets = [torch.randperm(50001)[:size] for size in (1, 40, 50001, 3, 700, 64, 5000, 2, 35000)]
    token_ids = torch.stack([s[0] for s in sets]).to(device)
    g = torch.ones(9, device=device)
    threads = torch.get_num_threads()
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        kept = kept_of(sets, device)
        results.append(run(fastrl.token_logprobs, logits, token_ids, kept, g, g))
    torch.set_num_threads(threads)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))
    for row in range(9):
        mine = slice(row, row + 1)
        kept = kept_of(sets[mine], device)
        alone = run(fastrl.token_logprobs, logits[mine], token_ids[mine], kept, g[mine], g[mine])
        assert all(torch.equal(a[0], b[row]) for a, b in zip(alone, results[0], strict=True))


def test_a_token_outside_has_logprob_minus_infinity_and_the_gradient_of_the_reference(device):
    logits = torch.randn(3, 30, device=device)
    token_ids = torch.tensor([7, 3, 9], device=device)
    kept = kept_of([[1, 2, 3], [3, 8], [29, 0]], device)
    grads = []
    for function, x in ((fastrl, logits.clone()), (reference, logits.double())):
        x.requires_grad_()
        logprobs = function.token_logprobs(x, token_ids, kept=kept, temperature=0.5)
        assert logprobs.isneginf().tolist() == [True, False, True]
        logprobs.sum().backward()
        grads.append(x.grad.double())
    assert grads[0].any(1).all()
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-5, atol=1e-7)


def test_rows_that_are_ignored_or_keep_nothing_or_hold_nan(device):
    logits = torch.randn(5, 50, device=device)
    logits[0] = math.nan
    logits[3, 4] = math.nan  # kept
    logits[4, 4] = math.nan  # not kept
    token_ids = torch.tensor([-1, 2, -1, 5, 5], device=device)
    kept = kept_of([[1, 2], [], [], [4, 5], [5, 6]], device)
    g = torch.ones(5, device=device)
    logprobs, entropy, grad = run(
        fastrl.token_logprobs, logits, token_ids, kept, g, g, ignore_index=-1
    )
    for x in (logprobs, entropy):
        assert x.isnan().tolist() == [False, True, False, True, False]
        assert x[0] == x[2] == 0
    assert grad[:3].count_nonzero() == 0 and grad[4].isfinite().all()
    assert grad[3].isnan().tolist() == [i in (4, 5) for i in range(50)]


def test_strided_logits(device):
    logits = torch.randn(4, 6, 300, device=device)
    token_ids = torch.full((4, 5), 7, device=device)
    kept = kept_of([[7, 90, 3], [99, 7]] * 10, device)
    for view in (logits[:, :-1, :100], logits[:, 1:, ::3]):
        ours = run(fastrl.token_logprobs, view, token_ids, kept, torch.ones_like(view[..., 0]), 1.0)
        copy = view.contiguous()
        expected = run(fastrl.token_logprobs, copy, token_ids, kept, torch.ones(4, 5).to(copy), 1.0)
        assert torch.equal(fastrl.token_logprobs(view, token_ids, kept=kept), expected[0])
        assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


def test_empty_batch(device):
    logits = torch.randn(0, 30, device=device, requires_grad=True)
    none = torch.empty(0, dtype=torch.int64, device=device)
    bounds = torch.zeros(1, dtype=torch.int32, device=device)
    fastrl.token_logprobs(logits, none, kept=(none, bounds)).sum().backward()
    assert logits.grad.shape == (0, 30)


@pytest.mark.parametrize("return_entropy", [False, True])
def test_opcheck(device, return_entropy):
    logits = torch.randn(3, 40, device=device, requires_grad=True)
    token_ids = torch.tensor([1, -100, 39], device=device)
    ids, bounds = kept_of([[1, 7], [4], [39, 0, 3]], device)
    numbers = (0.8, -100)
    arguments = (logits, token_ids, ids, bounds, *numbers, return_entropy)
    library.opcheck(torch.ops.fastrl.kept_logprobs_fwd.default, arguments)
    logprobs, entropy, *rest = (x.detach() for x in torch.ops.fastrl.kept_logprobs_fwd(*arguments))
    saved = (logprobs, entropy if return_entropy else None, *rest)
    g = torch.randn(3, device=device)
    grads = (g, 2 * g if return_entropy else None)
    backward = (*grads, logits.detach(), token_ids, ids, bounds, *saved, *numbers)
    library.opcheck(torch.ops.fastrl.kept_logprobs_bwd.default, backward)


def test_compiles_without_a_break_or_a_recompile(device):
    def loss(x, token_ids, ids, bounds):
        logprobs, entropy = fastrl.token_logprobs(
            x * 2.0, token_ids, kept=(ids, bounds), return_entropy=True
        )
        return (logprobs - 0.1 * entropy).sum()

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (3, 5):
        x = torch.randn(rows, 40, device=device, requires_grad=True)
        token_ids = torch.randint(40, (rows,), device=device)
        kept = kept_of([[int(t), (int(t) + 3) % 40] for t in token_ids], device)
        with torch._dynamo.config.patch(error_on_recompile=rows != 3):
            compiled(x, token_ids, *kept).backward()
        ours, x.grad = x.grad, None
        loss(x, token_ids, *kept).backward()
        torch.testing.assert_close(ours, x.grad)


def test_out_of_range_token_ids_give_nan_and_are_not_read(device):
    logits = torch.randn(2, 5, device=device, requires_grad=True)
    token_ids = torch.tensor([1, 2**40], device=device)
    kept = kept_of([[1, 2], [3, 4]], device)
    out = torch.ops.fastrl.kept_logprobs_fwd(logits, token_ids, *kept, 1.0, -100, False)[0]
    assert out[0].isfinite() and out[1].isnan()
    out.sum().backward()
    assert logits.grad[0].isfinite().all() and logits.grad[1, 3:].isnan().all()


@pytest.mark.parametrize(
    "ids, bounds, message",
    [
        ([1, 5], [0, 1, 2], r"kept ids must be in \[0, 5\)"),
        ([1, -1], [0, 1, 2], r"kept ids must be in \[0, 5\)"),
        ([1, 2], [0, 3, 2], "must rise"),
        ([1, 2], [0, 1, 3], "must rise"),
        ([1, 2], [0, 2], "one more than rows"),
    ],
)
def test_on_the_cpu_the_op_itself_refuses_wrong_sets(ids, bounds, message):
    """Where Python may not look, as under torch.compile."""
    kept = torch.tensor(ids), torch.tensor(bounds, dtype=torch.int32)
    arguments = (torch.randn(2, 5), torch.tensor([1, 2]), *kept, 1.0, -100, False)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.fastrl.kept_logprobs_fwd(*arguments)
