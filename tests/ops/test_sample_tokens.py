import math

import pytest
import torch

import fastrl
from fastrl import reference


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
]


@pytest.mark.parametrize("arguments, error, message", BAD)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message) as caught:
        fastrl.sample_tokens(**({"logits": torch.zeros(2, 3)} | arguments))
    assert str(caught.value).startswith("sample_tokens: expected ")
