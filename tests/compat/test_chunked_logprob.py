"""ChunkedLogProbFunction: ours against TRL's, with the definition in float64 as the truth."""

import inspect

import pytest
import torch
from budget import assert_within_budget

from fastrl import ops, reference
from fastrl.compat.trl import OPTIONAL_OUTPUTS, ChunkedLogProbFunction

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
ROWS, WIDTH, VOCAB = 11, 24, 211
CHUNK = 64  # several chunks in TRL, the last one not full
OPTIONS = [
    {},
    {"temperature": 0.7, "bias": True},
    {"temperature": 1.3, "final_logit_softcapping": 5.0},
    {"logit_scale": 0.25},
    {"logit_scale": 0.5, "final_logit_softcapping": 3.0, "temperature": 0.9, "bias": True},
    {"logit_scale": -0.5, "final_logit_softcapping": 3.0, "bias": True},
    {"logit_scale": 0.0, "bias": True},
    {"logit_scale": -0.5},
]


@pytest.fixture
def original(trl_utils):
    return trl_utils._ChunkedLogProbFunction


def inputs(dtype, bias=False):
    hidden = torch.randn(ROWS, WIDTH).to(dtype)
    weight = (0.6 * torch.randn(VOCAB, WIDTH)).to(dtype)
    return hidden, weight, torch.randn(VOCAB).to(dtype) if bias else None


def definition(hidden, weight, bias, targets, temperature, _, softcap, scale, outputs):
    """The formulas of the docstring, on all logits at once."""
    logits = scale * (hidden @ weight.T + (0 if bias is None else bias))
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    z = logits / temperature
    logprobs, entropy = reference.token_logprobs(z, targets, return_entropy=True)
    statistics = (2 * z.log_softmax(-1)).logsumexp(-1), z.mean(-1), z.argmax(-1) == targets
    return logprobs, entropy, *(x.detach() for x in statistics)


def run(apply, tensors, targets, options):
    """The five outputs, and gradients of log-probs and entropy in what there is of the inputs."""
    leaves = [None if x is None else x.detach().clone().requires_grad_() for x in tensors]
    outputs = apply(
        *leaves, targets, options.get("temperature", 1.0), CHUNK,
        options.get("final_logit_softcapping"), options.get("logit_scale", 1.0), OPTIONAL_OUTPUTS,
    )  # fmt: skip
    logprobs, entropy, *statistics = outputs
    assert not any(x.requires_grad for x in statistics)
    g = torch.linspace(-1, 1, ROWS, dtype=logprobs.dtype)
    (logprobs * g + 0.3 * entropy * g.flip(0)).sum().backward()
    return [x.detach() for x in outputs], [x.grad for x in leaves if x is not None]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_values_and_gradients(original, dtype, options):
    tensors = inputs(dtype, options.get("bias", False))
    logits = tensors[0].float() @ tensors[1].float().T
    targets = torch.randint(VOCAB, (ROWS,))
    targets[::2] = logits.argmax(-1)[::2]
    mine = run(ChunkedLogProbFunction.apply, tensors, targets, options)
    theirs = run(original.apply, tensors, targets, options)
    double = [None if x is None else x.double() for x in tensors]
    truth = run(definition, double, targets, options)
    for x, y, z in zip(mine[0], theirs[0], truth[0], strict=True):
        assert x.dtype == y.dtype and x.shape == y.shape
        if x.dtype == torch.bool:
            assert torch.equal(x, z)
        else:
            assert_within_budget(x, y, z, dtype)
    for x, y, z in zip(mine[1], theirs[1], truth[1], strict=True):
        assert x.dtype == y.dtype == dtype
        assert_within_budget(x, y, z, dtype)


def test_signature_is_that_of_trl(original):
    theirs = list(inspect.signature(original.forward).parameters.values())[1:]  # without ctx
    mine = inspect.signature(ChunkedLogProbFunction.apply).parameters.values()
    assert [(p.name, p.kind, p.default) for p in mine] == [
        (p.name, p.kind, p.default) for p in theirs
    ]


