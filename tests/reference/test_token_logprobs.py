import math

import pytest
import torch

from fastrl.reference import token_logprobs

NAN, INF = float("nan"), float("inf")


def test_by_hand():
    # softmax is 1/2, 1/4, 1/4: entropy (1/2) log 2 + (1/2) log 4 = 1.5 log 2
    logits = torch.tensor([[2.0, 1.0, 1.0], [4.0, 1.0, 1.0]]).log()
    logprobs, entropy = token_logprobs(logits, torch.tensor([1, 0]), return_entropy=True)
    torch.testing.assert_close(logprobs, torch.tensor([0.25, 2 / 3]).log())
    two_thirds = -(2 / 3) * math.log(2 / 3) - (1 / 3) * math.log(1 / 6)
    torch.testing.assert_close(entropy, torch.tensor([1.5 * math.log(2), two_thirds]))


def test_temperature_divides_the_logits():
    logits = torch.tensor([[4.0, 1.0]]).log()  # at temperature 2: 2 to 1
    logprobs = token_logprobs(logits, torch.tensor([0]), temperature=2.0)
    torch.testing.assert_close(logprobs, torch.tensor([2 / 3]).log())


def test_gradients_are_the_closed_forms():
    """d log p_y / d x_j = (j = y) - p_j;  d H / d x_j = -p_j (log p_j + H)."""
    torch.manual_seed(0)
    logits = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    ids = torch.tensor([0, 6, 3, 3, 1])
    logprobs, entropy = token_logprobs(logits, ids, temperature=0.7, return_entropy=True)
    p = torch.exp(logits / 0.7) / torch.exp(logits / 0.7).sum(-1, keepdim=True)
    (by_logprob,) = torch.autograd.grad(logprobs.sum(), logits, retain_graph=True)
    torch.testing.assert_close(by_logprob, (torch.eye(7)[ids].double() - p) / 0.7)
    (by_entropy,) = torch.autograd.grad(entropy.sum(), logits)
    torch.testing.assert_close(by_entropy, -p * (p.log() + entropy[:, None]) / 0.7)


def test_gradcheck():
    logits = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)
    ids = torch.tensor([[0, 5, -100], [2, 2, 1]])
    kept = torch.tensor([0, 5, 5, 1, 2, 2, 4, 1]), torch.tensor([0, 1, 3, 3, 5, 6, 8])
    check = torch.autograd.gradcheck
    assert check(lambda x: token_logprobs(x, ids, temperature=1.5, return_entropy=True), logits)
    assert check(lambda x: token_logprobs(x, ids, kept=kept, return_entropy=True), logits)


def test_excluded_tokens_have_clean_entropy_and_gradients():
    logits = torch.tensor([[0.0, -INF, 0.0], [-INF, 3.0, -INF]], requires_grad=True)
    logprobs, entropy = token_logprobs(logits, torch.tensor([0, 1]), return_entropy=True)
    torch.testing.assert_close(logprobs, torch.tensor([-math.log(2), 0.0]))
    torch.testing.assert_close(entropy, torch.tensor([math.log(2), 0.0]))
    (logprobs + entropy).sum().backward()
    torch.testing.assert_close(logits.grad, torch.tensor([[0.5, 0, -0.5], [0, 0, 0]]))
    assert token_logprobs(logits, torch.tensor([1, 0])).tolist() == [-INF, -INF]


@pytest.mark.parametrize("ignore_index", [-100, 2])
def test_ignored_rows_give_zero_whatever_their_logits(ignore_index):
    logits = torch.tensor([[NAN, 1.0, 2.0], [0.0, 1.0, 2.0]], requires_grad=True)
    ids = torch.tensor([ignore_index, 1])
    outputs = token_logprobs(logits, ids, ignore_index=ignore_index, return_entropy=True)
    assert outputs[0][0] == 0 and outputs[1][0] == 0
    assert outputs[0][1] < 0 and outputs[1][1] > 0
    sum(x.sum() for x in outputs).backward()
    assert (logits.grad[0] == 0).all()
    assert (logits.grad[1] != 0).all()


def test_ids_out_of_range_give_nan():
    logprobs = token_logprobs(torch.zeros(3, 4), torch.tensor([4, -1, 3]))
    assert logprobs.isnan().tolist() == [True, True, False]


def test_kept_renormalises():
    logits = torch.tensor([[1.0, 2.0, 3.0, 4.0], [1.0, 2.0, 3.0, 4.0]]).log()
    kept = torch.tensor([1, 3, 0, 2]), torch.tensor([0, 2, 4], dtype=torch.int32)
    logprobs, entropy = token_logprobs(logits, torch.tensor([3, 3]), kept=kept, return_entropy=True)
    torch.testing.assert_close(logprobs, torch.tensor([math.log(4 / 6), -INF]))
    by_hand = [
        -(2 / 6) * math.log(2 / 6) - (4 / 6) * math.log(4 / 6),
        -(1 / 4) * math.log(1 / 4) - (3 / 4) * math.log(3 / 4),
    ]
    torch.testing.assert_close(entropy, torch.tensor(by_hand))


def test_leading_shapes_strides_and_dtypes():
    torch.manual_seed(0)
    logits = torch.randn(5, 2, 3, dtype=torch.float64).permute(2, 1, 0)  # [3, 2, 5]
    ids = torch.randint(0, 5, (3, 2))
    logprobs = token_logprobs(logits, ids)
    for i, j in [(0, 0), (2, 1), (1, 0)]:
        row = logits[i, j].exp()
        torch.testing.assert_close(logprobs[i, j], (row[ids[i, j]] / row.sum()).log())
    assert logprobs.dtype == torch.float64
    assert token_logprobs(logits[0, 0], ids[0, 0]).shape == ()
    half = logits.bfloat16()
    assert token_logprobs(half, ids).dtype == torch.float32
    expected = token_logprobs(half.double(), ids).float()
    torch.testing.assert_close(token_logprobs(half, ids), expected, rtol=1e-6, atol=1e-6)


def test_a_common_offset_changes_nothing():
    logits = torch.tensor([[0.0, 1.0, 2.0]], dtype=torch.float64)
    ids = torch.tensor([1])
    for offset in (-1e4, 1e4):
        shifted = token_logprobs(logits + offset, ids, return_entropy=True)
        torch.testing.assert_close(shifted, token_logprobs(logits, ids, return_entropy=True))


def test_no_rows():
    logprobs, entropy = token_logprobs(
        torch.zeros(0, 5), torch.zeros(0, dtype=torch.int64), return_entropy=True
    )
    assert logprobs.shape == entropy.shape == (0,)
