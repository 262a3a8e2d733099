"""What only a GPU can show of sampling and of log-probs over kept ids."""

from math import inf, nan

import pytest
import torch

import fastrl
from fastrl import reference
from fastrl.reference._philox import uniform
from fastrl.reference.sample_tokens import draw_tokens

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
VOCAB = 50257  # odd, more than one stretch of the vocabulary
A_WHILE = 300_000_000  # cycles: above a tenth of a second
STEP = 3
FLOATS = [torch.float32, torch.bfloat16, torch.float16]
# temperature, top_k, top_p
CUTS = [(1.0, None, None), (0.7, 50, None), (1.3, None, 0.9), (0.9, 1000, 0.8), (0.0, 5, 0.5)]


def inputs(rows, vocab=VOCAB, dtype=torch.bfloat16, seed=0):
    generator = torch.Generator(DEVICE).manual_seed(seed)
    options = {"generator": generator, "device": DEVICE}
    logits = (3 * torch.randn(rows, vocab, **options)).to(dtype)
    return logits, torch.randint(-(2**63), 2**63 - 1, (rows,), **options)


def draw(logits, seeds, cut=CUTS[3]):
    """token_ids, logprobs, lowest, last_id."""
    return torch.ops.fastrl.sample_tokens(logits, seeds, STEP, *cut)


def kept_logprobs(logits, token_ids, kept, g, h):
    """logprobs, entropy and the gradient of the logits."""
    logprobs, entropy, *saved = torch.ops.fastrl.kept_logprobs_fwd(
        logits, token_ids, *kept, 0.9, -100, True
    )
    grad = torch.ops.fastrl.kept_logprobs_bwd(
        g, h, logits, token_ids, *kept, logprobs, entropy, *saved, 0.9, -100
    )
    return logprobs, entropy, grad


def assert_same_bits(left, right):
    assert all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_draws_kept_sets_and_logprobs_are_as_defined(dtype, cut):
    temperature, top_k, top_p = cut
    logits, seeds = inputs(300, dtype=dtype)
    logits[1] = logits[1].round()  # many equals
    logits[2, ::2] = -torch.inf
    token_ids, logprobs, lowest, last_id = draw(logits, seeds, cut)
    scale = temperature or 1.0
    assert torch.equal(logprobs, fastrl.token_logprobs(logits, token_ids, temperature=scale))

    expected, is_kept = draw_tokens(logits, temperature, top_k, top_p, seeds, STEP)
    _, within = draw_tokens(logits, temperature, top_k, None, seeds, STEP)
    x = logits.double() / scale
    p = x.masked_fill(~within, -torch.inf).softmax(-1).sort(-1, descending=True).values
    clear = ((p.cumsum(-1) - p - (top_p or 2.0)).abs() > 1e-6).all(-1)
    assert clear.float().mean() > 0.7  # or nothing is tested
    ids, bounds = torch.ops.fastrl.kept_ids(logits, lowest, last_id)
    rows = torch.arange(300, device=DEVICE).repeat_interleave(bounds.diff().long())
    ours = torch.zeros_like(is_kept)
    ours[rows, ids] = True
    assert torch.equal(ours[clear], is_kept[clear])
    assert (ids.diff()[rows.diff() == 0] > 0).all()
    if temperature == 0:
        assert torch.equal(token_ids, expected)
        return
    p = x.masked_fill(~ours, -torch.inf).softmax(-1)
    upto = p.cumsum(-1).gather(-1, token_ids[:, None])[:, 0]
    own = p.gather(-1, token_ids[:, None])[:, 0]
    u = uniform(seeds, STEP, torch.float32).double()
    assert ((own > 0) & (upto - own - 1e-6 <= u) & (u < upto + 1e-6)).all()