def test_float64_gives_float32_results_and_exact_gradients(original):
    tensors, targets = inputs(torch.float64), torch.randint(VOCAB, (ROWS,))
    mine, theirs = (run(f.apply, tensors, targets, {}) for f in (ChunkedLogProbFunction, original))
    assert [x.dtype for x in mine[0]] == [x.dtype for x in theirs[0]]
    truth = run(definition, tensors, targets, {})
    for x, z in zip(mine[1], truth[1], strict=True):
        assert x.dtype == torch.float64
        torch.testing.assert_close(x, z, rtol=1e-6, atol=1e-7)  # upstream came through float32


@pytest.mark.parametrize("learns", [False, True])
@pytest.mark.parametrize("name", [*OPTIONAL_OUTPUTS, "log_probs"])
def test_only_what_is_asked_is_given(original, name, learns):
    hidden, weight, _ = inputs(torch.float32)
    arguments = (hidden.requires_grad_(learns), weight, None, torch.zeros(ROWS).long(), 1.0, CHUNK)
    mine = ChunkedLogProbFunction.apply(*arguments, None, 1.0, (name,))
    theirs = original.apply(*arguments, None, 1.0, (name,))
    assert [x is None for x in mine] == [x is None for x in theirs]
    for x, y in zip(mine, theirs, strict=True):
        if x is not None:
            torch.testing.assert_close(x, y)
            assert x.requires_grad == y.requires_grad


def test_statistics_without_gradients_take_one_pass(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a second pass")

    hidden, weight, _ = inputs(torch.float32)
    arguments = (hidden, weight.requires_grad_(), None, torch.zeros(ROWS).long(), 1.0, CHUNK)
    expected = ChunkedLogProbFunction.apply(*arguments)
    monkeypatch.setattr(ops, "linear_token_logprobs", refuse)
    with torch.no_grad():
        found = ChunkedLogProbFunction.apply(*arguments)
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y)
    with pytest.raises(AssertionError, match="second pass"):
        ChunkedLogProbFunction.apply(*arguments)


def test_autocast_decides_the_dtype(original):
    tensors, targets = inputs(torch.float32, bias=True), torch.randint(VOCAB, (ROWS,))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mine = run(ChunkedLogProbFunction.apply, tensors, targets, {})
        theirs = run(original.apply, tensors, targets, {})
    rounded = [x.bfloat16().double() for x in tensors]
    truth = run(definition, rounded, targets, {})
    for i in (0, 1):
        for x, y, z in zip(mine[i], theirs[i], truth[i], strict=True):
            assert x.dtype == y.dtype
            if x.dtype != torch.bool:
                assert_within_budget(x, y, z, torch.bfloat16)
    assert all(torch.equal(x, x.bfloat16().float()) for x in mine[1])  # as the docstring tells


def test_no_rows():
    hidden, weight, _ = inputs(torch.float32)
    hidden = hidden[:0].requires_grad_()
    targets = torch.zeros(0, dtype=torch.int64)
    logprobs, *rest = ChunkedLogProbFunction.apply(hidden, weight, None, targets, 1.0, CHUNK)
    logprobs.sum().backward()
    assert [x.shape for x in (logprobs, *rest)] == [(0,)] * 5 and hidden.grad.shape == (0, WIDTH)


def test_what_is_refused():
    hidden, weight, _ = inputs(torch.float32)
    targets = torch.zeros(ROWS, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"expected outputs of entropy, .*, got \['perplexity'\]"):
        ChunkedLogProbFunction.apply(
            hidden, weight, None, targets, 1.0, CHUNK, outputs=("perplexity",)
        )
    weight.ds_status = "NOT_AVAILABLE"
    with pytest.raises(NotImplementedError, match="ZeRO-3 shards"):
        ChunkedLogProbFunction.apply(hidden, weight, None, targets, 1.0, CHUNK)
