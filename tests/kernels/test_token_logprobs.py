"""The launchers in Triton's interpreter against the definition."""

import math

import pytest
import torch
from budget import assert_within_budget

from fastrl import _vocabulary, reference

MODULE = "fastrl.kernels.token_logprobs"
FLOATS = [torch.float32, torch.float16, torch.bfloat16]
CHUNK = 32768  # columns a program walks; a test below holds it against the kernel's own
# One column; odd; a warp and its neighbour; the small block and its neighbours; the large blocks
# and their neighbours; two stretches of the vocabulary, the second of more than a block.
VOCABULARIES = [1, 2, 33, 1023, 1024, 1025, 2048, 2049, 4096, 4097, CHUNK + 5000]


@pytest.fixture
def ours(interpreted):
    """Log-prob, entropy and gradient, as autograd has the launchers called."""

    def run(logits, token_ids, g, h, *, temperature=1.0, ignore_index=-100, inplace=False):
        numbers = (temperature, ignore_index)
        outputs = interpreted(
            MODULE, "token_logprobs_fwd", logits, token_ids, *numbers, h is not None, inplace
        )
        logprobs, entropy, *rest = outputs
        saved = (logprobs, None if h is None else entropy, *rest)
        arguments = (g, h, logits, token_ids, *saved, *numbers, 0)
        if inplace:
            interpreted(MODULE, "token_logprobs_bwd_", *arguments)
            return logprobs, entropy, logits
        return logprobs, entropy, interpreted(MODULE, "token_logprobs_bwd", *arguments)

    return run


