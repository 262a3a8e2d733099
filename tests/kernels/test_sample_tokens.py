"""The launchers in Triton's interpreter against the definition; see test_token_logprobs.py."""

import math

import pytest
import torch

from fastrl.reference._philox import uniform
from fastrl.reference.sample_tokens import draw_tokens
from fastrl.reference.sample_tokens import kept_ids as kept_ids_of

MODULE = "fastrl.kernels.sample_tokens"
FLOATS = [torch.float32, torch.float16, torch.bfloat16]
CHUNK = 32768  # columns of a stretch; a test below holds it against the kernel's own
# One column; two; a warp and its neighbour; the block that truncates and its neighbours; more of
# either block; two stretches, the second of less than a block.
VOCABULARIES = [1, 2, 33, 1023, 1025, 4097, CHUNK + 500]
STEP = 2**40 + 3


@pytest.fixture
def draw(interpreted):
    def run(logits, seeds, *, step=STEP, temperature=1.0, top_k=None, top_p=None):
        return interpreted(MODULE, "sample_tokens", logits, seeds, step, temperature, top_k, top_p)

    return run


def kept_of(logits, lowest, last_id):
    """[..., V] bool: what the two numbers say is kept."""
    x, j = logits.float(), torch.arange(logits.shape[-1])
    lowest, last_id = lowest[..., None], last_id[..., None]
    return (x > lowest) | ((x == lowest) & (j <= last_id) & (x > -math.inf))


def scaled_by(logits, temperature):
    return logits.double() / (temperature or 1.0)


def assert_kept_as_defined(logits, kept, *, temperature=1.0, top_k=None, top_p=None):
    """Equal to the reference, in rows where no rounding decides which side of top_p an id is on."""
    _, expected = draw_tokens(logits, temperature, top_k, top_p, None, 0)
    if top_p is not None:
        x = scaled_by(logits, temperature)
        _, within = draw_tokens(logits, temperature, top_k, None, None, 0)
        p = x.masked_fill(~within, -math.inf).softmax(-1).sort(-1, descending=True).values
        clear = ((p.cumsum(-1) - p - top_p).abs() > 1e-6).all(-1)
        assert clear.float().mean() > 0.7  # or nothing is tested
        kept, expected = kept[clear], expected[clear]
    assert torch.equal(kept, expected)


def assert_drawn_as_defined(logits, kept, token_ids, seeds, *, temperature=1.0, step=STEP):
    """u lies in the token's interval of cumulative probability, give or take 1e-6."""
    x = scaled_by(logits, temperature).masked_fill(~kept, -math.inf)
    p = x.softmax(-1)
    upto = p.cumsum(-1).gather(-1, token_ids[:, None])[:, 0]
    own = p.gather(-1, token_ids[:, None])[:, 0]
    u = uniform(seeds, step, torch.float32).double()
    assert (own > 0).all()
    assert ((upto - own - 1e-6 <= u) & (u < upto + 1e-6)).all()


