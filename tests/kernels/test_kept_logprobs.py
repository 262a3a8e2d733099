"""The launchers in Triton's interpreter against the definition; see test_token_logprobs.py."""

import math

import pytest
import torch
from budget import assert_within_budget

from fastrl import reference

MODULE = "fastrl.kernels.kept_logprobs"
BLOCK = 1024  # ids that a program reads at once; a test below holds it against the kernel's own


@pytest.fixture
def ours(interpreted):
    """Log-prob, entropy and gradient, as autograd has the launchers called."""

    def run(logits, token_ids, g, h, kept, *, temperature=1.0, ignore_index=-100):
        numbers = (temperature, ignore_index)
        inputs = (logits, token_ids, *kept)
        outputs = interpreted(MODULE, "kept_logprobs_fwd", *inputs, *numbers, h is not None)
        logprobs, entropy, *rest = outputs
        saved = (logprobs, None if h is None else entropy, *rest)
        grad = interpreted(MODULE, "kept_logprobs_bwd", g, h, *inputs, *saved, *numbers)
        return logprobs, entropy, grad

    return run


def plain(logits, token_ids, g, h, kept, **options):
    x = logits.detach().clone().requires_grad_()
    logprobs, entropy = reference.token_logprobs(
        x, token_ids, kept=kept, return_entropy=True, **options
    )
    outputs = [(y, dy) for y, dy in ((logprobs, g), (entropy, h)) if dy is not None]
    sum((y * dy.to(y.dtype)).nansum() for y, dy in outputs).backward()
    return logprobs.detach(), entropy.detach(), x.grad