def test_the_random_bits_are_those_of_the_reference():
    """id = floor(u V): with equal weights nothing is rounded."""
    _, seeds = inputs(10_000, 1)
    for step in (0, 1, 2**31, 2**32 - 1, 2**32, 2**63, 2**64 - 1):
        signed = step - 2**64 if step >= 2**63 else step
        logits = torch.full((1, 65536), -3.0, device=DEVICE).expand(10_000, -1)
        token_ids, *_ = torch.ops.fastrl.sample_tokens(logits, seeds, signed, 1.0, None, None)
        u = uniform(seeds, step, torch.float32).double()
        assert torch.equal(token_ids, (u * 65536).long())


def test_chi_square_against_the_exact_distribution():
    """200 000 draws over 12 tokens; 11 degrees of freedom, p = 1e-4 at 37.4."""
    p = torch.tensor([0.3, 0.2, 0.15, 0.1, 0.08, 0.05, 0.04, 0.03, 0.02, 0.015, 0.01, 0.005])
    n = 200_000
    logits = p.log().to(DEVICE).expand(n, 12)
    token_ids, *_ = draw(logits, torch.arange(n, device=DEVICE), CUTS[0])
    counts = torch.bincount(token_ids.cpu(), minlength=12)
    assert ((counts - n * p).square() / (n * p)).sum() < 37.4


def test_rows_without_a_distribution():
    logits, seeds = inputs(6, dtype=torch.float32)
    expected = draw(logits, seeds)
    logits[0, 3], logits[1], logits[2], logits[3, -1] = nan, -inf, nan, inf
    for cut in CUTS:
        token_ids, logprobs, lowest, last_id = draw(logits, seeds, cut)
        assert ((token_ids >= 0) & (token_ids < VOCAB)).all()
        assert logprobs[:4].isnan().all() and logprobs[4:].isfinite().all()
        _, bounds = torch.ops.fastrl.kept_ids(logits, lowest, last_id)
        assert bounds[:5].tolist() == [0] * 5
    found = draw(logits, seeds)
    assert_same_bits((x[4:] for x in found), (x[4:] for x in expected))


@pytest.mark.parametrize("vocab", [VOCAB, 65536])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_depends_neither_on_its_batch_nor_on_its_address(dtype, vocab):
    logits, seeds = inputs(400, vocab, dtype)
    for cut in CUTS:
        together = draw(logits, seeds, cut)
        for row in (1, 200, 398):
            of_row = [x[row] for x in together]
            assert_same_bits(draw(logits[row].clone(), seeds[row].clone(), cut), of_row)
            few = draw(logits[row - 1 : row + 2], seeds[row - 1 : row + 2], cut)
            assert_same_bits((x[1] for x in few), of_row)
            for shift in (1, 4):
                shifted = torch.empty(vocab + shift, dtype=dtype, device=DEVICE)[shift:]
                assert_same_bits(draw(shifted.copy_(logits[row]), seeds[row], cut), of_row)


def test_run_to_run_not_a_bit_differs():
    logits, seeds = inputs(300, 151936)
    for cut in CUTS:
        first = draw(logits, seeds, cut)
        for _ in range(3):
            assert_same_bits(draw(logits, seeds, cut), first)


def test_kept_logprobs_and_gradients_are_as_defined():
    logits, seeds = inputs(64, dtype=torch.float32)
    token_ids, _, lowest, last_id = draw(logits, seeds)
    kept = torch.ops.fastrl.kept_ids(logits, lowest, last_id)
    token_ids[3] = -100
    g, h = torch.randn(2, 64, device=DEVICE)
    found = kept_logprobs(logits, token_ids, kept, g, h)
    x = logits.double().requires_grad_()
    truth = reference.token_logprobs(x, token_ids, temperature=0.9, kept=kept, return_entropy=True)
    (grad,) = torch.autograd.grad(truth, x, (g.double(), h.double()))
    for actual, exact in zip(found, (*truth, grad), strict=True):
        torch.testing.assert_close(actual.double(), exact.detach(), rtol=1e-5, atol=1e-6)
    ids, bounds = kept
    first, end = bounds[7:9].tolist()
    alone = (ids[first:end].clone(), torch.tensor([0, end - first], device=DEVICE).int())
    of_row = kept_logprobs(
        logits[7].clone(), token_ids[7].clone(), alone, g[7].clone(), h[7].clone()
    )
    assert_same_bits(of_row, (x[7] for x in found))
    assert_same_bits(kept_logprobs(logits, token_ids, kept, g, h), found)