def rows_of(vocab, dtype):
    logits = 3 * torch.randn(4, vocab)
    logits[1] = (logits[1] / 2).round()  # few values, each many times
    logits[2, torch.randperm(vocab)[: vocab // 2]] = -math.inf
    logits[3] = 2.0
    rows = 4 if vocab < CHUNK else 1
    return logits[:rows].to(dtype), torch.randint(-(2**63), 2**63 - 1, (rows,))


# Passes over a row take the interpreter a second, and in float32 there are twice as many.
WHOLE, CUT = {"temperature": 0.7}, {"temperature": 1.3, "top_k": 23, "top_p": 0.9}
CASES = [(WHOLE, dtype, vocab) for dtype in FLOATS for vocab in VOCABULARIES]
CASES += [(CUT, dtype, vocab) for dtype in FLOATS[1:] for vocab in VOCABULARIES]
CASES += [(CUT, torch.float32, 33), (CUT, torch.float32, 1025)]


@pytest.mark.parametrize("setting, dtype, vocab", CASES)
def test_draws_kept_sets_and_logprobs(draw, interpreted, setting, dtype, vocab):
    logits, seeds = rows_of(vocab, dtype)
    token_ids, logprobs, lowest, last_id = draw(logits, seeds, **setting)
    kept = kept_of(logits, lowest, last_id)
    assert_kept_as_defined(logits, kept, **setting)
    temperature = setting["temperature"]
    assert_drawn_as_defined(logits, kept, token_ids, seeds, temperature=temperature)
    arguments = (logits, token_ids, temperature, -100, False, False)
    expected, *_ = interpreted("fastrl.kernels.token_logprobs", "token_logprobs_fwd", *arguments)
    assert torch.equal(logprobs, expected)


@pytest.mark.parametrize(
    "cut, dtype",
    [
        ({"top_k": 700}, torch.float16),
        ({"top_p": 0.61}, torch.float32),
        ({"top_k": 900, "top_p": 0.97}, torch.float16),
    ],
)
def test_ties_at_the_bound_go_to_the_lowest_ids(draw, cut, dtype):
    """Few values: hundreds of equals, in several blocks, of which some are kept."""
    logits = torch.randint(-2, 3, (4, 2100)).to(dtype) / 2
    logits[1] = -0.5
    logits[2, ::2] = -math.inf
    logits[3, 0], logits[3, 1:] = 9.0, torch.randint(-1, 1, (2099,)).to(dtype)
    seeds = torch.arange(4)
    token_ids, _, lowest, last_id = draw(logits, seeds, **cut)
    kept = kept_of(logits, lowest, last_id)
    assert_kept_as_defined(logits, kept, **cut)
    assert_drawn_as_defined(logits, kept, token_ids, seeds)
    at_bound = logits.float() == lowest[:, None]
    assert (at_bound & kept).any(1).all() and (at_bound & ~kept).any(1)[:2].all()


def test_zeros_of_both_signs_are_equals(draw):
    logits = torch.tensor([[-0.0, 0.0, -0.0, 0.0, 1.0], [0.0, -0.0, 0.0, -0.0, 1.0]])
    for dtype in FLOATS:
        _, _, lowest, last_id = draw(logits.to(dtype), torch.arange(2), top_k=3)
        assert kept_of(logits, lowest, last_id).int().tolist() == [[1, 1, 0, 0, 1]] * 2
        _, _, lowest, last_id = draw(logits[:, :4].to(dtype), torch.arange(2), top_p=0.7)
        assert kept_of(logits[:, :4], lowest, last_id).int().tolist() == [[1, 1, 1, 0]] * 2


def test_a_stretch_of_next_to_no_weight_is_not_drawn(draw):
    """u = 0 and u = 1 - 2^-24; e^-100 is subnormal in float32, on a GPU as well."""
    logits, seeds = torch.full((2, CHUNK + 500), -100.0), torch.tensor([12121362, 16390493])
    logits[:, CHUNK + 3 : CHUNK + 9] = 0.0
    assert uniform(seeds, 0, torch.float32).tolist() == [0.0, 1 - 2.0**-24]
    token_ids, *_ = draw(logits, seeds, step=0)
    assert token_ids.tolist() == [CHUNK + 3, CHUNK + 8]


def test_cuts_that_keep_all_or_one(draw):
    logits, seeds = torch.randn(3, 70).half(), torch.arange(3)
    logits[1, 3:] = -math.inf  # fewer than top_k
    every = draw(logits, seeds)
    assert (every[2] == -math.inf).all() and (every[3] == -1).all()
    for cut in ({"top_k": 2**40}, {"top_p": 1.0}, {"top_k": 70, "top_p": 1.0}):
        assert all(
            torch.equal(a, b) for a, b in zip(draw(logits, seeds, **cut), every, strict=True)
        )
    token_ids, _, lowest, last_id = draw(logits, seeds, top_k=69)
    assert kept_of(logits, lowest, last_id).sum(1).tolist() == [69, 3, 69]
    for cut in ({"top_k": 1}, {"top_p": 1e-9}, {"top_k": 5, "top_p": 1e-3}):
        token_ids, _, lowest, last_id = draw(logits, seeds, **cut)
        assert torch.equal(token_ids, logits.argmax(1))
        assert (kept_of(logits, lowest, last_id).sum(1) == 1).all()


def test_greedy_takes_the_lowest_of_equals(draw):
    logits = torch.randn(3, CHUNK + 300)
    logits[0, [7000, 7001, CHUNK + 5]] = 9.0
    logits[1, [CHUNK + 2, CHUNK + 299]] = 9.0
    logits[2, 0] = 9.0
    token_ids, logprobs, *_ = draw(logits, torch.arange(3), temperature=0)
    assert token_ids.tolist() == [7000, CHUNK + 2, 0]
    expected = logits.double().log_softmax(1).gather(1, token_ids[:, None])[:, 0]
    torch.testing.assert_close(logprobs.double(), expected, rtol=1e-6, atol=1e-6)


def test_greedy_with_cuts_keeps_as_at_temperature_1(draw):
    logits, cut = torch.randn(2, 1100).half(), {"top_k": 20, "top_p": 0.9}
    logits[0, [700, 1050]] = 9.0
    token_ids, _, *kept = draw(logits, torch.arange(2), temperature=0, **cut)
    assert token_ids.tolist() == [700, logits[1].argmax()]
    at_1 = draw(logits, torch.arange(2), temperature=1, **cut)
    assert all(torch.equal(a, b) for a, b in zip(kept, at_1[2:], strict=True))


def test_the_random_bits_are_those_of_the_reference(interpreted):
    seeds = torch.tensor([0, 1, -1, 2**32, -(2**32), 2**63 - 1, -(2**63), 88172645463325252])
    for step in (0, 1, 2**32 - 1, 2**32, 2**63 - 1, 2**63, 2**64 - 1):
        signed = step - 2**64 if step >= 2**63 else step
        bits = interpreted("sampling_probe", "probe", seeds, signed)
        assert torch.equal(bits.float() * 2.0**-24, uniform(seeds, step, torch.float32))


@pytest.mark.parametrize("vocab, top_k", [(4096, None), (3 * CHUNK, None), (1500, 1000)])
def test_equal_weights_are_cut_exactly(draw, vocab, top_k):
    """id = floor(u k): nothing is rounded, so there is no tolerance."""
    seeds = torch.arange(4) * 77
    token_ids, *_ = draw(torch.full((4, vocab), -3.0).half(), seeds, top_k=top_k)
    u = uniform(seeds, STEP, torch.float32).double()
    assert torch.equal(token_ids, (u * (top_k or vocab)).long())


def test_the_low_bits_of_the_total_count(draw):
    """u = 1 - 2^-24 falls on the last of many that weigh 2^-17 each."""
    logits = torch.full((1, 1001), -17 * math.log(2.0))
    logits[0, 0], logits[0, 1000] = 0.0, -30.0
    token_ids, *_ = draw(logits, torch.tensor([1499961]), top_k=1000)
    assert token_ids.tolist() == [999]


def test_chi_square_against_the_exact_distribution(draw):
    """100 draws over 4 tokens; 3 degrees of freedom, p = 1e-4 at 21.1."""
    p, n = torch.tensor([0.4, 0.3, 0.2, 0.1]), 100
    token_ids, *_ = draw(p.log().expand(n, 4), torch.arange(n))
    counts = torch.bincount(token_ids, minlength=4)
    assert ((counts - n * p).square() / (n * p)).sum() < 21.1


def test_stretches_of_different_weight(draw):
    """One may weigh nothing beside another, or lie 1e4 below it, or hold no number."""
    logits = torch.randn(6, 2 * CHUNK)
    logits[0, :CHUNK] -= 1e4
    logits[1, CHUNK:] = -math.inf
    logits[2, :CHUNK] = torch.finfo(torch.float32).min
    logits[3:, :CHUNK] -= 0.5
    seeds = torch.arange(6)
    token_ids, _, lowest, last_id = draw(logits, seeds)
    kept = kept_of(logits, lowest, last_id)
    assert_drawn_as_defined(logits, kept, token_ids, seeds)
    in_second = (token_ids >= CHUNK).tolist()
    assert in_second[:3] == [True, False, True] and {*in_second[3:]} == {True, False}


def test_where_rounding_leaves_nothing_beyond_u_the_last_id_is_drawn(draw):
    """u = 1 - 2^-24, and a total that float32 rounds up by more than that."""
    logits, seeds = torch.full((1, CHUNK), -2.98064), torch.tensor([1499961])
    logits[0, 0] = 0.0
    assert uniform(seeds, STEP, torch.float32) == 1 - 2.0**-24
    token_ids, *_ = draw(logits, seeds)
    assert token_ids.tolist() == [CHUNK - 1]
    logits[:], logits[0, 0], logits[0, -5:] = -2.98212, 0.0, -1e4  # the last ones weigh nothing
    token_ids, *_ = draw(logits, seeds)
    assert token_ids.tolist() == [CHUNK - 6]


def test_u_at_the_bound_of_two_stretches_falls_into_the_second(draw):
    seeds = torch.tensor([574261])
    assert uniform(seeds, STEP, torch.float32) == 0.5
    token_ids, *_ = draw(torch.zeros(1, 2 * CHUNK), seeds)
    assert token_ids.tolist() == [CHUNK]


@pytest.mark.parametrize("cut", [{}, {"top_k": 3}, {"top_p": 0.5}])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rows_without_a_distribution(draw, cut, temperature):
    logits = torch.randn(5, 1100)
    logits[0, 3], logits[1], logits[2], logits[3, 1050] = math.nan, -math.inf, math.nan, math.inf
    seeds = torch.arange(5)
    token_ids, logprobs, lowest, last_id = draw(logits, seeds, temperature=temperature, **cut)
    assert ((token_ids >= 0) & (token_ids < 1100)).all()
    assert logprobs[:4].isnan().all() and logprobs[4].isfinite()
    assert not kept_of(logits, lowest, last_id)[:4].any()
    alone = draw(logits[4:].clone(), seeds[4:], temperature=temperature, **cut)
    assert torch.equal(alone[0], token_ids[4:]) and torch.equal(alone[1], logprobs[4:])


@pytest.mark.parametrize("cut", [{}, {"top_k": 50, "top_p": 0.9}])
def test_a_row_depends_neither_on_its_batch_nor_on_its_strides(draw, cut):
    base, seeds = torch.randn(2, 3, 1200).half(), torch.randint(2**60, (2, 2))
    logits = base[:, :-1, 3:1103]
    together = draw(logits, seeds, **cut)
    assert all(x.shape == (2, 2) for x in together)
    for other in (logits.contiguous(), logits.flatten(0, 1)):
        of_other = seeds.t().contiguous().t() if other.dim() == 3 else seeds.flatten()  # strided
        found = draw(other, of_other, **cut)
        assert all(
            torch.equal(a.flatten(), b.flatten()) for a, b in zip(found, together, strict=True)
        )
    alone = draw(logits[1, 1], seeds[1, 1], **cut)  # no leading axis at all
    assert all(torch.equal(a, b[1, 1]) for a, b in zip(alone, together, strict=True))


@pytest.mark.parametrize("temperature", [1e-3, 50.0])
def test_temperatures_far_from_one(draw, temperature):
    logits, seeds = torch.randn(3, 300) + 1e3, torch.arange(3)
    cut = {"temperature": temperature, "top_p": 0.8}
    token_ids, logprobs, lowest, last_id = draw(logits, seeds, **cut)
    kept = kept_of(logits, lowest, last_id)
    assert_kept_as_defined(logits, kept, **cut)
    assert_drawn_as_defined(logits, kept, token_ids, seeds, temperature=temperature)
    assert logprobs.isfinite().all()


def test_kept_ids_are_written_in_order(interpreted):
    logits = torch.randn(5, CHUNK + 4000)
    logits[0, ::3] = 0.5
    logits[3] = 0.0
    logits[3, [5, 9000, CHUNK - 1, CHUNK + 3999]] = 3.0
    logits[4] = -math.inf
    lowest = torch.tensor([0.5, -math.inf, math.nan, 2.5, -math.inf])
    last_id = torch.tensor([CHUNK + 300, -1, -1, -1, -1])
    ids, cu_seqlens = interpreted(MODULE, "kept_ids", logits, lowest, last_id)
    expected = kept_ids_of(kept_of(logits, lowest, last_id))
    assert torch.equal(ids, expected[0]) and torch.equal(cu_seqlens, expected[1])
    assert ids.dtype == torch.int64 and cu_seqlens.dtype == torch.int32
    assert cu_seqlens.diff().tolist()[2::2] == [0, 0] and len(ids) > CHUNK


@pytest.mark.parametrize("shape", [(0,), (2, 0)])
def test_empty_batches(draw, interpreted, shape):
    logits, seeds = torch.empty(*shape, 5), torch.empty(shape, dtype=torch.int64)
    out = draw(logits, seeds, top_k=2)
    assert [x.shape for x in out] == [shape] * 4
    ids, cu_seqlens = interpreted(MODULE, "kept_ids", logits, out[2], out[3])
    assert ids.shape == (0,) and cu_seqlens.tolist() == [0]


def test_what_changes_from_step_to_step_makes_no_new_kernel():
    pytest.importorskip("triton")
    from ahead_of_time import record

    from fastrl.kernels.sample_tokens import kept_ids, sample_tokens

    keys = set()
    shapes = [(3, 1000), (16, 1000), (1, 1000), (1000,), (2, 5, 1000)]
    settings = [(0, 1.0, 5, None), (1, 0.5, 16, 0.5), (-1, 0, 1, 0.9), (2**40, 2, None, 0.1)]
    for i, shape in enumerate(shapes):
        logits, seeds = torch.empty(shape), torch.empty(shape[:-1], dtype=torch.int64)
        requests = record(90, sample_tokens, logits, seeds, *settings[i % 4])
        requests += record(90, kept_ids, logits, torch.empty(shape[:-1]), seeds)
        keys.add(tuple(request.key for request in requests))
    assert len(keys) == 1


def test_the_sizes_above_are_the_kernels():
    kernels = pytest.importorskip(MODULE)
    assert kernels.CHUNK == CHUNK
    assert (kernels.DRAW["BLOCK_V"], kernels.TRUNCATE_AND_DRAW["BLOCK_V"]) == (2048, 1024)
