"""TRL's functions of logits: ours against the originals, with float64 as the truth."""

import inspect
import math

import pytest
import torch
from budget import assert_within_budget

from fastrl import ops
from fastrl.compat import trl as ours

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
VOCAB = 211  # odd and prime
ROWS = (3, 5)
K = 4
NAMES = ["selective_log_softmax", "entropy_from_logits", "selective_log_softmax_and_entropy"]


def differentiated(function, logits, *args, **options):
    """Outputs, and the gradient of a fixed weighted sum of them."""
    logits = logits.detach().clone().requires_grad_()
    outputs = function(logits, *args, **options)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randn(x.shape, generator=generator).to(x.dtype) for x in outputs]
    torch.autograd.backward(outputs, upstream)
    return *(x.detach() for x in outputs), logits.grad


def assert_like_the_original(name, trl_utils, logits, *args, **options):
    original = getattr(trl_utils, name)
    mine = differentiated(getattr(ours, name), logits, *args, **options)
    theirs = differentiated(original, logits, *args, **options)
    truth = differentiated(original, logits.double(), *args, **options)
    for x, y, z in zip(mine, theirs, truth, strict=True):
        assert x.dtype == y.dtype and x.shape == y.shape
        assert_within_budget(x, y, z, logits.dtype)


@pytest.mark.parametrize("name", NAMES)
def test_signatures_are_those_of_trl(trl_utils, name):
    mine, theirs = (inspect.signature(getattr(m, name)).parameters for m in (ours, trl_utils))
    assert [(p.name, p.kind, p.default) for p in mine.values()] == [
        (p.name, p.kind, p.default) for p in theirs.values()
    ]


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64])
@pytest.mark.parametrize("shape", [ROWS, (*ROWS, K)], ids=["one id", "K ids"])
@pytest.mark.parametrize("options", [{}, {"temperature": 0.7}, {"row_mask": True}], ids=str)
def test_selective_log_softmax(trl_utils, dtype, shape, options):
    logits = (3 * torch.randn(*ROWS, VOCAB)).to(dtype)
    index = torch.randint(VOCAB, shape)
    if "row_mask" in options:
        options = {"row_mask": torch.rand(shape) < 0.7}
        assert 0 < options["row_mask"].sum() < options["row_mask"].numel()
    assert_like_the_original("selective_log_softmax", trl_utils, logits, index, **options)


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64])
def test_entropy_from_logits(trl_utils, dtype):
    logits = (3 * torch.randn(*ROWS, VOCAB)).to(dtype)
    assert_like_the_original("entropy_from_logits", trl_utils, logits, chunk_size=2)


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64])
@pytest.mark.parametrize(
    "options",
    [{}, {"temperature": 0.7}, {"row_mask": torch.arange(15).view(ROWS) % 3}],
    ids=["plain", "temperature", "integer row_mask"],
)
def test_selective_log_softmax_and_entropy(trl_utils, dtype, options):
    logits = (3 * torch.randn(*ROWS, VOCAB)).to(dtype)
    index = torch.randint(VOCAB, ROWS)
    name = "selective_log_softmax_and_entropy"
    assert_like_the_original(name, trl_utils, logits, index, **options)


def test_strided_logits_and_int32_ids(trl_utils):
    logits = torch.randn(5, 3, VOCAB).transpose(0, 1)
    by_row = torch.randn(3, VOCAB, 5).transpose(1, 2)  # the vocabulary is not dense either
    index = torch.randint(VOCAB, (3, 5, K))
    for x in (logits, by_row, logits[:, 1::2]):
        ids = index[:, : x.shape[1]]
        for wanted in (ids, ids[..., 0]):
            assert_like_the_original("selective_log_softmax", trl_utils, x, wanted)
            same = ours.selective_log_softmax(x, wanted.int())
            assert torch.equal(same, ours.selective_log_softmax(x, wanted))


