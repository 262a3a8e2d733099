"""What the ops on hidden states keep entry by entry, where eager PyTorch in float32 does not.

The heads are identities: the logits are the hidden states, and their gradients are these states'.
"""

import math

import pytest
import torch

import fastrl
from fastrl import reference
from fastrl.ops import _head

OPS = ["linear_token_logprobs", "frozen head", "linear_token_loss"]


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    return request.param


@pytest.fixture(autouse=True)
def small_slices(monkeypatch):
    for name, size in (("SLICE", 2**12), ("ROWS", 2)):
        monkeypatch.setattr(_head, f"_CPU_{name}", size)
        monkeypatch.setattr(_head, f"_GPU_{name}", size)


def run(name, logits, token_ids, module=fastrl, bias=None, **options):
    """log-prob, entropy, and the gradient of the log-probs in the logits; of the bias, too."""
    hidden = logits.clone().requires_grad_()
    weight = torch.eye(logits.shape[1], dtype=logits.dtype, device=logits.device)
    if bias is not None:
        bias = bias.clone().requires_grad_()
        options["bias"] = bias
    if name == "linear_token_loss":
        weight.requires_grad_()
        loss, logprobs, entropy = module.linear_token_loss(
            hidden, weight, token_ids, lambda logprobs, entropy, rows: logprobs, **options
        )
        loss.backward()
    else:
        weight.requires_grad_(name != "frozen head")
        logprobs, entropy = module.linear_token_logprobs(
            hidden, weight, token_ids, return_entropy=True, **options
        )
        logprobs.sum().backward()
    of_bias = [] if bias is None else [bias.grad]
    return [logprobs.detach(), entropy.detach(), hidden.grad, *of_bias]


def assert_digits(name, logits, token_ids, **options):
    found = run(name, logits, token_ids, **options)
    in_double = {k: v.double() if k == "bias" else v for k, v in options.items()}
    truth = run(name, logits.double(), token_ids, reference, **in_double)
    for x, exact in zip(found, truth, strict=True):
        error = (x.double() - exact).abs()
        assert error.le(1e-5 * exact.abs()).all(), (error / exact.abs()).nan_to_num(0).max()
    return found


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("name", OPS)
def test_likely_tokens(device, name, temperature):
    rests, vocab = (1e-1, 1e-3, 1e-5, 1e-7), 3000
    logits = torch.empty(len(rests), vocab)
    for row, rest in zip(logits, rests, strict=True):
        row[:] = temperature * math.log(rest / (vocab - 1))
        row[17] = temperature * math.log1p(-rest)
    ids = torch.full((len(rests),), 17, device=device)
    assert_digits(name, logits.to(device), ids, temperature=temperature)


@pytest.mark.parametrize("name", OPS)
def test_logits_far_beyond_their_softcap(device, name):
    """1 - tanh^2 has none of its digits there."""
    logits = torch.stack([torch.linspace(-16, 16, 999), torch.linspace(18, -17, 999)]).to(device)
    ids = torch.tensor([3, 998], device=device)
    found = assert_digits(name, logits, ids, softcap=2.0, temperature=0.7)
    assert 0 < found[2].abs().min() < 1e-9


@pytest.mark.parametrize("offset", [0.0, 1e4, -1e4])
@pytest.mark.parametrize("name", OPS)
def test_tokens_that_a_bias_excludes_and_offsets(device, name, offset):
    """An offset by a power of two's multiples, so that no logit is rounded on the way."""
    logits = (torch.randn(4, 700) * 256).round() / 256
    bias = torch.full((700,), offset)
    bias[::3] = -math.inf
    ids = torch.tensor([1, 40, 698, 2], device=device)
    found = run(name, logits.to(device), ids, bias=bias.to(device))
    truth = run(name, logits.to(device).double(), ids, reference, bias=bias.to(device).double())
    for x, exact in zip(found, truth, strict=True):
        torch.testing.assert_close(x.double(), exact, rtol=1e-5, atol=1e-6)
    assert not found[2][:, ::3].any() and not found[3][::3].any()


@pytest.mark.parametrize("name", ["linear_token_logprobs", "frozen head"])
def test_a_temperature_whose_inverse_is_no_float32(device, name):
    """One token has all of the probability: no gradient, and not infinity times 0."""
    logits = torch.randn(3, 50, device=device)
    found = run(name, logits, logits.argmax(1), temperature=1e-40)
    assert not any(x.any() for x in found)


@pytest.mark.parametrize("name", ["linear_token_logprobs", "linear_token_loss"])
def test_gradients_of_bfloat16_are_rounded_once(monkeypatch, name):
    """Not with each of many slices: sums are float32. On a CPU, where factors are float32, too."""
    monkeypatch.setattr(_head, "_CPU_SLICE", 2**8)
    rows, width, vocab = 80, 12, 10_000
    tensors = [torch.rand(rows, width), torch.randn(vocab, width) / 4]
    ids = torch.randint(20, (rows,))

    def grads(module, dtype):
        leaves = [x.bfloat16().to(dtype).requires_grad_() for x in tensors]
        if name == "linear_token_loss":
            module.linear_token_loss(*leaves, ids, lambda p, entropy, rows: -p)[0].backward()
        else:
            (-module.linear_token_logprobs(*leaves, ids)).sum().backward()
        return [x.grad for x in leaves]

    truth = grads(reference, torch.float64)
    for found, exact in zip(grads(fastrl, torch.bfloat16), truth, strict=True):
        error = (found.double() - exact).abs()
        assert error.le(2**-8 * exact.abs() + 1e-5 * exact.abs().max()).all()