def some(vocab, sizes):
    """kept: so many ids for each row, ascending."""
    ids = [torch.randperm(vocab)[:size].sort().values for size in sizes]
    bounds = torch.tensor([0, *sizes]).cumsum(0).int()
    return torch.cat(ids), bounds


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("most", [1, 33, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 500])
def test_error_budget(ours, dtype, most):
    vocab = 4097
    logits = (3 * torch.randn(6, vocab)).to(dtype)
    logits[1] -= 1e4 if dtype == torch.float32 else 100.0  # all very negative
    logits[2] = 2.0  # every entry is the maximum
    ids, bounds = some(vocab, [most, most, most, (most + 1) // 2, most, 3])
    token_ids = ids[bounds[:-1].long()]
    logits[3, ids[bounds[3] + 1 : bounds[4]]] = -math.inf
    logits[4, token_ids[4]] = 30.0  # p near 1
    token_ids[5] = -100
    arguments = (token_ids, torch.randn(6), torch.randn(6), (ids, bounds))
    actual = ours(logits, *arguments, temperature=0.7)
    eager = plain(logits, *arguments, temperature=0.7)
    truth = plain(logits.double(), *arguments, temperature=0.7)
    for i, parts in enumerate(zip(actual, eager, truth, strict=True)):
        assert_within_budget(*parts, dtype if i == 2 else torch.float32)
    assert not actual[2][5].any()


@pytest.mark.parametrize("g, h", [(1.0, 0.0), (0.0, 1.0)])
def test_likely_and_unlikely_tokens_keep_their_digits(ours, g, h):
    """p = 1 - rest: relative error, where log_softmax in float32 loses every digit."""
    vocab, rows = 300, []
    kept_ids = torch.arange(0, vocab, 2)
    for rest in (1e-1, 1e-3, 1e-5, 1e-7, 1e-8):
        row = torch.full((vocab,), math.log(rest / (len(kept_ids) - 1)))
        row[18] = math.log1p(-rest)
        rows += [row, row + 1e4]
    logits = torch.stack(rows).repeat(2, 1)
    token_ids = torch.tensor([18, 4]).repeat_interleave(len(rows))
    n = len(logits)
    kept = (kept_ids.repeat(n), (torch.arange(n + 1) * len(kept_ids)).int())
    arguments = (token_ids, torch.full((n,), g), torch.full((n,), h), kept)
    actual, truth = ours(logits, *arguments), plain(logits.double(), *arguments)
    for a, t in zip(actual, truth, strict=True):
        assert (a[t == 0] == 0).all()
        assert ((a.double() - t).abs() / t.abs())[t != 0].max() <= 1e-5


@pytest.mark.parametrize("g, h", [(1.0, None), (None, 1.0), (1.0, 0.5)])
def test_either_gradient_alone(ours, g, h):
    logits, kept = torch.randn(3, 70), some(70, [9, 1, 20])
    token_ids = kept[0][kept[1][1:].long() - 1]
    g, h = (None if x is None else torch.full((3,), x) for x in (g, h))
    logprobs, entropy, grad = ours(logits, token_ids, g, h, kept)
    truth = plain(logits.double(), token_ids, g, h, kept)
    torch.testing.assert_close(logprobs.double(), truth[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(grad.double(), truth[2], rtol=1e-5, atol=1e-6)
    if h is None:
        assert entropy.shape == (0,)


def test_tokens_outside_and_rows_without_a_set(ours):
    """Not kept: -inf, and the kept ones are pushed down. Nothing kept, or no finite logit: NaN. Not
    in the vocabulary: NaN. Ignored: 0, whatever the row holds."""
    logits = torch.randn(7, 20)
    logits[4, [2, 5]], logits[6] = -math.inf, math.nan
    sizes = [3, 0, 2, 2, 2, 0, 4]
    ids, bounds = some(20, sizes)
    ids[bounds[4] : bounds[5]] = torch.tensor([2, 5])
    absent = next(i for i in range(20) if i not in ids[:3])
    token_ids = torch.tensor([absent, 4, 20, -1, 2, -100, -100])
    g, h = torch.ones(7), torch.ones(7)
    logprobs, entropy, grad = ours(logits, token_ids, g, h, (ids, bounds))
    assert logprobs[0] == -math.inf and logprobs[1:5].isnan().all()
    assert entropy[[0, 2, 3]].isfinite().all() and entropy[[1, 4]].isnan().all()
    assert not logprobs[5:].any() and not entropy[5:].any() and not grad[[1, 5, 6]].any()
    truth = plain(logits[:1].double(), token_ids[:1], None, h[:1], (ids[:3], bounds[:2]))[2]
    truth[0, ids[:3]] -= logits[0, ids[:3]].double().softmax(0)
    torch.testing.assert_close(grad[:1].double(), truth, rtol=1e-5, atol=1e-6)
    assert grad[2, ids[3:5]].isnan().all() and grad[2].isnan().sum() == 2


def test_a_kept_token_without_probability(ours):
    logits, kept = torch.randn(1, 20), (torch.arange(1, 9), torch.tensor([0, 8]).int())
    logits[0, 7] = -math.inf
    logprobs, entropy, grad = ours(logits, torch.tensor([7]), torch.ones(1), torch.ones(1), kept)
    assert logprobs[0] == -math.inf
    x = logits[:, 1:9].double()
    p, log_p = x.softmax(1), x.log_softmax(1)
    expected = -p - torch.where(p > 0, p * (log_p + entropy[:, None]), 0.0)
    expected[0, 6] += 1.0
    torch.testing.assert_close(grad[:, 1:9].double(), expected, rtol=1e-5, atol=1e-6)


def test_rows_with_nan_give_nan_where_it_is_kept(ours):
    logits, (ids, bounds) = torch.randn(3, 30), some(30, [5, 5, 5])
    logits[0, ids[0]], logits[1, ids[7]] = math.nan, math.inf
    logits[2] = logits[2].masked_fill(~torch.isin(torch.arange(30), ids[10:]), math.nan)
    logprobs, entropy, grad = ours(
        logits, ids[[1, 6, 11]], torch.ones(3), torch.ones(3), (ids, bounds)
    )
    assert logprobs[:2].isnan().all() and entropy[:2].isnan().all() and logprobs[2].isfinite()
    assert grad[0, ids[:5]].isnan().any() and grad[2].isfinite().all()


def test_nothing_is_read_or_written_outside(ours):
    """Ids and bounds that no sampler gives."""
    base = torch.full((4, 40), 7.0)
    logits = base[1:3, 4:36].normal_()
    ids, bounds = torch.tensor([3, 32, -1, 2**40, 5, 6]), torch.tensor([-3, 5, 99]).int()
    token_ids, g = torch.tensor([3, 6]), torch.ones(2)
    clean = (torch.tensor([3, 5, 6]), torch.tensor([0, 2, 3]).int())
    found = ours(logits, token_ids, g, g, (ids, bounds))
    for actual, expected in zip(found, ours(logits, token_ids, g, g, clean), strict=True):
        assert torch.equal(actual, expected)


def test_a_row_depends_neither_on_its_batch_nor_on_its_strides(ours):
    base = torch.randn(2, 4, 3000)
    logits, kept = base[:, :-1, 3:2903], some(2900, [5, 1500, 40, 1, 2, 3])
    ids, bounds = kept
    token_ids = ids[bounds[:-1].long()].view(2, 3)
    g, h = torch.randn(2, 3), torch.randn(2, 3)
    together = ours(logits, token_ids, g, h, kept)
    flat = [x.contiguous().flatten(0, 1) for x in (logits, token_ids, g, h)]
    copied = ours(*flat, kept)
    assert all(torch.equal(a, b.flatten(0, 1)) for a, b in zip(copied, together, strict=True))
    alone = (ids[5:1505].clone(), torch.tensor([0, 1500]).int())
    found = ours(logits[0, 1].clone(), token_ids[0, 1], g[0, 1], h[0, 1], alone)
    assert all(torch.equal(a, b[0, 1]) for a, b in zip(found, together, strict=True))


@pytest.mark.parametrize("shape", [(0,), (2, 0)])
def test_empty_batches(ours, shape):
    token_ids, g = torch.empty(shape, dtype=torch.int64), torch.empty(shape)
    kept = (token_ids.flatten(), torch.zeros(1, dtype=torch.int32))
    out = ours(torch.empty(*shape, 5), token_ids, g, g, kept)
    assert [x.shape for x in out] == [shape, shape, (*shape, 5)]


def test_what_changes_from_step_to_step_makes_no_new_kernel():
    pytest.importorskip("triton")
    from ahead_of_time import record

    from fastrl.kernels.kept_logprobs import kept_logprobs_bwd, kept_logprobs_fwd

    keys = set()
    for i, shape in enumerate([(3, 1000), (16, 1001), (1, 16), (1000,), (2, 5, 1)]):
        rows = torch.Size(shape[:-1]).numel()
        ids, row = torch.empty(shape[:-1], dtype=torch.int64), torch.empty(shape[:-1])
        kept = (torch.empty(16 * i, dtype=torch.int64), torch.empty(rows + 1, dtype=torch.int32))
        inputs = (torch.empty(shape), ids, *kept)
        requests = record(90, kept_logprobs_fwd, *inputs, 1.0, -i, True)
        saved = (row, row, row, row, 0.5, -100)
        requests += record(90, kept_logprobs_bwd, row, row, *inputs, *saved)
        keys.add(tuple(request.key for request in requests))
    assert len(keys) == 1


def test_the_sizes_above_are_the_kernels():
    assert pytest.importorskip(MODULE).BLOCK["BLOCK_K"] == BLOCK
