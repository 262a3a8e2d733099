"""Models come back from their folders, in ours and in transformers' hands."""

import json

import pytest
import torch
from hf_models import VOCAB, build
from torch import nn

from fastrl.layout import pack_groups
from fastrl.models import (
    ActorCritic,
    HuggingFacePolicy,
    LSTMLanguageModel,
    as_policy,
    load_model,
    reference_policy,
    save_model,
)

TOKEN_IDS = torch.tensor([[1, 2, 3, 4], [9, 8, 7, 6]])


def lstm():
    return LSTMLanguageModel(VOCAB, 4, 6, 2)


def lora(base=None):
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(target_modules=["q_proj", "v_proj"], r=4, init_lora_weights=False)
    return HuggingFacePolicy(get_peft_model(build("llama") if base is None else base, config))


def with_values(model, critic=None):
    model = ActorCritic(model, critic)
    nn.init.normal_(model.value_head.weight)
    nn.init.constant_(model.value_head.bias, 0.5)
    return model


def in_bfloat16(model):
    for weight in model.parameters():  # model.bfloat16() would round rotary frequencies too
        weight.data = weight.data.bfloat16()
    return model


KINDS = {
    "lstm": lstm,
    "llama": lambda: HuggingFacePolicy(build("llama")),
    "gpt2": lambda: HuggingFacePolicy(build("gpt2")),  # whose head is its embedding
    "lora": lora,
    "values on an lstm": lambda: with_values(lstm()),
    "values on llama": lambda: with_values(build("llama")),
    "values on lora": lambda: with_values(lora()),
    "an lstm's critic": lambda: with_values(lstm(), build("gpt2")),
    "a critic of its own": lambda: with_values(build("llama"), lstm()),
    "bfloat16": lambda: with_values(in_bfloat16(build("llama"))),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_model_comes_back(kind, tmp_path):
    torch.manual_seed(0)
    model = KINDS[kind]()
    save_model(model, tmp_path)
    again = load_model(tmp_path)
    assert type(again) is type(model) and again.config == model.config
    json.dumps(model.config)
    trained = {name: x.requires_grad for name, x in model.named_parameters()}
    assert {name: x.requires_grad for name, x in again.named_parameters()} == trained
    assert {x.dtype for x in again.parameters()} == {x.dtype for x in model.parameters()}
    for one, other in zip(again(TOKEN_IDS)[:-1], model(TOKEN_IDS)[:-1], strict=True):
        assert torch.equal(one, other)
    save_model(again, tmp_path)  # over itself
    assert torch.equal(load_model(tmp_path)(TOKEN_IDS)[0], model(TOKEN_IDS)[0])


@pytest.mark.parametrize("kind", ["llama", "gpt2", "lora", "values on llama", "values on lora"])
def test_transformers_loads_what_we_save(kind, tmp_path):
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = KINDS[kind]()
    save_model(model, tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert theirs.config._attn_implementation == "sdpa"
    expected = model(TOKEN_IDS)[0]
    torch.testing.assert_close(theirs(TOKEN_IDS).logits, expected, rtol=1e-5, atol=1e-5)


def test_an_adapter_is_saved_without_a_model_that_has_a_name(tmp_path):
    from transformers import AutoModelForCausalLM

    save_model(HuggingFacePolicy(build("llama")), tmp_path / "base")
    model = lora(AutoModelForCausalLM.from_pretrained(tmp_path / "base"))
    save_model(model, tmp_path / "adapter")
    assert not (tmp_path / "adapter" / "model.safetensors").exists()
    assert torch.equal(load_model(tmp_path / "adapter")(TOKEN_IDS)[0], model(TOKEN_IDS)[0])
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")
    torch.testing.assert_close(theirs(TOKEN_IDS).logits, model(TOKEN_IDS)[0], rtol=1e-5, atol=1e-5)


def test_layers_trained_in_more_digits_than_their_model_has(tmp_path):
    """PEFT rounds its copies of them to the model's dtype; only the adapter's own stay float32."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    build("llama").bfloat16().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    config = LoraConfig(target_modules=["q_proj"], modules_to_save=["input_layernorm"])
    model = HuggingFacePolicy(get_peft_model(base, config))
    trained = {name: x for name, x in model.named_parameters() if x.requires_grad}
    with torch.no_grad():
        for weight in trained.values():
            weight.add_(torch.rand_like(weight))
    save_model(model, tmp_path / "adapter")
    again = dict(load_model(tmp_path / "adapter").named_parameters())
    assert {again[name].dtype for name in trained} == {torch.bfloat16, torch.float32}
    for name, weight in trained.items():
        assert torch.equal(again[name], weight.to(again[name]))


@pytest.mark.parametrize("kind", ["llama", "lora"])
def test_a_model_is_saved_on_any_rank(kind, tmp_path, monkeypatch):
    """save_pretrained writes on rank 0 alone."""
    model = KINDS[kind]()
    with monkeypatch.context() as patched:
        patched.setattr("torch.distributed.is_initialized", lambda: True)
        patched.setattr("torch.distributed.get_rank", lambda *_: 1)
        save_model(model, tmp_path)
    again, expected = load_model(tmp_path).state_dict(), model.state_dict()
    assert all(torch.equal(again[name], expected[name]) for name in expected)


def test_a_policy_replaces_an_actor_critic(tmp_path):
    model = with_values(lstm(), lstm())
    save_model(model, tmp_path)
    assert (tmp_path / "critic").is_dir()
    save_model(model.language_model, tmp_path)
    assert isinstance(load_model(tmp_path), LSTMLanguageModel)


def test_as_policy_takes_what_people_have(tmp_path):
    policy = HuggingFacePolicy(build("llama"))
    assert as_policy(policy) is policy
    own = lstm()
    assert as_policy(own) is own
    save_model(with_values(policy), tmp_path)
    for model in (build("llama"), str(tmp_path), tmp_path):
        got = as_policy(model)
        assert isinstance(got, HuggingFacePolicy)
        assert torch.equal(got(TOKEN_IDS)[0], policy(TOKEN_IDS)[0])
    save_model(own, tmp_path / "lstm")
    assert torch.equal(as_policy(tmp_path / "lstm")(TOKEN_IDS)[0], own(TOKEN_IDS)[0])
    with pytest.raises(TypeError, match="as_policy: expected model with the methods.*got Linear"):
        as_policy(nn.Linear(2, 2))


def test_the_reference_of_an_lstm_is_a_frozen_copy():
    model = lstm()
    batch = pack_groups([TOKEN_IDS[0]], [[TOKEN_IDS[1]]])
    reference, before = reference_policy(model), model.packed_hidden(batch)
    with torch.no_grad():
        model.embedding.weight.mul_(2)
    assert torch.equal(reference.packed_hidden(batch), before)
    assert not torch.equal(model.packed_hidden(batch), before)
    assert not reference.packed_hidden(batch).requires_grad


@pytest.mark.parametrize("kind", ["tokens", "vera"])
def test_a_model_is_saved_without_any_kind_of_adapter(kind, tmp_path):
    from peft import LoraConfig, VeraConfig, get_peft_model

    if kind == "vera":  # whose random weights all layers share
        config = VeraConfig(target_modules=["q_proj", "o_proj"], r=2, d_initial=0.5)
    else:  # an adapter in a wrapper
        config = LoraConfig(target_modules=["q_proj"], trainable_token_indices=[3, 4])
    model = HuggingFacePolicy(get_peft_model(build("llama"), config))
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.add_(0.1)
    save_model(model, tmp_path)
    assert torch.equal(load_model(tmp_path)(TOKEN_IDS)[0], model(TOKEN_IDS)[0])


def test_a_merged_adapter_is_refused(tmp_path):
    """Its model would be saved with the adapter, and get it once more."""
    model = lora()
    model.model.merge_adapter()
    with pytest.raises(ValueError, match="save_model: expected an adapter beside its model"):
        save_model(model, tmp_path)
    assert not list(tmp_path.iterdir())
    model.model.unmerge_adapter()
    save_model(model, tmp_path)


def test_several_adapters_are_refused(tmp_path):
    from peft import LoraConfig

    model = lora()
    model.model.add_adapter("other", LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match='one adapter, named "default", got default, other'):
        save_model(model, tmp_path)


def test_other_modules_are_refused(tmp_path):
    with pytest.raises(TypeError, match="save_model: expected an LSTMLanguageModel.*got Linear"):
        save_model(nn.Linear(2, 2), tmp_path)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "value_head.safetensors"])
def test_a_folder_that_was_cut_short_is_an_error(name, tmp_path):
    save_model(with_values(lstm()), tmp_path)
    path = tmp_path / name
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(ValueError, match=rf"load_model: expected .*{name} of a saved model"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    "kind, file, weight, message",
    [
        (
            "llama",
            "model",
            "norm.weight",
            "all weights of a LlamaForCausalLM .* none for model.norm",
        ),
        (
            "lora",
            "adapter_model",
            "layers.1.self_attn.v_proj.lora_B.weight",
            "PEFT to load .*lora_B",
        ),
    ],
)
def test_weights_that_are_not_found_are_an_error(kind, file, weight, message, tmp_path):
    """transformers and PEFT go on with others, freshly drawn."""
    from safetensors.torch import load_file, save_file

    save_model(KINDS[kind](), tmp_path)
    path = tmp_path / f"{file}.safetensors"
    weights = load_file(path)
    (name,) = (name for name in weights if name.endswith("model." + weight))
    del weights[name]
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"load_model: expected {message}"):
        load_model(tmp_path)


def test_weights_of_another_model_are_an_error(tmp_path):
    save_model(lstm(), tmp_path)
    save_model(LSTMLanguageModel(VOCAB, 4, 5, 2), tmp_path / "other")
    (tmp_path / "other" / "model.safetensors").replace(tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"expected lm_head.weight torch.float32 \(97, 6\).*got"):
        load_model(tmp_path)


def test_what_is_loaded_by_name_is_float32(tmp_path):
    """A learning rate of 1e-5 moves few 16-bit weights."""
    model = build("llama").to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    assert as_policy(str(tmp_path)).head.weight.dtype == torch.float32
    assert load_model(tmp_path).head.weight.dtype == torch.bfloat16


def test_a_model_cannot_be_its_own_critic():
    model = build("llama")
    with pytest.raises(ValueError, match="expected critic another model"):
        ActorCritic(model, model)
