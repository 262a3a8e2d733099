"""What fastrl's attention cannot honour is an error, never a wrong number."""

import copy
import inspect
import sys

import pytest
import torch
from hf_models import VOCAB, build
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, masking_utils

import fastrl.hf
from fastrl import pack_groups
from fastrl.hf._attention import attention_function

IDS = torch.arange(2, 11)[None]
SMALL = dict(hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2)
SMALL |= dict(num_hidden_layers=2, head_dim=8)
EXPERTS = dict(num_experts=4, num_local_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
EXPERTS |= dict(shared_expert_intermediate_size=16)
MIXED = dict(layer_types=["linear_attention", "full_attention"])


def packed():
    batch = pack_groups([torch.arange(2, 6)], [[torch.arange(3, 5), torch.arange(6, 9)]])
    layout = batch.layout
    return batch.token_ids[None], {"layout": layout, "position_ids": layout.position_ids[None]}


@pytest.mark.parametrize(
    "name, widths",
    [
        ("stablelm", SMALL),  # its layers drop what they do not know
        ("xglm", dict(d_model=32, ffn_dim=48, num_layers=2, attention_heads=4)),  # attends itself
        ("qwen3_next", SMALL | EXPERTS | MIXED),  # most of its layers are recurrent
        ("bloom", dict(hidden_size=32, n_layer=2, n_head=4)),
        ("mamba", dict(hidden_size=32, num_hidden_layers=2)),  # has no attention
    ],
)
def test_models_that_do_not_hand_their_arguments_on(name, widths):
    """When they are built, when they change their attention, and, where that is gone round, when
    they ask for a mask."""
    message = "hf: expected a model that hands its arguments on to its attention.*got .*ForCausalLM"
    with pytest.raises(ValueError, match=message):
        build(name, **widths)
    model = build(name, "eager", **widths)
    if name in ("stablelm", "qwen3_next", "mamba"):
        with pytest.raises(ValueError, match="_supports_attention_backend"):
            model.set_attn_implementation("fastrl")
    else:  # transformers itself keeps what it has, and says so in its log
        model.set_attn_implementation("fastrl")
    assert model.config._attn_implementation == "eager"
    with pytest.raises(ValueError, match="hf: expected .*attn_implementation='fastrl'"):
        fastrl.hf.check(model)
    if name in ("bloom", "mamba"):
        return  # they ask for no mask
    model.config._attn_implementation = "fastrl"
    ids, arguments = packed()
    for given in ({}, arguments):
        with pytest.raises(ValueError, match="_supports_attention_backend"):
            model(ids, **given)


def test_a_wrapper_does_not_make_its_model_worse():
    """A class that promises nothing is refused itself; the model that it is written around is not,
    though both have the same configuration."""
    from transformers import LlamaConfig, PreTrainedModel

    class Wrapper(PreTrainedModel):
        config_class = LlamaConfig

    model = build("llama")
    with pytest.raises(ValueError, match="got Wrapper"):
        Wrapper(copy.deepcopy(model.config))
    fastrl.hf._models._CHECKED.clear()
    assert model(IDS).logits.isfinite().all()


def test_chunked_attention():
    widths = SMALL | EXPERTS | dict(intermediate_size_mlp=48, attention_chunk_size=4)
    chunked = build("llama4_text", **widths)
    ids, arguments = packed()
    for given in ({}, arguments):
        with pytest.raises(ValueError, match="causal attention.* got chunked_overlay"):
            chunked(ids, **given)
    full = build("llama4_text", **widths, layer_types=["full_attention"] * 2)
    with pytest.raises(ValueError, match="got chunked_|position_ids in each layer"):
        full(ids, **arguments)


def test_sinks_of_each_token():
    query, positions = torch.randn(1, 2, 6, 8), torch.arange(6)[None]
    for given, message in (("s_aux", "s_aux .Hq. = .2,. in Layer, got .1, 2, 6, 1"), ("sinks", "")):
        sinks = {given: torch.zeros(1, 2, 6, 1)}
        with pytest.raises(ValueError, match=message or "expected sinks of each head.*got sinks="):
            attention_function(Layer(), query, query, query, None, position_ids=positions, **sinks)


@pytest.mark.parametrize(
    "name, widths",
    [
        ("glm_moe_dsa", dict(q_lora_rank=8, kv_lora_rank=8, qk_nope_head_dim=8, v_head_dim=8)),
        ("doge", {}),
    ],
)
def test_layers_that_choose_their_keys_through_a_mask_of_four_dimensions(name, widths):
    widths = SMALL | dict(num_key_value_heads=4, n_routed_experts=4, qk_rope_head_dim=4) | widths
    model = build(name, **widths)
    for given in ({}, {"attention_mask": (IDS > 2).long()}):
        with pytest.raises(ValueError, match="hf: expected attention to all keys of a row"):
            model(IDS, **given)


@pytest.mark.parametrize("dropout", [dict(name="llama", attention_dropout=0.1)])
def test_dropout_of_attention_while_training(dropout):
    for model in (build(**dropout), build("gpt2", attn_pdrop=0.1)):
        assert model(IDS).logits.isfinite().all()
        with pytest.raises(ValueError, match="no dropout of attention weights.* got 0.1"):
            model.train()(IDS)


@pytest.mark.parametrize(
    "name, widths",
    [
        ("lfm2", SMALL | dict(layer_types=["conv", "full_attention"])),
        ("minimax", SMALL | EXPERTS | MIXED),
        ("minimax", SMALL | EXPERTS | dict(layer_types=["linear_attention"] * 2)),
    ],
)
def test_layers_that_mix_what_a_layout_keeps_apart(name, widths):
    model = build(name, **widths)
    ids, arguments = packed()
    assert model(ids).logits.isfinite().all()
    positions = torch.arange(9)[None] % 5
    for given in (arguments, dict(position_ids=positions)):
        with pytest.raises(ValueError, match="attention in all layers.* got (conv|linear_attent)"):
            model(ids, use_cache=False, **given)


def test_positions_that_do_not_begin_at_0():
    widths = SMALL | dict(is_decoder=True)
    ids, arguments = packed()
    with pytest.raises(ValueError, match="positions from 0.* counted from the padding's id"):
        build("roberta", **widths)(ids, **arguments)


def test_recurrent_layers_that_the_configuration_does_not_name():
    """A model class beside the layer's own says that it carries a state."""
    model = build("llama")
    ids, arguments = packed()
    assert model(ids, **arguments).logits.isfinite().all()
    try:
        type(model.model)._is_stateful = True
        assert model(ids).logits.isfinite().all()
        with pytest.raises(ValueError, match="attention in all layers.* got recurrent layers"):
            model(ids, **arguments)
    finally:
        del type(model.model)._is_stateful


def test_attention_that_is_not_causal():
    fastrl.hf.register()
    config = AutoConfig.for_model("bert", **SMALL, vocab_size=VOCAB)
    model = AutoModelForMaskedLM.from_config(config, attn_implementation="fastrl")
    with pytest.raises(ValueError, match="causal attention.* got bidirectional_mask_function"):
        model(IDS)
    with pytest.raises(ValueError, match="hf: expected causal attention.*bidirectional"):
        build("llama")(IDS, is_causal=False)
    model = build("llama")
    model.config.is_causal = False  # as for embedding models
    with pytest.raises(ValueError, match="got bidirectional_mask_function"):
        model(IDS)
    model = build("gpt2", add_cross_attention=True)
    with pytest.raises(ValueError, match="got bidirectional_mask_function"):
        model(IDS, encoder_hidden_states=torch.zeros(1, 3, 32))


@pytest.mark.parametrize(
    "create, arguments",
    [
        ("create_causal_mask", dict(or_mask_function=lambda b, h, q, k: q >= k)),
        ("create_causal_mask", dict(and_mask_function=lambda b, h, q, k: q >= k)),
        ("create_causal_mask", dict(block_sequence_ids=torch.zeros(1, 9, dtype=torch.long))),
        ("create_sliding_window_causal_mask", dict(or_mask_function=lambda b, h, q, k: q >= k)),
        ("create_chunked_causal_mask", {}),
        ("create_bidirectional_mask", {}),
        ("create_bidirectional_sliding_window_mask", {}),
    ],
)
def test_masks_that_are_more_than_causal(create, arguments):
    config = build("mistral", attention_chunk_size=4).config
    embeddings = torch.zeros(1, 9, 32)
    if "bidirectional" not in create:
        arguments = arguments | dict(position_ids=torch.arange(9)[None] % 5)
    takes = inspect.signature(getattr(masking_utils, create)).parameters
    if not arguments.keys() <= takes.keys():
        pytest.skip("transformers has no such mask yet")
    inputs = dict(config=config, inputs_embeds=embeddings, attention_mask=None)
    inputs |= {"past_key_values" if "past_key_values" in takes else "cache": None}
    with pytest.raises(ValueError, match="hf: expected (causal attention|transformers' own)"):
        getattr(masking_utils, create)(**inputs, **arguments)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(attention_mask=torch.ones(1, 1, 9, 9)), r"mask function, got \[1, 1, 9, 9\]"),
        (dict(attention_mask=(IDS != 5).long()), "padding before or after.* got some between"),
        (dict(output_attentions=True), "no attention weights as an output"),
        (dict(layuot=1), "no argument that attention does not know.* got layuot="),
        (dict(position_ids=torch.arange(9)[None] % 5 + 3), "restart at 0, got a restart at 3"),
        (dict(position_ids=torch.arange(9)[None] % 5, attention_mask=(IDS > 2).long()), "padding"),
        (dict(cu_seq_lens_q=torch.tensor([0, 5])), "up to N = 9, got .* up to 5"),
        (
            dict(cu_seq_lens_q=torch.tensor([0, 5, 9]), position_ids=torch.arange(9)[None] % 4),
            "rise by one in each sequence",
        ),
        (
            dict(cu_seq_lens_q=torch.tensor([0, 5, 9]), cu_seq_lens_k=torch.tensor([0, 4, 9])),
            "cu_seq_lens_k like cu_seq_lens_q",
        ),
        (dict(seq_idx=torch.zeros(1, 9, dtype=torch.int32)), "seq_idx beside position_ids"),
    ],
)
def test_arguments_of_a_forward(arguments, message):
    with pytest.raises(ValueError, match=message):
        build("llama")(IDS, **arguments)


