import math

import pytest
import torch
from draws import CUTS, assert_draws_agree, expected_of
from torch import library

import fastrl
from fastrl import reference
from fastrl.reference._philox import uniform


def test_draws_of_many_seeds_and_steps(any_kernel):
    """Both words of the seed and of the step count, signs included."""
    logits = torch.randn(40, device=any_kernel).expand(4096, 40)
    seeds = torch.randint(-(2**63), 2**63 - 1, (4096,), device=any_kernel)
    drawn = []
    for step in (0, 2**32 - 1, 2**32, 2**63, 2**64 - 1):
        token_ids, _ = fastrl.sample_tokens(logits, seeds=seeds, step=step)
        expected = expected_of(logits, seeds, step=step)
        assert_draws_agree(token_ids, *expected, logits, seeds, step=step)
        drawn.append(token_ids)
    assert all((a != drawn[0]).float().mean() > 0.8 for a in drawn[1:])


def test_the_ends_of_u(any_kernel):
    """u = 0 and u = 1 - 2^-24: the first and the last id that has a probability, in any chunk."""
    logits = torch.full((2, 70001), -math.inf, device=any_kernel)
    logits[:, 7:40000] = -100.0  # e^-100 is 0 in float32
    logits[:, 40000:60000] = 0.0
    seeds = torch.tensor([12121362, 16390493], device=any_kernel)
    assert uniform(seeds, 0, torch.float32).tolist() == [0.0, 1 - 2.0**-24]
    for cut in CUTS:
        token_ids, _, kept = fastrl.sample_tokens(logits, seeds=seeds, return_kept=True, **cut)
        assert token_ids.tolist() == [40000, kept[0].max().item()]
    logits[:, 8:] = -math.inf  # id 7 and this one are kept, and one of them cannot be drawn
    logits[:, 7], logits[:, 500] = -800.0, 0.0
    assert fastrl.sample_tokens(logits, seeds=seeds, top_k=2)[0].tolist() == [500, 500]


def test_the_last_id_is_drawn_where_rounding_leaves_u_above_the_sum(any_kernel):
    """Of u = 1 - 2^-24 the masses, added up one by one, fall short in some of these rows."""
    logits = torch.randn(64, 5000, device=any_kernel)
    logits[:, 4990:] = -math.inf
    token_ids, _ = fastrl.sample_tokens(
        logits, seeds=torch.full((64,), 16390493, device=any_kernel)
    )
    assert token_ids.tolist() == [4989] * 64


@pytest.mark.parametrize("offset", [1e4, -1e4])
def test_offsets(any_kernel, offset):
    logits = torch.randn(32, 5000, device=any_kernel) + offset
    seeds = torch.arange(32, device=any_kernel)
    for cut in CUTS:
        token_ids, _ = fastrl.sample_tokens(logits, seeds=seeds, **cut)
        assert_draws_agree(token_ids, *expected_of(logits, seeds, **cut), logits, seeds)


@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_rows_without_a_distribution(any_kernel, cut):
    logits = torch.randn(6, 40000, device=any_kernel)
    logits[0, 3], logits[1, 39999], logits[2] = math.nan, math.inf, -math.inf
    logits[3], logits[4, :33000] = math.nan, -math.inf
    logits[4, 7] = math.nan
    for temperature in (0, 1.0):
        options = {"temperature": temperature, "seeds": torch.arange(6, device=any_kernel)} | cut
        token_ids, logprobs, (ids, bounds) = fastrl.sample_tokens(
            logits, return_kept=True, **options
        )
        assert ((token_ids >= 0) & (token_ids < 40000)).all()
        for x in (logprobs, fastrl.sample_tokens(logits, **options)[1]):
            assert x.isnan().tolist() == [True] * 5 + [False]
        assert bounds[5] == 0 and token_ids[5] in ids


def test_threads_and_strides_do_not_change_a_draw(device):
    base = torch.randn(3, 4, 70001, device=device)
    seeds = torch.arange(9, device=device).view(3, 3)
    view = base[:, 1:]
    threads = torch.get_num_threads()
    for cut in CUTS:
        expected = fastrl.sample_tokens(view.contiguous(), seeds=seeds, return_kept=True, **cut)
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            actual = fastrl.sample_tokens(view, seeds=seeds, return_kept=True, **cut)
            alone = fastrl.sample_tokens(view[1, 2], seeds=seeds[1, 2], **cut)
            torch.set_num_threads(threads)
            assert torch.equal(actual[0], expected[0]) and torch.equal(actual[1], expected[1])
            assert torch.equal(actual[2][0], expected[2][0])
            assert alone[0] == expected[0][1, 2]
    columns = base[0, :, ::3]
    ours = fastrl.sample_tokens(columns, seeds=seeds.new_ones(4))
    copied = fastrl.sample_tokens(columns.contiguous(), seeds=seeds.new_ones(4))
    assert torch.equal(ours[0], copied[0]) and torch.equal(ours[1], copied[1])


def test_without_seeds_torch_gives_them_as_to_the_reference(device):
    logits = torch.randn(2, 5, 300, device=device)
    drawn = []
    for function in (fastrl.sample_tokens, reference.sample_tokens):
        torch.manual_seed(11)
        drawn.append([function(logits, temperature=t)[0] for t in (1.0, 0, 1.0)])
    for ours, expected in zip(*drawn, strict=True):
        assert torch.equal(ours, expected)
    assert not torch.equal(drawn[0][0], drawn[0][2])


