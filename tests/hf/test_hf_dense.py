"""Rows with and without padding, with and without a cache, against transformers' own attention."""

import inspect

import pytest
import torch
from hf_models import (
    CONFIGS,
    VOCAB,
    assert_equal_gradients,
    build,
    build_pair,
    gradients,
    log_probs,
)

import fastrl.hf
from fastrl import ops
from fastrl.hf._masks import mask_function

# Row by row what stands before and after its tokens.
PADDING = {"none": [(0, 0), (0, 0)], "left": [(4, 0), (0, 0)], "right": [(0, 3), (0, 0)]}
PADDING |= {"both": [(2, 0), (0, 3)]}


def padded(sides, length=9):
    token_ids = torch.randint(2, VOCAB, (len(sides), length))
    mask = torch.ones_like(token_ids)
    for row, (left, right) in zip(mask, sides, strict=True):
        row[:left] = 0
        row[length - right :] = 0
    return token_ids.masked_fill(mask == 0, 0), mask


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("padding", PADDING)
def test_logits_and_gradients_are_those_of_transformers(name, padding):
    token_ids, mask = padded(PADDING[padding])
    # A prediction counts where both tokens exist.
    counts = (mask[:, 1:] & mask[:, :-1]).bool()
    found = []
    for model in build_pair(name):
        log_p = log_probs(model, token_ids, attention_mask=mask if padding != "none" else None)
        predicted = log_p[:, :-1].gather(2, token_ids[:, 1:, None])[..., 0]
        found.append((log_p[mask.bool()], gradients(model, -predicted[counts].mean())))
    (ours, our_gradients), (theirs, their_gradients) = found
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    assert_equal_gradients(our_gradients, their_gradients)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", CONFIGS)
def test_generate_gives_the_same_tokens(name, cache):
    """Past the window, so that the caches of sliding layers roll."""
    token_ids, mask = padded(PADDING["left"], length=6)
    results = [
        model.generate(
            token_ids,
            attention_mask=mask,
            do_sample=False,
            max_new_tokens=9,
            cache_implementation=cache,
            return_dict_in_generate=True,
            output_logits=True,
        )
        for model in build_pair(name)
    ]
    assert results[0].sequences.shape == (2, 15)
    assert torch.equal(results[0].sequences, results[1].sequences)
    ours, theirs = (torch.stack(result.logits) for result in results)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3_text"])
def test_a_prompt_may_be_read_in_two_parts(name):
    """The second part's queries stand at the end of the keys; left padding stays."""
    from transformers import DynamicCache, StaticCache

    token_ids, mask = padded(PADDING["left"], length=11)
    model = build(name)
    whole = model(token_ids, attention_mask=mask, use_cache=False).logits
    takes_cache = "cache" in inspect.signature(model.forward).parameters  # its name since 5.24
    for cache in (DynamicCache(config=model.config), StaticCache(model.config, max_cache_len=13)):
        kept = {"cache" if takes_cache else "past_key_values": cache}
        model(token_ids[:, :5], attention_mask=mask[:, :5], **kept)
        second = model(token_ids[:, 5:], attention_mask=mask, **kept).logits
        torch.testing.assert_close(second, whole[:, 5:], rtol=0, atol=1e-5)


def test_the_attention_is_ours(monkeypatch):
    """Called in each layer, on the heads as they are, with what the mask says of the keys."""
    calls = []

    def attention(query, key, value, **kwargs):
        calls.append((query.shape[1], key.shape[1], kwargs["key_start"], kwargs["key_end"]))
        return original(query, key, value, **kwargs)

    original = ops.attention
    monkeypatch.setattr(ops, "attention", attention)
    token_ids, mask = padded([(4, 0), (0, 3)])
    build("llama")(token_ids, attention_mask=mask)
    assert [heads for *heads, _, _ in calls] == [[4, 2]] * 2
    assert calls[0][2].tolist() == [4, 0]
    assert calls[0][3].tolist() == [9, 9]  # queries stand at the last key, padding or not
    assert calls[0][2] is calls[1][2]  # worked out once