@pytest.mark.parametrize("cut", CUTS)
def test_nothing_waits_for_the_gpu(cut):
    logits, seeds = inputs(16)
    token_ids, _, lowest, last_id = draw(logits, seeds, cut)
    kept = torch.ops.fastrl.kept_ids(logits, lowest, last_id)  # which itself has to wait
    g, h = torch.ones(2, 16, device=DEVICE)
    kept_logprobs(logits, token_ids, kept, g, h)  # compiled before
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.cuda._sleep(A_WHILE)
        draw(logits, seeds, cut)
        kept_logprobs(logits, token_ids, kept, g, h)
        temperature, top_k, top_p = cut
        options = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
        fastrl.sample_tokens(logits, seeds=seeds, step=STEP, **options)
        assert not torch.cuda.current_stream().query()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("cut", CUTS)
def test_a_cuda_graph_replays_with_new_data(cut):
    static = inputs(16)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        draw(*static, cut)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = draw(*static, cut)
    for seed in (1, 2):
        new = inputs(16, seed=seed)
        for x, y in zip(static, new, strict=True):
            x.copy_(y)
        graph.replay()
        assert_same_bits(found, draw(*new, cut))


def test_the_current_stream_is_used():
    old, new = inputs(16, seed=1), inputs(16, seed=2)
    expected = draw(*new)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(A_WHILE)
        for x, y in zip(old, new, strict=True):
            x.copy_(y)
        found = draw(*old)
        kept = torch.ops.fastrl.kept_ids(old[0], *found[2:])
    side.synchronize()
    assert_same_bits(found, expected)
    assert_same_bits(kept, torch.ops.fastrl.kept_ids(new[0], *expected[2:]))


def test_other_rows_steps_and_cuts_compile_nothing():
    from fastrl.kernels._row_states import _token_logprobs_fwd_kernel
    from fastrl.kernels.sample_tokens import _sample_tokens_kernel

    def count():
        device = torch.cuda.current_device()
        kernels = (_sample_tokens_kernel, _token_logprobs_fwd_kernel)
        return [len(kernel.device_caches[device][0]) for kernel in kernels]

    for cut in (CUTS[0], CUTS[3]):
        draw(*inputs(5), cut)
    before = count()
    for rows, cut in zip((1, 2, 16, 33, 1024), CUTS, strict=True):
        logits, seeds = inputs(rows)
        for step in (0, 1, 16, -1):
            torch.ops.fastrl.sample_tokens(logits, seeds, step, *cut)
    logits, seeds = inputs(5 * 7)
    draw(logits.unflatten(0, (5, 7))[:, :-1], seeds.unflatten(0, (5, 7))[:, :-1])
    assert count() == before and all(before)


def test_more_entries_than_an_int32_counts():
    if torch.cuda.mem_get_info()[0] < 12 * 2**30:
        pytest.skip("needs 12 GiB of free memory")
    logits = torch.randn(16384, 151936, dtype=torch.bfloat16, device=DEVICE)
    seeds = torch.arange(16384, device=DEVICE)
    assert logits.numel() > 2**31
    found = draw(logits, seeds)
    kept = torch.ops.fastrl.kept_ids(logits, *found[2:])
    for row in (0, 2**31 // 151936, 16383):
        assert_same_bits(draw(logits[row].clone(), seeds[row]), [x[row] for x in found])
        first, end = kept[1][row : row + 2].tolist()
        mine, _ = torch.ops.fastrl.kept_ids(logits[row].clone(), found[2][row], found[3][row])
        assert torch.equal(kept[0][first:end], mine)