def test_draws_are_those_of_the_reference_and_logprobs_those_of_token_logprobs(device):
    logits = torch.randn(2, 5, 40, device=device)
    seeds = torch.arange(10, device=device).view(2, 5)
    token_ids, logprobs = fastrl.sample_tokens(logits, seeds=seeds, step=3, temperature=0.7)
    expected, _ = reference.sample_tokens(logits, seeds=seeds, step=3, temperature=0.7)
    assert torch.equal(token_ids, expected)
    assert torch.equal(logprobs, fastrl.token_logprobs(logits, token_ids, temperature=0.7))


def test_with_kept_the_logprobs_are_those_of_what_was_drawn_from(device):
    logits = torch.randn(6, 30, device=device)
    token_ids, logprobs, kept = fastrl.sample_tokens(logits, top_k=5, top_p=0.9, return_kept=True)
    assert torch.equal(logprobs, fastrl.token_logprobs(logits, token_ids, kept=kept))
    ids, bounds = kept
    for row in range(6):
        mine = ids[bounds[row] : bounds[row + 1]]
        assert token_ids[row] in mine and len(mine) <= 5
        assert torch.equal(mine, mine.sort().values)
        expected = logits[row, token_ids[row]] - logits[row, mine].logsumexp(0)
        torch.testing.assert_close(logprobs[row], expected)


def test_a_row_draws_the_same_in_any_batch(device):
    logits, seeds = torch.randn(9, 50, device=device), torch.arange(9, device=device) * 7
    together = fastrl.sample_tokens(logits, seeds=seeds, step=2)
    order = torch.randperm(9)
    shuffled = fastrl.sample_tokens(logits[order], seeds=seeds[order], step=2)
    for a, b in zip(together, shuffled, strict=True):
        assert torch.equal(a[order], b)
    alone = fastrl.sample_tokens(logits[4], seeds=seeds[4], step=2)
    assert alone[0] == together[0][4] and alone[1] == together[1][4]


def test_chi_square_against_the_exact_distribution(device):
    """20 000 draws over 12 tokens; 11 degrees of freedom, p = 1e-4 at 37.4."""
    p = torch.tensor([0.3, 0.2, 0.15, 0.1, 0.08, 0.05, 0.04, 0.03, 0.02, 0.015, 0.01, 0.005])
    n = 20_000
    logits = p.log().to(device).expand(n, 12)
    token_ids, _ = fastrl.sample_tokens(logits, seeds=torch.arange(n, device=device))
    counts = torch.bincount(token_ids.cpu(), minlength=12)
    assert ((counts - n * p).square() / (n * p)).sum() < 37.4


def test_greedy_and_excluded_tokens(device):
    logits = torch.tensor([[1.0, 3.0, 3.0], [-math.inf, 0.0, -math.inf]], device=device)
    token_ids, logprobs = fastrl.sample_tokens(logits, temperature=0)
    assert token_ids.tolist() == [1, 1]
    assert torch.equal(logprobs, fastrl.token_logprobs(logits, token_ids))
    for step in range(50):
        assert fastrl.sample_tokens(logits[1:], step=step)[0].item() == 1


def test_empty_batch(device):
    token_ids, logprobs = fastrl.sample_tokens(torch.randn(0, 5, device=device))
    assert token_ids.shape == logprobs.shape == (0,)


@pytest.mark.parametrize("cut", [(None, None), (5, 0.8)])
def test_opcheck(device, cut):
    logits = torch.randn(3, 4, 300, device=device)
    seeds = torch.arange(12, device=device).view(3, 4)
    arguments = (logits, seeds, 3, 0.9, *cut)
    library.opcheck(torch.ops.fastrl.sample_tokens.default, arguments)
    _, _, lowest, last_id = torch.ops.fastrl.sample_tokens(*arguments)
    library.opcheck(torch.ops.fastrl.kept_ids.default, (logits, lowest, last_id))


def test_compiles_without_a_break(device):
    def draw(logits, seeds):
        return fastrl.sample_tokens(logits * 2.0, seeds=seeds, step=4, top_k=7)

    logits, seeds = torch.randn(3, 40, device=device), torch.arange(3, device=device)
    compiled = torch.compile(draw, fullgraph=True, backend="aot_eager")
    for ours, eager in zip(compiled(logits, seeds), draw(logits, seeds), strict=True):
        assert torch.equal(ours, eager)


BAD = [
    ({"logits": torch.zeros(2, 3).double()}, TypeError, "got torch.float64"),
    ({"logits": torch.zeros(2, 0)}, ValueError, "V >= 1"),
    ({"temperature": -1.0}, ValueError, "temperature in"),
    ({"temperature": math.nan}, ValueError, "temperature in"),
    ({"top_k": 0}, ValueError, "top_k >= 1, got 0"),
    ({"top_k": 2.0}, TypeError, "top_k as an int"),
    ({"top_p": 0.0}, ValueError, "top_p > 0"),
    ({"top_p": 1.1}, ValueError, r"top_p in \[0, 1\]"),
    ({"seeds": torch.zeros(3, dtype=torch.int64)}, ValueError, r"seeds \(2,\), got \(3,\)"),
    ({"seeds": torch.zeros(2)}, TypeError, "seeds of dtype int64"),
    ({"step": -1}, ValueError, "step >= 0"),
    ({"step": 2**64}, ValueError, r"step < 2\^64"),
]


@pytest.mark.parametrize("arguments, error, message", BAD)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message) as caught:
        fastrl.sample_tokens(**({"logits": torch.zeros(2, 3)} | arguments))
    assert str(caught.value).startswith("sample_tokens: expected ")