def test_a_row_without_tokens_is_finite():
    token_ids, mask = padded([(9, 0), (0, 0)])
    model = build("llama")
    log_p = log_probs(model, token_ids, attention_mask=mask)
    assert log_p.isfinite().all()
    torch.testing.assert_close(log_p[1:], log_probs(model, token_ids[1:]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("length, offset", [(7, 0), (4096, 0), (1, 4095)])
def test_the_mask_is_none_or_two_dimensional(length, offset):
    """Never [T, S], and none at all where every key is a token."""
    config = build("llama").config
    sizes = dict(batch_size=2, q_length=length, kv_length=length + offset, q_offset=offset)
    ones = torch.ones(2, length + offset, dtype=torch.bool)
    assert mask_function(**sizes, config=config) is None
    assert mask_function(**sizes, config=config, attention_mask=ones) is None
    ones[0, 0] = False
    mask = mask_function(**sizes, config=config, attention_mask=ones)
    assert mask.shape == (2, length + offset) and mask.dtype == torch.int8
    # A static cache: its length is known to the device alone.
    sizes |= dict(kv_length=length + offset + 3, q_offset=torch.tensor(offset))
    mask = mask_function(**sizes, config=config, attention_mask=ones)
    assert mask.sum(1).tolist() == [length + offset - 1, length + offset]
    # What it says of places that are not written is nothing.
    ones = torch.ones(2, length + offset + 3, dtype=torch.bool)
    mask = mask_function(**sizes, config=config, attention_mask=ones)
    assert mask.sum(1).tolist() == [length + offset] * 2


@pytest.mark.parametrize("autocast", [False, True])
def test_sixteen_bits(autocast):
    token_ids, mask = padded(PADDING["both"])
    found = []
    for model in build_pair("llama"):
        if not autocast:
            model = model.to(torch.bfloat16)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            found.append(model(token_ids, attention_mask=mask).logits[mask.bool()].float())
    torch.testing.assert_close(*found, rtol=0.02, atol=0.1)


def test_values_narrower_than_keys():
    """Latent attention, as in DeepSeek."""
    widths = dict(kv_lora_rank=8, q_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=4)
    widths |= dict(v_head_dim=6, n_routed_experts=4, n_group=1, topk_group=1, num_experts_per_tok=2)
    widths |= dict(hidden_size=32, intermediate_size=48, moe_intermediate_size=16)
    widths |= dict(num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4)
    token_ids, _ = padded(PADDING["none"])
    ours, theirs = (build("deepseek_v3", x, **widths) for x in ("fastrl", "eager"))
    torch.testing.assert_close(
        log_probs(ours, token_ids), log_probs(theirs, token_ids), rtol=0, atol=1e-5
    )


def test_a_model_with_three_positions_a_token_is_told_those_of_the_text():
    """Qwen2-VL hands its layers the first of four rows of position_ids; of three, none."""
    from transformers import Qwen2_5_VLTextConfig
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLTextModel

    fastrl.hf.register()
    torch.manual_seed(0)
    rope = {"rope_type": "default", "mrope_section": [1, 2, 1], "rope_theta": 1e4}
    widths = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2)
    heads = dict(num_attention_heads=4, num_key_value_heads=2)
    model = Qwen2_5_VLTextModel(
        Qwen2_5_VLTextConfig(vocab_size=20, rope_parameters=rope, **widths, **heads)
    )
    ids, mask = torch.randint(1, 20, (2, 7)), torch.ones(2, 7, dtype=torch.long)
    mask[0, :3] = 0
    text = (mask.cumsum(1) - 1).clamp(min=0)
    grid = torch.stack([text, text // 2, text.flip(1)])  # as of an image

    def states(attention, position_ids):
        model.set_attn_implementation(attention)
        return model(ids, attention_mask=mask, position_ids=position_ids).last_hidden_state

    four = torch.cat([text[None], grid])
    found, expected = states("fastrl", four), states("sdpa", grid)
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="got none in Qwen2_5_VLAtt.* pass position_ids, .4, B, T"):
        states("fastrl", grid)