def test_arguments_beside_a_layout():
    model = build("llama")
    ids, given = packed()
    layout, positions = given["layout"], given["position_ids"]

    def refused(message, ids=ids, kind=ValueError, **changes):
        with pytest.raises(kind, match=message):
            model(ids, **given | changes)

    refused("position_ids like layout.position_ids, got others", position_ids=None)
    refused("position_ids like layout.position_ids, got others", position_ids=positions + 1)
    refused(r"restart at 0, got a restart at 4", layout=None)
    refused("layout without attention_mask", attention_mask=(ids != 2).long())
    refused("layout without cu_seq_lens_q", cu_seq_lens_q=torch.tensor([0, 9]))
    refused("9 tokens in one row, like layout", ids=ids.expand(2, -1))
    refused("9 tokens in one row, like layout", ids=ids[:, :8], position_ids=positions[:, :8])
    refused("layout on cpu like the model, got meta", layout=layout.to("meta"))
    refused("layout as a PackedLayout, got dict", kind=TypeError, layout={})
    cache = model(ids[:, :3], use_cache=True)[1]
    kept = {"cache" if hasattr(model(ids[:, :3]), "cache") else "past_key_values": cache}
    refused("and no other keys", **kept)
    refused("beside a cache from before", layout=None, position_ids=positions % 4, **kept)