def k_ids(function, logits, index, upstream):
    """Values and gradient."""
    logits = logits.clone().requires_grad_()
    values = function(logits, index)
    values.backward(upstream.to(values.dtype))
    return values.detach(), logits.grad


def plain(logits, index):
    return logits.log_softmax(-1).gather(-1, index)


@pytest.mark.parametrize("gap", [2.0, 10.0, 16.0, 20.0])
@pytest.mark.parametrize("place", [0, 2])
@pytest.mark.parametrize("twice", [False, True])
def test_k_ids_keep_the_digits_of_a_likely_one(gap, place, twice):
    logits = torch.randn(6, VOCAB)
    index = torch.stack([torch.randperm(VOCAB)[:K] for _ in logits])
    likely = index[:, place, None]
    if twice:  # its two gradients must not meet in a sum with 1 - p
        index[:, 3] = index[:, place]
    logits.scatter_(1, likely, logits.amax(-1, keepdim=True) + gap)
    upstream = (index == likely).float() / (2 if twice else 1)
    values, grad = k_ids(ours.selective_log_softmax, logits, index, upstream)
    # 1 - p from the other tokens, since 1.0 - p loses digits in float64 as well.
    x = logits.double().scatter(1, likely, -math.inf) - logits.double().gather(1, likely)
    odds = x.exp()
    true_grad = -odds / (1 + odds.sum(-1, keepdim=True))
    true_grad.scatter_(1, likely, -true_grad.sum(-1, keepdim=True))
    assert ((grad - true_grad).abs() <= 1e-5 * true_grad.abs()).all()
    true_values = plain(logits.double(), index)
    true_values[index == likely] = -odds.sum(-1).log1p().repeat_interleave(2 if twice else 1)
    assert ((values - true_values).abs() <= 2e-6 * true_values.abs()).all()


def test_k_ids_with_repeats_ties_and_excluded_tokens():
    logits = torch.randn(5, 9)
    logits[1, 4] = logits[1, 7] = 3.0  # tied likeliest
    logits[2, 3] = -math.inf
    logits[3, :6] = -math.inf
    index = torch.tensor([[1, 1, 2], [4, 7, 4], [3, 0, 3], [0, 1, 5], [8, 2, 8]])
    upstream = torch.randn(5, 3)
    values, grad = k_ids(ours.selective_log_softmax, logits, index, upstream)
    eager, eager_grad = k_ids(plain, logits, index, upstream)
    truth, true_grad = k_ids(plain, logits.double(), index, upstream)
    assert_within_budget(values, eager, truth, torch.float32)
    assert truth[3].isneginf().all() and truth[2].isneginf().sum() == 2
    rest = torch.tensor([0, 1, 2, 4])  # in row 3 every id asked for has p = 0
    assert_within_budget(grad[rest], eager_grad[rest], true_grad[rest], torch.float32)


@pytest.mark.parametrize("with_entropy", [False, True])
def test_k_ids_take_one_pass(monkeypatch, with_entropy):
    calls, real = [], ops.token_logprobs
    monkeypatch.setattr(
        ops, "token_logprobs", lambda *a, **k: calls.append(a[0].shape) or real(*a, **k)
    )
    logits, index = torch.randn(*ROWS, VOCAB), torch.randint(VOCAB, (*ROWS, K))
    if with_entropy:
        logprobs, entropy = ours.selective_log_softmax_and_entropy(logits, index)
        torch.testing.assert_close(entropy, ours.entropy_from_logits(logits))
        calls.pop()
    else:
        logprobs = ours.selective_log_softmax(logits, index)
    assert calls == [logits.shape]
    torch.testing.assert_close(logprobs, logits.log_softmax(-1).gather(-1, index))


def test_k_ids_compile_whole():
    logits, index, upstream = torch.randn(6, VOCAB), torch.randint(VOCAB, (6, K)), torch.randn(6, K)
    compiled = torch.compile(ours.selective_log_softmax, fullgraph=True, backend="aot_eager")
    expected = k_ids(ours.selective_log_softmax, logits, index, upstream)
    torch.testing.assert_close(k_ids(compiled, logits, index, upstream), expected)


