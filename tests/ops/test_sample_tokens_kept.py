"""Which ids top_k and top_p keep, exactly, and the draws among them."""

import math
from functools import cache

import pytest
import torch
from draws import CUTS, assert_draws_agree, assert_kept_agree, expected_of

import fastrl

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
# One column; a pair; odd and prime; blocks of 256 and their neighbours; two and three stretches of
# the vocabulary, with a tail.
VOCABULARIES = [1, 2, 31, 40, 2048, 4097, 33000, 70001]
SEEDS = torch.arange(24) * 7919 - 80


@cache
def case(vocab, dtype):
    """Logits, and the options and what they give; all SIMD levels share it."""
    logits = (2 * torch.randn(24 if vocab < 10_000 else 8, vocab)).to(dtype)
    options = [{"step": i, "temperature": 0.9} | cut for i, cut in enumerate(CUTS)]
    seeds = SEEDS[: len(logits)]
    return logits, seeds, [(o, expected_of(logits, seeds, **o)) for o in options]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("vocab", VOCABULARIES)
def test_draws_and_kept_sets_over_vocabularies(any_kernel, dtype, vocab):
    """16-bit logits are full of ties, at the boundaries too."""
    logits, seeds, cases = case(vocab, dtype)
    x, s = logits.to(any_kernel), seeds.to(any_kernel)
    for options, expected in cases:
        token_ids, logprobs, kept = fastrl.sample_tokens(x, seeds=s, return_kept=True, **options)
        assert_draws_agree(token_ids.cpu(), *expected, logits, seeds, **options)
        assert_kept_agree(tuple(k.cpu() for k in kept), expected[1], logits, **options)
        again, whole = fastrl.sample_tokens(x, seeds=s, **options)
        assert torch.equal(again, token_ids)
        assert torch.equal(whole, fastrl.token_logprobs(x, token_ids, temperature=0.9))
        assert torch.equal(
            logprobs, fastrl.token_logprobs(x, token_ids, temperature=0.9, kept=kept)
        )


def flat(vocab):
    return torch.full((3, vocab), 1.5)


def mostly_excluded(vocab):
    logits = torch.full((3, vocab), -math.inf)
    logits[0, 5], logits[1, vocab - 9 :], logits[2, ::3] = 2.0, 0.0, torch.randn(1)
    return logits


def steps(vocab):
    return (torch.arange(vocab) % 5).float().expand(3, vocab)


@pytest.mark.parametrize("logits_of", [flat, mostly_excluded, steps])
@pytest.mark.parametrize("vocab", [40, 4096, 70001])
def test_of_equals_the_lowest_ids_are_kept(any_kernel, logits_of, vocab):
    logits, seeds = logits_of(vocab).to(any_kernel), torch.arange(3, device=any_kernel)
    for cut in (*CUTS, {"top_k": vocab // 2 + 1}, {"top_k": vocab - 1, "top_p": 0.70313},
                {"top_p": 0.31}, {"top_k": 8, "top_p": 0.31}):  # fmt: skip
        options = {"seeds": seeds, "return_kept": True} | cut
        token_ids, _, kept = fastrl.sample_tokens(logits, **options)
        expected = expected_of(logits, seeds, **cut)
        assert_kept_agree(kept, expected[1], logits, **cut)
        assert_draws_agree(token_ids, *expected, logits, seeds)


def test_top_p_is_exact_where_its_boundary_falls_between_equals(any_kernel):
    """Half of 2^k equals is half of their mass, to the bit."""
    for vocab in (16, 4096, 65536):
        logits = torch.zeros(2, vocab, device=any_kernel)
        for top_k in (None, vocab // 4):
            _, _, (ids, bounds) = fastrl.sample_tokens(
                logits, top_k=top_k, top_p=0.5, return_kept=True
            )
            half = (top_k or vocab) // 2
            assert bounds.tolist() == [0, half, 2 * half]
            assert torch.equal(ids, torch.arange(half, device=any_kernel).repeat(2))


@pytest.mark.parametrize("temperature", [1e-40, 0.01, 100.0, 1e30])
@pytest.mark.parametrize("vocab", [40, 4097, 33000])
def test_temperatures_without_a_measure(any_kernel, temperature, vocab):
    """All of a row in the first bin of the histogram, or all but the maximum in the last."""
    # Multiples of 1/64: dividing by the temperature makes no new ties, in float32.
    logits = (torch.randint(-512, 512, (8, vocab)) / 64).to(any_kernel)
    seeds = torch.arange(8, device=any_kernel)
    for cut in CUTS:
        options = {"seeds": seeds, "temperature": temperature} | cut
        token_ids, logprobs, kept = fastrl.sample_tokens(logits, return_kept=True, **options)
        assert logprobs.isfinite().all()
        if 1e-3 < temperature < 1e3:
            expected = expected_of(logits, **options)
            assert_draws_agree(token_ids, *expected, logits, **options)
            assert_kept_agree(kept, expected[1], logits, **options)
        elif temperature < 1:
            assert torch.equal(logits.gather(-1, token_ids[:, None])[:, 0], logits.amax(-1))


def test_chi_square_with_top_k_and_top_p(device):
    """Of these 12, top_k leaves the first 8, and top_p = 0.9 of their 0.955 the first 6."""
    p = torch.tensor([0.3, 0.2, 0.15, 0.1, 0.08, 0.05, 0.04, 0.035, 0.02, 0.013, 0.008, 0.004])
    n, order = 20_000, torch.randperm(12)
    logits = p[order].log().to(device).expand(n, 12)
    seeds = torch.arange(n, device=device)
    token_ids, _ = fastrl.sample_tokens(logits, seeds=seeds, top_k=8, top_p=0.9)
    counts = torch.zeros(12).scatter_add_(0, order[token_ids.cpu()], torch.ones(n))
    expected = n * p[:6] / p[:6].sum()
    assert counts[6:].sum() == 0
    assert ((counts[:6] - expected).square() / expected).sum() < 25.7  # 5 degrees, p = 1e-4


def test_kept_ids_of_any_pair(any_kernel):
    """Also pairs that sampling does not give, and ids beyond the row."""
    logits = torch.tensor([0.0, 2.0, -math.inf, 1.0, math.nan, 1.0, 1.0]).to(any_kernel)
    lowest = torch.tensor([1.0, 1.0, 1.0, -math.inf, -math.inf, 3.0, math.nan, 1.5, 1.0])
    last_id = torch.tensor([5, -1, 2**40, -1, 2**40, 6, 6, 2**40, -(2**63)])
    expected = [[1, 3, 5], [1], [1, 3, 5, 6], [0, 1, 3, 5, 6], [0, 1, 3, 5, 6], [], [], [1], [1]]
    for padding in (0, 300):  # columns before them
        row = torch.full((padding + 7,), -math.inf, device=any_kernel)
        row[padding:] = logits
        limits = last_id.where(last_id < 0, last_id + padding)
        ids, bounds = torch.ops.fastrl.kept_ids(
            row.expand(9, -1), lowest.to(any_kernel), limits.to(any_kernel)
        )
        assert bounds.dtype == torch.int32 and bounds.tolist() == [
            0, *torch.tensor([len(e) for e in expected]).cumsum(0).tolist(),
        ]  # fmt: skip
        assert ids.tolist() == [padding + i for e in expected for i in e]