def test_learned_positions_must_restart_themselves():
    with pytest.raises(ValueError, match="position_ids that restart with cu_seq_lens_q"):
        build("gpt2")(IDS, cu_seq_lens_q=torch.tensor([0, 5, 9]))


def test_generate_after_padding_on_the_right():
    mask = torch.ones_like(IDS)
    mask[:, 6:] = 0
    with pytest.raises(ValueError, match="padding before or after.* Pad on the left"):
        build("llama").generate(IDS, attention_mask=mask, max_new_tokens=3, do_sample=False)


class Layer(nn.Module):
    is_causal = True

    def __init__(self, **config):
        super().__init__()
        self.config = type("Config", (), config)()


def test_layers_that_tell_too_little():
    """Other people's: a window in the configuration alone, no position_ids, masks of their own."""
    query = torch.randn(1, 2, 6, 8)

    def refused(message, mask=None, layer=None, **arguments):
        with pytest.raises(ValueError, match=message):
            attention_function(layer or Layer(), query, query, query, mask, **arguments)

    positions = torch.arange(6)[None]
    layer = Layer(sliding_window=4)
    refused("a sliding_window from each layer", layer=layer, position_ids=positions)
    refused("position_ids in each layer, got none in Layer")
    refused("position_ids .B, T. = .1, 6.", position_ids=positions.expand(3, 1, 6))
    refused("int8 .B, S. = .1, 6.", torch.ones(1, 6).bool(), position_ids=positions)
    refused("bias on its scores", position_ids=positions, position_bias=torch.zeros(1, 2, 6, 6))
    refused("causal attention in Layer, got is_causal False", is_causal=False)
    refused("got is_causal None", layer=nn.Identity(), position_ids=positions)
    for given in (dict(position_ids=positions), dict(position_ids=positions, sliding_window=None)):
        output, weights = attention_function(Layer(), query, query, query, None, **given)
        assert output.shape == (1, 6, 2, 8) and weights is None


def test_register_says_what_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match="hf: expected transformers >= .*fastrl.hf."):
        fastrl.hf.register()


def test_registering_twice_wraps_once():
    from transformers import PreTrainedModel

    fastrl.hf.register()
    before = PreTrainedModel.get_correct_attn_implementation
    fastrl.hf.register()
    assert PreTrainedModel.get_correct_attn_implementation is before
    config = AutoConfig.for_model("stablelm", **SMALL, vocab_size=VOCAB)
    assert AutoModelForCausalLM.from_config(config).config._attn_implementation == "sdpa"


def test_check_knows_a_model_on_our_attention():
    fastrl.hf.check(build("llama"))
    with pytest.raises(ValueError, match="attn_implementation='fastrl' in LlamaForCausalLM.* sdpa"):
        fastrl.hf.check(build("llama", "sdpa"))
