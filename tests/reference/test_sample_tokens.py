import math

import pytest
import torch

from fastrl.reference import sample_tokens, token_logprobs
from fastrl.reference._philox import uniform

INF = float("inf")


def test_inverse_cumulative_distribution():
    """The drawn id is the first whose cumulative probability exceeds u."""
    p = torch.tensor([0.25, 0.0, 0.5, 0.25])
    seeds = torch.arange(2000)
    token_ids, logprobs = sample_tokens(p.log().expand(2000, 4), seeds=seeds, step=7)
    u = uniform(seeds, 7, torch.float32)
    expected = torch.where(u < 0.25, 0, torch.where(u < 0.75, 2, 3))
    assert (token_ids == expected).all()
    torch.testing.assert_close(logprobs, p.log()[token_ids])
    assert {0, 2, 3} == set(token_ids.tolist())


def test_a_cumulative_probability_equal_to_u_does_not_exceed_it():
    seeds = torch.arange(60_000)
    place = uniform(seeds, 0, torch.float32) * 4096
    on_bound = place == place.floor()  # among 4096 equal tokens, whose sums are exact
    seeds, place = seeds[on_bound], place[on_bound]
    assert len(seeds) > 5
    token_ids, _ = sample_tokens(torch.zeros(len(seeds), 4096), seeds=seeds)
    assert (token_ids == place).all()


def test_ties_keep_the_lowest_ids_of_a_large_vocabulary():
    kept = sample_tokens(torch.zeros(1, 5000), top_k=40, return_kept=True)[2]
    assert kept[0].tolist() == list(range(40))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_frequencies_and_temperature(dtype):
    logits = torch.tensor([0.0, 1.0, 2.0, -INF], dtype=dtype)
    token_ids, _ = sample_tokens(
        logits.expand(20_000, 4), temperature=2.0, seeds=torch.arange(20_000)
    )
    frequency = torch.bincount(token_ids, minlength=4) / 20_000
    expected = (logits / 2).softmax(0).to(frequency.dtype)
    torch.testing.assert_close(frequency, expected, rtol=0, atol=0.015)
    assert frequency[3] == 0


def test_a_row_does_not_depend_on_its_batch():
    torch.manual_seed(0)
    logits, seeds = torch.randn(2, 3, 50), torch.arange(10, 16).reshape(2, 3)
    token_ids, logprobs = sample_tokens(logits, seeds=seeds, step=2, top_p=0.9)
    for i, j in [(0, 0), (1, 2)]:
        alone = sample_tokens(logits[i, j], seeds=seeds[i, j], step=2, top_p=0.9)
        assert alone[0] == token_ids[i, j] and alone[1] == logprobs[i, j]


def test_step_and_seed_change_the_draw():
    logits = torch.zeros(64, 1000)
    seeds = torch.arange(64)
    first = sample_tokens(logits, seeds=seeds)[0]
    assert (first == sample_tokens(logits, seeds=seeds)[0]).all()
    assert (first != sample_tokens(logits, seeds=seeds, step=1)[0]).float().mean() > 0.9
    assert (first != sample_tokens(logits, seeds=seeds + 64)[0]).float().mean() > 0.9


def test_seeds_are_drawn_from_torchs_generator():
    logits = torch.zeros(64, 1000)
    torch.manual_seed(1)
    first, second = sample_tokens(logits)[0], sample_tokens(logits)[0]
    assert (first != second).any()
    torch.manual_seed(1)
    assert (sample_tokens(logits)[0] == first).all()


def rows_of(kept):
    ids, bounds = kept[0].tolist(), kept[1].tolist()
    return [ids[a:b] for a, b in zip(bounds, bounds[1:], strict=False)]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [0, 1, 2, 3, 5]),
        ({"top_k": 2}, [1, 3]),
        ({"top_k": 3}, [0, 1, 3]),  # 0 and 2 are equal: the lower id
        ({"top_k": 99}, [0, 1, 2, 3, 5]),
        ({"top_p": 0.4}, [3]),  # exactly reached
        ({"top_p": 0.41}, [1, 3]),
        ({"top_p": 0.71}, [0, 1, 3]),  # 0.4 + 0.25 + 0.15, of equals the lower id
        ({"top_p": 1.0}, [0, 1, 2, 3, 5]),
        ({"top_k": 2, "top_p": 0.62}, [1, 3]),  # 0.4 / 0.65 = 0.615 does not reach it
        ({"top_k": 2, "top_p": 0.61}, [3]),
        ({"top_k": 1, "temperature": 0.0}, [3]),
    ],
)
def test_kept(options, expected):
    p = torch.tensor([0.15, 0.25, 0.15, 0.4, 0.0, 0.05], dtype=torch.float64)
    logits = p.log().expand(300, 6)
    token_ids, logprobs, kept = sample_tokens(
        logits, seeds=torch.arange(300), return_kept=True, **options
    )
    assert kept[0].dtype == torch.int64 and kept[1].dtype == torch.int32
    assert rows_of(kept) == [expected] * 300
    if options.get("temperature") != 0:
        assert set(token_ids.tolist()) == set(expected)
    torch.testing.assert_close(logprobs, (p[token_ids] / p[expected].sum()).log())
    ids, full = sample_tokens(logits, seeds=torch.arange(300), **options)
    assert (ids == token_ids).all()
    torch.testing.assert_close(full, p[token_ids].log())


def test_logprobs_are_those_of_token_logprobs():
    torch.manual_seed(0)
    logits = torch.randn(20, 30).bfloat16()
    options = {"temperature": 0.7, "top_k": 10, "top_p": 0.8}
    ids, logprobs, kept = sample_tokens(logits, seeds=torch.arange(20), return_kept=True, **options)
    assert (logprobs == token_logprobs(logits, ids, temperature=0.7, kept=kept)).all()
    ids, logprobs = sample_tokens(logits, seeds=torch.arange(20), **options)
    assert (logprobs == token_logprobs(logits, ids, temperature=0.7)).all()


def test_greedy_takes_the_lowest_of_equals_at_temperature_one():
    logits = torch.tensor([[1.0, 3.0, 3.0, 2.0], [5.0, 5.0, 5.0, 5.0]])
    token_ids, logprobs = sample_tokens(logits, temperature=0.0)
    assert token_ids.tolist() == [1, 0]
    total = math.log(math.exp(1) + 2 * math.exp(3) + math.exp(2))
    torch.testing.assert_close(logprobs, torch.tensor([3 - total, -math.log(4)]))


def test_rows_without_probabilities_give_nan():
    logits = torch.tensor([[-INF, -INF], [float("nan"), 0.0], [0.0, 0.0]])
    for return_kept in (False, True):
        logprobs = sample_tokens(logits, return_kept=return_kept)[1]
        assert logprobs.isnan().tolist() == [True, True, False]


def test_no_rows_and_no_gradient():
    token_ids, logprobs = sample_tokens(torch.zeros(0, 5))
    assert token_ids.shape == logprobs.shape == (0,)
    assert not sample_tokens(torch.zeros(2, 5, requires_grad=True))[1].requires_grad