def test_excluded_tokens_have_no_entropy():
    logits = torch.tensor([[0.0, 0.0, -math.inf]], requires_grad=True)
    entropy = ours.entropy_from_logits(logits)
    entropy.sum().backward()
    assert entropy.item() == pytest.approx(math.log(2))
    assert torch.equal(logits.grad, torch.zeros(1, 3))


def test_masked_rows_are_not_read():
    logits = torch.randn(2, 7)
    logits[1] = math.nan
    logits.requires_grad_()
    index, row_mask = torch.tensor([3, 3]), torch.tensor([1, 0])
    both = ours.selective_log_softmax_and_entropy(logits, index, row_mask=row_mask)
    sum(x.sum() for x in both).backward()
    assert all(x[1] == 0 and x[0] != 0 for x in both)
    assert torch.equal(logits.grad[1], torch.zeros(7)) and logits.grad[0].abs().sum() > 0


def test_entropy_can_be_detached():
    logits = torch.randn(3, 7, requires_grad=True)
    index = torch.tensor([0, 1, 2])
    logprobs, entropy = ours.selective_log_softmax_and_entropy(logits, index, False)
    assert logprobs.requires_grad and not entropy.requires_grad
    assert ours.selective_log_softmax_and_entropy(logits, index)[1].requires_grad


@pytest.mark.parametrize("rows", [(0,), (2, 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_rows(rows, dtype):
    logits = torch.randn(*rows, 7, dtype=dtype, requires_grad=True)
    for shape in (rows, (*rows, K)):
        index = torch.zeros(shape, dtype=torch.int64)
        logprobs, entropy = ours.selective_log_softmax_and_entropy(logits, index)
        assert logprobs.shape == shape and entropy.shape == rows
        (logprobs.sum() + entropy.sum()).backward()
        assert logits.grad.shape == logits.shape


LOGITS, IDS = torch.randn(2, 3, 7), torch.zeros(2, 3, dtype=torch.int64)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"index": IDS[0]}, ValueError, r"expected index \(2, 3\) or \(2, 3, 'K'\)"),
        ({"index": IDS[..., None][..., :0]}, ValueError, "K >= 1"),
        ({"index": IDS.float()}, TypeError, "index of dtype int64 or int32"),
        ({"index": IDS - 100}, ValueError, r"token_ids in \[0, 7\)"),
        ({"index": IDS + 7}, ValueError, r"token_ids in \[0, 7\)"),
        ({"temperature": 0.0}, ValueError, "temperature > 0"),
        ({"row_mask": IDS[0]}, ValueError, r"row_mask \(2, 3\) like index"),
        ({"logits": LOGITS.long()}, TypeError, "logits of dtype"),
        ({"logits": LOGITS[..., :0]}, ValueError, "V >= 1"),
    ],
)
def test_what_is_refused(change, error, message):
    arguments = {"logits": LOGITS, "index": IDS, **change}
    for function in (ours.selective_log_softmax, ours.selective_log_softmax_and_entropy):
        with pytest.raises(error, match=message):
            function(**arguments)


def test_there_is_no_entropy_of_nothing():
    for message, logits in ((r"\[..., V\], V >= 1", torch.zeros(2, 0)), ("of dtype", IDS)):
        with pytest.raises(
            (ValueError, TypeError), match=f"from_logits: expected logits {message}"
        ):
            ours.entropy_from_logits(logits)


def test_one_entropy_per_row_has_no_mask_per_id():
    index = IDS[..., None].expand(2, 3, K)
    with pytest.raises(ValueError, match=r"index \(2, 3\) with row_mask, got \(2, 3, 4\)"):
        ours.selective_log_softmax_and_entropy(LOGITS, index, row_mask=index == 0)