def plain(logits, token_ids, g, h, **options):
    x = logits.detach().clone().requires_grad_()
    logprobs, entropy = reference.token_logprobs(x, token_ids, return_entropy=True, **options)
    loss = 0.0
    if g is not None:
        loss = loss + (logprobs * g.to(logprobs.dtype)).sum()
    if h is not None:
        loss = loss + (entropy * h.to(entropy.dtype)).sum()
    loss.backward()
    return logprobs.detach(), entropy.detach(), x.grad


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("vocab", VOCABULARIES)
def test_error_budget(ours, dtype, vocab):
    logits = (3 * torch.randn(6, vocab)).to(dtype)
    logits[1] -= 1e4 if dtype == torch.float32 else 100.0  # all very negative
    logits[2, torch.randperm(vocab)[: vocab // 2]] = -math.inf
    logits[3] = 2.0  # every entry is the maximum
    logits[4, : vocab // 2] = torch.finfo(dtype).min  # so do some mask
    token_ids = torch.randint(vocab, (6,))
    token_ids[2], token_ids[4] = logits[2].argmax(), logits[4].argmax()
    token_ids[5] = -100
    arguments = (token_ids, torch.randn(6), torch.randn(6))
    actual = ours(logits, *arguments, temperature=0.7)
    eager = plain(logits, *arguments, temperature=0.7)
    truth = plain(logits.double(), *arguments, temperature=0.7)
    for i, parts in enumerate(zip(actual, eager, truth, strict=True)):
        assert_within_budget(*parts, dtype if i == 2 else torch.float32)


def test_a_temperature_of_next_to_nothing(ours):
    """What has no probability has no gradient, though 1 / T is next to infinite."""
    logits = torch.tensor([[2.0, 0.0, -math.inf], [1.0, 1.0, -1.0]])
    for h in (None, torch.ones(2)):
        *_, grad = ours(logits, torch.tensor([0, 1]), torch.full((2,), 2.0), h, temperature=1e-40)
        assert not grad[0].any() and grad[1, 2] == 0 and not grad.isnan().any()


@pytest.mark.parametrize("g, h", [(1.0, 0.0), (0.0, 1.0)])
def test_likely_and_unlikely_tokens_keep_their_digits(ours, g, h):
    """p = 1 - rest: relative error, where log_softmax in float32 loses every digit."""
    vocab, rows = 3000, []
    for rest in (1e-1, 1e-3, 1e-5, 1e-7, 1e-8):
        row = torch.full((vocab,), math.log(rest / (vocab - 1)))
        row[17] = math.log1p(-rest)
        rows += [row, row + 1e4, row - 1e4]
    logits = torch.stack(rows).repeat(2, 1)
    token_ids = torch.tensor([17, 3]).repeat_interleave(len(rows))
    arguments = (token_ids, torch.full((30,), g), torch.full((30,), h))
    actual, truth = ours(logits, *arguments), plain(logits.double(), *arguments)
    for a, t in zip(actual, truth, strict=True):
        assert ((a.double() - t).abs() / t.abs()).max() <= 1e-5


@pytest.mark.parametrize("g, h", [(1.0, None), (None, 1.0), (1.0, 0.5)])
def test_either_gradient_alone(ours, g, h):
    logits, token_ids = torch.randn(3, 70), torch.randint(70, (3,))
    g, h = (None if x is None else torch.full((3,), x) for x in (g, h))
    logprobs, entropy, grad = ours(logits, token_ids, g, h)
    truth = plain(logits.double(), token_ids, g, h)
    torch.testing.assert_close(logprobs.double(), truth[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(grad.double(), truth[2], rtol=1e-5, atol=1e-6)
    if h is None:
        assert entropy.shape == (0,)


def test_a_row_alone_is_bitwise_the_row_in_a_batch(ours):
    vocab = CHUNK + 1
    logits, token_ids = torch.randn(5, vocab), torch.randint(vocab, (5,))
    g, h = torch.randn(5), torch.randn(5)
    together = ours(logits, token_ids, g, h)
    for rows in (slice(0, 1), slice(4, 5), slice(1, 4)):
        alone = ours(logits[rows].clone(), token_ids[rows], g[rows], h[rows])
        assert all(torch.equal(a, t[rows]) for a, t in zip(alone, together, strict=True))
    alone = ours(logits[2].clone(), token_ids[2], g[2], h[2])  # no leading axis at all
    assert all(torch.equal(a, t[2]) for a, t in zip(alone, together, strict=True))


def test_more_rows_than_one_program_merges(ours):
    """130: the merge takes 128 rows at a time. The ignored ones are there for their number."""
    logits, token_ids = torch.randn(130, 5), torch.full((130,), -100)
    token_ids[[0, 126, 127, 128, 129]] = 3
    g, h = torch.randn(130), torch.randn(130)
    truth = plain(logits.double(), token_ids, g, h)
    for actual, exact in zip(ours(logits, token_ids, g, h), truth, strict=True):
        torch.testing.assert_close(actual.double(), exact, rtol=1e-5, atol=1e-6)


STRIDED = {
    "columns": lambda x: x[0, 0, :, 1:34],
    "all but the last step": lambda x: x[0, :, :-1, :33],
    "a broadcast axis": lambda x: x[0, :1, ::2, :33].expand(2, 2, 33),
    "four axes that fold": lambda x: x[:, :, :-1, :33],
    "four axes that do not fold": lambda x: x[:, 1:, :-1, :33],
    "five axes that do not fold": lambda x: x[None, :, 1:, 1:, 1:34],
}


@pytest.mark.parametrize("name", STRIDED)
def test_strided_leading_axes(ours, name):
    base = torch.randn(2, 3, 3, 40)
    logits, untouched = STRIDED[name](base), base.clone()
    token_ids = torch.randint(33, logits.shape[:-1])
    g, h = torch.randn(token_ids.shape), torch.randn(token_ids.shape)
    copied = ours(logits.contiguous(), token_ids, g, h)
    strided = ours(logits, token_ids, g, h)
    assert all(torch.equal(a, b) for a, b in zip(strided, copied, strict=True))
    assert torch.equal(base, untouched)
    if name != "a broadcast axis":
        ours(logits, token_ids, g, h, inplace=True)
        STRIDED[name](untouched).copy_(copied[2])  # what lies between the rows is not the op's
        assert torch.equal(base, untouched)


@pytest.mark.parametrize("dtype", FLOATS)
def test_in_place_equals_out_of_place(ours, dtype):
    vocab = 4097
    logits, token_ids = torch.randn(3, vocab).to(dtype), torch.tensor([5, -100, vocab - 1])
    arguments = (token_ids, torch.randn(3), torch.randn(3))
    apart = ours(logits, *arguments)
    over = ours(logits.clone(), *arguments, inplace=True)
    assert all(torch.equal(a, b) for a, b in zip(apart, over, strict=True))


def test_ignored_rows_may_hold_anything(ours):
    logits = torch.randn(4, 1030)
    logits[1], logits[3] = math.nan, -math.inf
    token_ids = torch.tensor([3, -1, 4, -1])
    out = ours(logits, token_ids, torch.ones(4), torch.ones(4), ignore_index=-1)
    assert not any(x[[1, 3]].any() for x in out)
    assert all(x.isfinite().all() for x in out)


def test_rows_without_a_distribution_are_nan_and_leave_the_others_alone(ours):
    logits = torch.randn(6, 5000)
    logits[0, 3], logits[1, 4999], logits[2] = math.nan, math.inf, -math.inf
    logits[3, :4200] = -math.inf
    logits[3, 7] = math.nan  # NaN before anything finite
    logits[4] = math.nan
    for g, h in ((torch.ones(6), torch.ones(6)), (None, torch.ones(6)), (torch.ones(6), None)):
        logprobs, entropy, grad = ours(logits, torch.full((6,), 9), g, h)
        for x in (logprobs, entropy if h is not None else logprobs):
            assert x[:5].isnan().all() and x[5].isfinite()
        assert grad[:5].isnan().any(1).all() and grad[5].isfinite().all()


def test_an_id_outside_the_vocabulary_gives_nan_and_is_not_read(ours):
    logits, token_ids = torch.randn(4, 40), torch.tensor([40, -1, 2**40, 39])
    logprobs, entropy, grad = ours(logits, token_ids, torch.ones(4), torch.ones(4))
    assert logprobs[:3].isnan().all() and logprobs[3].isfinite()
    assert entropy.isfinite().all()
    assert grad[:3].isnan().all() and grad[3].isfinite().all()


def test_a_token_without_probability(ours):
    """-inf, and the others are pushed down as by any other token."""
    logits, token_ids = torch.randn(2, 50), torch.tensor([7, 7])
    logits[0, 7] = -math.inf
    logprobs, entropy, grad = ours(logits, token_ids, torch.ones(2), torch.ones(2))
    assert logprobs[0] == -math.inf and entropy.isfinite().all()
    p, log_p = logits.double().softmax(1), logits.double().log_softmax(1)
    expected = -p - torch.where(p > 0, p * (log_p + entropy[:, None]), 0.0)
    expected[:, 7] += 1.0
    torch.testing.assert_close(grad.double(), expected, rtol=1e-5, atol=1e-6)


def test_masks_at_both_ends_of_float32(ours):
    """A block of the most negative number, then one of ordinary logits: gaps overflow."""
    logits = torch.randn(2, 2 * 4096)
    logits[:, :4096] = torch.finfo(torch.float32).min
    logits[1, 4096:] = torch.finfo(torch.float32).max
    arguments = (torch.tensor([5000, 5000]), torch.ones(2), torch.ones(2))
    truth = plain(logits.double(), *arguments)
    for actual, exact in zip(ours(logits, *arguments), truth, strict=True):
        torch.testing.assert_close(actual.double(), exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(0,), (2, 0), (2, 3, 0)])
def test_empty_batches(ours, shape):
    token_ids = torch.empty(shape, dtype=torch.int64)
    for inplace in (False, True):
        g, h = torch.empty(shape), torch.empty(shape)
        out = ours(torch.empty(*shape, 5), token_ids, g, h, inplace=inplace)
        assert [x.shape for x in out] == [shape, shape, (*shape, 5)]


def test_slices_of_a_vocabulary_add_up_to_the_whole(ours, interpreted):
    """Unequal slices; a row whose maximum is in each, an ignored one, and a wild id."""
    bounds = [0, 40, 40 + CHUNK + 100, CHUNK + 1200]
    logits = 3 * torch.randn(6, bounds[-1])
    logits[3, :40] = -math.inf
    token_ids = torch.tensor([0, 45, bounds[-1] - 1, 7, -100, bounds[-1]])
    logits[torch.arange(3), token_ids[:3]] = 30.0
    g, h, T = torch.randn(6), torch.randn(6), 0.7
    slices = [slice(a, b) for a, b in zip(bounds, bounds[1:], strict=False)]
    states = [
        interpreted(MODULE, "token_logprobs_state", logits[:, s], token_ids, T, -100, s.start, True)
        for s in slices
    ]
    whole = _vocabulary.merge_states(torch.stack(states), T)
    found = _vocabulary.finish(whole, token_ids, T, -100)
    expected = ours(logits, token_ids, g, h, temperature=T)
    for a, b in zip(found, expected[:2], strict=False):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6, equal_nan=True)
    grads = []
    for s in slices:  # into a buffer of its own, and over the logits
        arguments = (g, h, logits[:, s].clone(), token_ids, *found, T, -100, s.start)
        grad = torch.empty(6, s.stop - s.start, dtype=torch.float16)
        interpreted(MODULE, "token_logprobs_bwd_out", grad, *arguments)
        interpreted(MODULE, "token_logprobs_bwd_", *arguments)
        grads.append(arguments[2])
        torch.testing.assert_close(grad, grads[-1].half(), equal_nan=True)
    grad = torch.cat(grads, 1)
    torch.testing.assert_close(grad, expected[2], rtol=1e-5, atol=1e-6, equal_nan=True)


def test_a_state_without_entropy(interpreted):
    logits, token_ids = torch.randn(3, 50), torch.tensor([1, 60, -100])
    state = interpreted(MODULE, "token_logprobs_state", logits, token_ids, 1.0, -100, 20, False)
    assert state[:2].isfinite().all() and not state[2].any()
    assert state[:2, 5].tolist() == [0, 1] and state[1, 4] == logits[1, 40]
    none = torch.empty(0, dtype=torch.int64)
    empty = interpreted(MODULE, "token_logprobs_state", logits[:0], none, 1.0, -100, 0, True)
    assert empty.shape == (0, 6)


def test_the_sizes_above_are_the_kernels():
    states = pytest.importorskip("fastrl.kernels._row_states")
    kernels = pytest.importorskip("fastrl.kernels.token_logprobs")
    assert states.CHUNK == CHUNK
    assert [block["BLOCK_V"] for block in states.FORWARD] == [1024, 2048]
    for blocks in (kernels.BACKWARD, kernels.BACKWARD_UNALIGNED):
        assert [block["BLOCK_V"] for block in blocks] == [1024, 4096]
    assert states.MERGE["BLOCK_N"] == 128
