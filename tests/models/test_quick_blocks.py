"""Blocks that are computed in fewer operations than their own, against their own."""

import functools

import pytest
import torch
from hf_models import VOCAB, build
from torch import nn

from fastrl.models import HuggingFacePolicy, _kv_decoder
from fastrl.models._linear_layers import PackedLayers, quick_layers
from fastrl.models._norms import norm_of
from fastrl.models._quick_blocks import _known_codes, quick_attention, quick_mlp
from fastrl.ops._quick_product import PackedWeight, is_quick

ROWS = 24
QUICK = ["llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3_text"]


def decoded(model, monkeypatch, *, quick, at_step=lambda step: None):
    """Hidden states of some steps behind prompts of two lengths, some rows ending early."""
    steps, own = [], _kv_decoder.decode_step
    if not quick:
        monkeypatch.setattr(_kv_decoder.KVDecoder, "knows", lambda *_: False)
    monkeypatch.setattr(_kv_decoder, "decode_step", lambda *a, **k: steps.append(a) or own(*a, **k))
    generator = torch.Generator().manual_seed(2)
    decoder = HuggingFacePolicy(model).decoder(ROWS, 12)
    prompts = [torch.randint(1, VOCAB, (n,), generator=generator) for n in (9, 3)]
    hidden = [decoder.read(prompts)]
    decoder.open([0] * (ROWS // 2) + [1] * (ROWS // 2))
    rows = ROWS
    for step in range(9):
        at_step(step)
        if step == 5:  # few enough to stay where they are
            decoder.keep(torch.tensor([r for r in range(ROWS) if r not in (2, ROWS - 1)]))
            rows -= 2
        hidden.append(decoder.step(torch.randint(1, VOCAB, (rows,), generator=generator)))
    monkeypatch.undo()
    return torch.cat(hidden), len(steps)


@pytest.mark.parametrize("name", QUICK)
def test_steps_are_the_models_own(name, monkeypatch):
    model = build(name)
    for weight in model.parameters():
        if weight.dim() == 1:  # norms of heads count
            nn.init.uniform_(weight, 0.5, 1.5)
    expected, never = decoded(model, monkeypatch, quick=False)
    got, steps = decoded(model, monkeypatch, quick=True)
    assert (never, steps) == (0, 8 * model.config.num_hidden_layers)  # the first is the model's own
    torch.testing.assert_close(got, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("part", ["self_attn.k_proj", "mlp.up_proj"])
def test_a_later_hook_changes_what_a_layer_computes(part, monkeypatch):
    model = build("llama")
    hooked, handles = model.model.layers[0].get_submodule(part), []

    def hook(step):
        if step == 4:
            handles.append(hooked.register_forward_hook(lambda _, __, y: 2.0 * y))

    without, _ = decoded(model, monkeypatch, quick=True)
    expected, _ = decoded(model, monkeypatch, quick=False, at_step=hook)
    handles.pop().remove()
    got, _ = decoded(model, monkeypatch, quick=True, at_step=hook)
    assert (got - without).abs().max() > 0.01
    torch.testing.assert_close(got, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "phi", "opt"])
def test_other_blocks_compute_by_themselves(name, monkeypatch):
    _, steps = decoded(build(name), monkeypatch, quick=True)
    assert steps == 0


def test_an_adapter_is_in_every_step(monkeypatch):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = peft.get_peft_model(build("llama"), config).eval()
    expected, _ = decoded(model, monkeypatch, quick=False)
    got, steps = decoded(model, monkeypatch, quick=True)
    torch.testing.assert_close(got, expected, rtol=0, atol=2e-5)
    with model.disable_adapter():
        without, _ = decoded(model, monkeypatch, quick=True)
    assert steps == 16 and (without - got).abs().max() > 0.01


def block(name="llama"):
    return build(name).model.layers[0]


def another_forward(x):
    def forward(self, *args, **kwargs):
        return type(self).__mro__[1].forward(self, *args, **kwargs)

    x.__class__ = type(f"My{type(x).__name__}", (type(x),), {"forward": forward})


def decorated(x):
    own = type(x).forward

    @functools.wraps(own)
    def forward(*args, **kwargs):
        return own(*args, **kwargs)

    x.__class__ = type(f"My{type(x).__name__}", (type(x),), {"forward": forward})


def other_way(own, q, k, cos, sin):
    return own(q, k, cos, -sin)


def in_part(own, q, k, cos, sin):
    turned = own(q, k, cos, sin)
    return tuple(
        torch.cat([y[..., :-1], x[..., -1:]], -1) for x, y in zip((q, k), turned, strict=True)
    )


def another_rotation(x, rotation=other_way):
    rotate = x.forward.__func__
    while hasattr(rotate, "__wrapped__"):
        rotate = rotate.__wrapped__
    scope = {**rotate.__globals__}
    own = scope["apply_rotary_pos_emb"]
    scope["apply_rotary_pos_emb"] = functools.partial(rotation, own)
    function = type(rotate)(rotate.__code__, scope, rotate.__name__, rotate.__defaults__)
    x.__class__ = type(f"My{type(x).__name__}", (type(x),), {"forward": function})


@pytest.mark.parametrize(
    "change",
    [
        another_forward,
        decorated,
        another_rotation,
        lambda x: another_rotation(x, in_part),
        lambda x: setattr(x, "forward", x.forward),
        lambda x: x.k_proj.register_forward_hook(lambda *_: None),
        lambda x: setattr(x, "k_norm", nn.Identity()),
        lambda x: setattr(x.q_norm, "weight", nn.Parameter(torch.ones(x.q_proj.out_features))),
        lambda x: setattr(x.q_norm, "variance_epsilon", 0.5),
        lambda x: delattr(x, "layer_idx"),
    ],
    ids="code decorated rotation part forward hook norm width eps nameless".split(),
)
def test_a_changed_attention_computes_by_itself(change):
    attention = block("qwen3").self_attn
    assert quick_attention(attention, None)
    change(attention)
    assert quick_attention(attention, None) is None


def test_heads_that_are_too_wide_for_the_kernel_compute_by_themselves():
    attention = block().self_attn
    for width, is_quick_one in ((1024, True), (1026, False)):
        attention.head_dim = width
        assert (quick_attention(attention, None) is not None) == is_quick_one


@pytest.fixture
def pack():
    if not is_quick(torch.zeros(ROWS, 32), torch.zeros(32, 32)):
        pytest.skip("torch's own products are best here")
    return lambda layer: PackedWeight(layer.weight, layer.bias, ROWS)


class Clipped(nn.Module):
    def forward(self, x):
        return nn.functional.silu(x).clamp(max=100.0)


@pytest.mark.parametrize(
    "change",
    [
        another_forward,
        decorated,
        lambda x: setattr(x, "act_fn", nn.ReLU()),
        lambda x: setattr(x, "act_fn", Clipped()),
        lambda x: x.up_proj.register_forward_pre_hook(lambda *_: None),
    ],
    ids=["code", "decorated", "relu", "clipped", "hook"],
)
def test_a_changed_mlp_computes_by_itself(change, pack):
    mlp = block().mlp
    assert quick_mlp(mlp, pack)
    change(mlp)
    assert quick_mlp(mlp, pack) is None


@torch.no_grad()
@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("act", [nn.SiLU(), nn.GELU(), nn.GELU(approximate="tanh")])
def test_a_quick_mlp_is_as_exact_as_its_own(act, size, pack):
    mlp = block().mlp
    mlp.act_fn = act
    x = size * torch.randn(ROWS, 1, 32)
    quick, own, exact = quick_mlp(mlp, pack)(x), mlp(x), mlp.double()(x.double())
    error, of_own = ((y - exact).square().mean().sqrt() for y in (quick, own))
    assert error <= 1.5 * of_own


@torch.no_grad()
def test_packed_layers_compute_with_quick_blocks_while_in_use(pack):
    layer = block()
    packed, x = PackedLayers(layer, ROWS), torch.randn(ROWS, 1, 32)
    with packed.in_use():
        assert all("forward" in part.__dict__ for part in (layer.mlp, layer.self_attn))
        got = layer.mlp(x)
    assert not any("forward" in part.__dict__ for part in layer.modules())
    torch.testing.assert_close(got, layer.mlp(x))


def test_a_class_that_was_changed_before_is_not_known(monkeypatch):
    from transformers.models.llama import modeling_llama

    changed = type("LlamaMLP", (modeling_llama.LlamaMLP,), {"forward": lambda self, x: x})
    monkeypatch.setattr(modeling_llama, "LlamaMLP", changed)
    _known_codes.cache_clear()
    try:
        assert _known_codes("MLP", ("llama.Llama",)) == []
    finally:
        _known_codes.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_norm_is_what_it_is_under_any_default_dtype(dtype):
    layers = [build(name).model.norm for name in ("llama", "gemma2")]
    for layer in layers:
        nn.init.uniform_(layer.weight, 0.5, 1.5)
    torch.set_default_dtype(dtype)
    try:
        norms = [norm_of(layer) for layer in layers]
    finally:
        torch.set_default_dtype(torch.float32)
    for norm, expected in zip(norms, (layers[0].weight, 1.0 + layers[1].weight), strict=True):
        assert norm and torch.equal(norm.factor, expected)


@torch.no_grad()
def test_a_layer_that_stands_twice_in_a_block(pack):
    layer = block()
    layer.mlp.up_proj = layer.mlp.gate_proj
    x = torch.randn(ROWS, 1, 32)
    expected = layer.mlp(x)
    with PackedLayers(layer, ROWS).in_use():
        torch.testing.assert_close(layer.mlp(x), expected)


def test_layers_compute_by_themselves_under_autocast_and_in_compiled_parts():
    layer = block()
    packed = PackedLayers(layer, ROWS)
    with torch.autocast("cpu", torch.bfloat16), packed.in_use(), quick_layers(layer):
        assert not any("forward" in part.__dict__ for part in layer.modules())
    layer.mlp.compile(backend="eager")
    with PackedLayers(layer, ROWS).in_use(), quick_layers(layer):
        assert not any("forward" in part.__dict__ for part in layer.modules())
