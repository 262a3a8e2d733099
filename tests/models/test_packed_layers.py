"""What layers compute with while a rollout runs, against the layers themselves."""

import pytest
import torch
from hf_models import build
from torch import nn

from fastrl import ops
from fastrl.models import HuggingFacePolicy
from fastrl.models._linear_layers import PackedLayers, quick_layers
from fastrl.models._norms import quick_norms
from fastrl.ops import _quick_product
from fastrl.ops._quick_product import is_quick

ROWS = 64


class RMSNorm(nn.Module):
    """As Llama has it, of a part of x."""

    def __init__(self, width=32, eps=1e-6, part=lambda x: x):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.rand(width)), eps
        self.part = part

    def forward(self, x):
        x = self.part(x)
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps))


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2", "gemma3_text"])
def test_quick_norms_are_the_models(name):
    model = build(name)
    norms = [x for x in model.modules() if type(x).__name__.endswith("RMSNorm")]
    for norm in norms:
        nn.init.uniform_(norm.weight, -0.5, 1.5)
    quick = quick_norms(model)
    assert norms and quick.keys() == set(norms)
    for norm in norms:
        width = len(norm.weight)
        for size in (1e-4, 1.0, 1e4):  # in the first eps counts
            x = size * torch.randn(ROWS, 1, width)
            with torch.no_grad():
                expected, got = norm(x), quick[norm](x)
            factor = 1.0 if name.startswith("gemma") else 0.0
            eps = norm.eps if hasattr(norm, "eps") else norm.variance_epsilon
            exact = x.double() * (x.double().pow(2).mean(-1, keepdim=True) + eps).rsqrt()
            exact *= norm.weight.detach().double() + factor
            error, own = (got - exact).square().mean(), (expected - exact).square().mean()
            assert error.sqrt() <= 1.5 * own.sqrt()


@pytest.mark.parametrize(
    "norm",
    [
        RMSNorm(part=lambda x: x - x.mean(-1, keepdim=True)),
        RMSNorm(part=lambda x: x + 1e-4),
        RMSNorm(eps=None),
        RMSNorm().double(),
    ],
)
def test_other_norms_are_left_alone(norm):
    usual = RMSNorm()
    assert quick_norms(nn.Sequential(usual, norm)).keys() == {usual}


def test_a_quick_norm_leaves_other_inputs_to_the_norm():
    norm = RMSNorm()
    x = torch.randn(3, 32, dtype=torch.float64)
    assert torch.equal(quick_norms(norm)[norm](x), norm(x))


def attention_layers(bias=True):
    module = nn.Module()
    for name, size in (("q_proj", 48), ("k_proj", 16), ("v_proj", 16)):
        setattr(module, name, nn.Linear(32, size, bias=bias))
    return module, [module.q_proj, module.k_proj, module.v_proj]


@pytest.fixture
def products(monkeypatch):
    if not is_quick(torch.zeros(ROWS, 32), torch.zeros(32, 32)):
        pytest.skip("torch's own products are best here")
    own, seen = _quick_product.quick_product, []

    def product(*args):
        seen.append(args[0])
        return own(*args)

    monkeypatch.setattr(_quick_product, "quick_product", product)
    return seen


@torch.no_grad()
@pytest.mark.parametrize("bias", [True, False])
def test_layers_of_one_input_are_one_product(products, bias):
    module, layers = attention_layers(bias)
    packed, x = PackedLayers(module, ROWS), torch.randn(ROWS, 1, 32)
    expected = [layer(x) for layer in layers]
    with packed.in_use():
        for _ in range(2):  # a second time it is another product
            for got, right in zip([layer(x) for layer in layers], expected, strict=True):
                torch.testing.assert_close(got, right)
    assert len(products) == 2
    assert torch.equal(layers[0](x), expected[0]) and len(products) == 2  # as it was


@torch.no_grad()
def test_layers_of_other_inputs_take_nothing_of_each_other(products):
    module, layers = attention_layers()
    q, k, v = layers
    packed = PackedLayers(module, ROWS)
    x, other = torch.randn(ROWS, 32), torch.randn(ROWS, 32)
    right = {(f, y): f(z) for f in layers for y, z in (("x", x), ("other", other))}
    with packed.in_use():
        got = [(q, "x", q(x)), (k, "other", k(other)), (v, "x", v(x)), (v, "other", v(other))]
        got += [(k, "x", k(x)), (k, "x", k(x))]
        for layer, name, y in got:
            torch.testing.assert_close(y, right[layer, name])
        q(x)
        x.copy_(other)
        torch.testing.assert_close(k(x), right[k, "other"])
    with torch.inference_mode(), packed.in_use():  # where nothing counts what is written
        x = torch.randn(ROWS, 32)
        q(x)
        x.copy_(other)
        torch.testing.assert_close(k(x), right[k, "other"])


def test_layers_that_differ_in_bias_are_products_of_their_own(products):
    module, layers = attention_layers()
    module.k_proj.bias = None
    x = torch.randn(ROWS, 32)
    with torch.no_grad(), PackedLayers(module, ROWS).in_use():
        got = [layer(x) for layer in layers]
    assert len(products) == 3
    for y, layer in zip(got, layers, strict=True):
        torch.testing.assert_close(y, layer(x))


def test_buffers_in_use_are_checked_once(monkeypatch):
    own, calls = ops.decode_attention, []

    def attention(*args, **kwargs):
        calls.append(kwargs["key_end"].tolist())
        return own(*args, **kwargs)

    monkeypatch.setattr(ops, "decode_attention", attention)
    decoder = HuggingFacePolicy(build("gpt_neox")).decoder(3, 8)  # whose block is not quick
    decoder.read([torch.tensor([1, 2])])
    decoder.open([0, 0])
    for _ in range(3):
        decoder.step(torch.tensor([3, 4]))
    assert calls == [[1, 1], [1, 1]]  # by each of two layers
    decoder.open([0])  # other buffers
    decoder.step(torch.tensor([3, 4, 5]))
    assert calls[2:] == [[4, 4, 1], [4, 4, 1]]


def test_a_step_too_many_of_a_row_before_others_is_an_error():
    decoder = HuggingFacePolicy(build("llama")).decoder(2, 3)
    decoder.read([torch.tensor([1, 2])])
    decoder.open([0])
    for _ in range(2):
        decoder.step(torch.tensor([3]))
    with pytest.raises(ValueError, match="key_end"):
        decoder.step(torch.tensor([3]))


def test_layers_that_learn_can_be_differentiated_twice():
    """Also where what comes from above is a constant, of which once_differentiable says nothing."""
    net = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 5))
    rows, weights = torch.randn(20, 8), list(net.parameters())

    def second():
        first = torch.autograd.grad(net(rows).sum(), weights, create_graph=True)
        return torch.autograd.grad(sum(x.square().sum() for x in first), weights, allow_unused=True)

    expected = second()
    with quick_layers(net):
        found = second()
    assert expected[2].abs().max() > 1
    for x, y in zip(found[:3], expected[:3], strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)
