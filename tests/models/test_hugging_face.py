"""HuggingFacePolicy: what transformers computes, from packed batches; heads and adapters."""

import pytest
import torch
from hf_models import VOCAB, assert_equal_gradients, build, build_pair, gradients
from torch import nn

from fastrl.layout import PackedBatch, pack_groups
from fastrl.models import (
    HuggingFacePolicy,
    PolicyModel,
    as_policy,
    load_model,
    reference_policy,
    save_model,
)
from fastrl.rollout import generate

MODELS = ["llama", "mistral", "gemma2", "gpt2", "gpt_neox", "opt"]
HYBRID = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
HYBRID |= dict(num_key_value_heads=2, num_local_experts=0, shared_intermediate_size=48)
HYBRID |= dict(mamba_n_heads=4, mamba_d_head=16)
LORA = {"target_modules": ["q_proj", "v_proj"], "r": 4}


def some_ids(*lengths):
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(1, VOCAB, (length,), generator=generator) for length in lengths]


def groups():
    a, b, c, d, e, f = some_ids(5, 1, 3, 2, 4, 0)
    return [a, b], [[c, d], [e, f]]


def with_lora(**options):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(build("llama"), LoraConfig(**{**LORA, **options}))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:  # else they are zero
                weight.normal_(std=0.3, generator=generator)
    return model


@pytest.mark.parametrize("name", MODELS)
def test_packed_hidden_is_that_of_each_completion_alone(name):
    ours, theirs = build_pair(name)
    policy = HuggingFacePolicy(ours)
    assert isinstance(policy, PolicyModel)
    prompts, completions = groups()
    batch = pack_groups(prompts, completions)
    logits = batch.unpack(policy.head.logits(policy.packed_hidden(batch)))
    owners = [(p, c) for p, group in zip(prompts, completions, strict=True) for c in group]
    for got, (prompt, completion) in zip(logits, owners, strict=True):
        if len(completion):
            whole = theirs(torch.cat([prompt, completion])[None], use_cache=False).logits[0]
            torch.testing.assert_close(got, whole[len(prompt) - 1 : -1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "name, widths",
    [
        ("gpt_bigcode", dict(n_embd=32, n_layer=2, n_head=4, attn_pdrop=0.0)),
        ("granitemoehybrid", HYBRID | dict(layer_types=["full_attention"] * 2)),
    ],
)
def test_layers_that_are_not_told_position_ids(name, widths):
    ours, theirs = (build(name, attention, **widths) for attention in ("fastrl", "sdpa"))
    with pytest.raises(ValueError, match="expected position_ids in each layer"):
        ours(torch.arange(9)[None])
    policy, (prompts, _) = HuggingFacePolicy(ours), groups()
    torch.testing.assert_close(policy(prompts[0][None])[0], theirs(prompts[0][None]).logits)
    rollout = generate(policy, prompts, max_new_tokens=4, seeds=torch.arange(2))
    packed = policy.head.logits(policy.packed_hidden(rollout.batch)).log_softmax(-1)
    expected = []
    for prompt, completion in zip(prompts, rollout.completion_ids, strict=True):
        whole = theirs(torch.cat([prompt, completion])[None], use_cache=False).logits[0]
        expected.append(whole[len(prompt) - 1 : -1].log_softmax(-1))
    torch.testing.assert_close(packed, torch.cat(expected), rtol=0, atol=1e-5)
    sampled = torch.cat(expected).gather(1, rollout.token_ids[:, None])[:, 0]
    torch.testing.assert_close(rollout.logprobs, sampled, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["gemma3", "llava"])
def test_models_that_see_images_too(name, tmp_path):
    """Their configuration's sizes are those of its parts."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    text = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    text |= dict(num_key_value_heads=2, head_dim=8, vocab_size=VOCAB, pad_token_id=0)
    text |= dict(model_type="llama") if name == "llava" else dict(sliding_window=4)
    image = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    image |= dict(image_size=16, patch_size=8)
    config = AutoConfig.for_model(name, text_config=text, vision_config=image)
    model = AutoModelForImageTextToText.from_config(config)
    policy, (prompts, _) = HuggingFacePolicy(model.eval()), groups()
    rollout = generate(policy, prompts, max_new_tokens=6, seeds=torch.arange(2))
    log_p = policy.head.logits(policy.packed_hidden(rollout.batch)).log_softmax(-1)
    expected = log_p.gather(1, rollout.token_ids[:, None])[:, 0]
    torch.testing.assert_close(rollout.logprobs, expected, rtol=0, atol=1e-5)
    save_model(policy, tmp_path)
    again = load_model(tmp_path)
    assert torch.equal(again(prompts[0][None])[0], policy(prompts[0][None])[0])


@pytest.mark.parametrize("first", ["full_attention", "linear_attention"])
def test_recurrent_layers_are_refused(first):
    """Where no layer has attention, nothing else would look at the layout."""
    model = build("granitemoehybrid", **HYBRID, layer_types=[first, "linear_attention"])
    policy = HuggingFacePolicy(model)
    with pytest.raises(ValueError, match="attention in all layers.* got linear_attention"):
        policy.packed_hidden(pack_groups(*groups()))


def test_a_batch_without_tokens_has_no_hidden_states():
    policy = HuggingFacePolicy(build("llama"))
    batch = PackedBatch.from_segments([], [])
    assert policy.packed_hidden(batch).shape == (0, 32)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_hidden_states_go_on_from_a_state(name):
    policy = HuggingFacePolicy(build(name))
    token_ids = torch.stack(some_ids(6, 6))
    whole, _ = policy(token_ids)
    first, state = policy(token_ids[:, :4])
    second, _ = policy(token_ids[:, 4:], state)
    torch.testing.assert_close(torch.cat([first, second], 1), whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "name, options",
    [
        ("gemma2", {"final_logit_softcapping": 2.0}),
        ("granite", {"logits_scaling": 4.0}),
        ("hyperclovax", {"logits_scaling": 4.0}),
        ("cohere", {"logit_scale": 0.25}),
        ("phi", {}),  # a bias
    ],
)
def test_the_head_is_the_models(name, options):
    widths = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    policy = HuggingFacePolicy(build(name, **widths, **options))
    (token_ids,) = some_ids(6)
    hidden, _ = policy.hidden_states(token_ids[None])
    expected = policy.causal(token_ids[None]).logits
    torch.testing.assert_close(policy.head.logits(hidden), expected)
    assert (policy.vocab_size, policy.hidden_dim) == (VOCAB, 32)


def test_a_head_of_another_kind_is_refused():
    model = build("llama")
    model.lm_head.register_forward_hook(lambda _, __, logits: logits * 1.01)
    with pytest.raises(ValueError, match="expected LlamaForCausalLM to end in weight, bias"):
        HuggingFacePolicy(model)


def test_a_head_of_16_bits_may_have_logits_of_32():
    model = build("llama").to(torch.bfloat16)
    model.lm_head.register_forward_hook(
        lambda layer, args, _: nn.functional.linear(args[0].float(), layer.weight.float())
    )
    assert HuggingFacePolicy(model).head.weight is model.lm_head.weight


def test_models_without_a_head_and_other_modules_are_refused():
    with pytest.raises(ValueError, match="expected a model with a head on its vocabulary"):
        HuggingFacePolicy(build("llama").model)
    with pytest.raises(TypeError, match="expected a model of transformers.*got Linear"):
        HuggingFacePolicy(nn.Linear(2, 2))


def test_a_model_whose_attention_cannot_be_replaced_is_refused_for_what_it_is():
    model = build("bloom", "eager", hidden_size=32, n_layer=1, n_head=4)
    with pytest.raises(ValueError, match="a model that hands its arguments on .*got BloomForCau"):
        HuggingFacePolicy(model)


def test_another_attention_is_replaced():
    model = build("llama", "sdpa")
    policy = HuggingFacePolicy(model)
    assert model.config._attn_implementation == "fastrl"
    prompts, completions = groups()
    policy.packed_hidden(pack_groups(prompts, completions))


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "gemma3_text"])
@pytest.mark.parametrize("training", [False, True])
def test_gradient_checkpointing_changes_no_gradient(name, training):
    policy = HuggingFacePolicy(build(name)).train(training)
    batch = pack_groups(*groups())
    calls = []
    norm = next(x for n, x in policy.named_modules() if n.endswith(("layers.0", "h.0")))
    next(norm.children()).register_forward_hook(lambda *_: calls.append(1))

    def loss():
        hidden = policy.packed_hidden(batch)
        return (hidden * torch.linspace(-1, 1, hidden.numel()).view_as(hidden)).sum()

    plain = gradients(policy, loss())
    assert len(calls) == 1
    policy.gradient_checkpointing(True)
    assert_equal_gradients(gradients(policy, loss()), plain, atol=0)
    assert len(calls) == 3  # once more in the backward pass
    assert all(module.training == training for module in policy.modules())
    policy.gradient_checkpointing(False)
    policy.packed_hidden(batch)
    assert len(calls) == 4


def test_gradient_checkpointing_leaves_dropout_off():
    policy = HuggingFacePolicy(build("opt", dropout=0.5)).eval()
    batch = pack_groups(*groups())
    expected = policy.packed_hidden(batch)
    plain = gradients(policy, expected.square().sum())
    policy.gradient_checkpointing(True)
    hidden = policy.packed_hidden(batch)
    torch.testing.assert_close(hidden, expected, rtol=0, atol=0)
    assert_equal_gradients(gradients(policy, hidden.square().sum()), plain, atol=0)


LONG = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "factor": 4.0}
LONG |= {"original_max_position_embeddings": 8, "rope_type": "longrope"}


@pytest.mark.parametrize("rope", [{"rope_type": "dynamic", "factor": 2.0}, LONG])
def test_positions_end_where_frequencies_follow_the_longest_text(rope):
    rope = {"rope_theta": 1e4, **rope}
    policy = HuggingFacePolicy(build("llama", rope_parameters=rope, max_position_embeddings=8))
    prompts = [torch.tensor([1, 2, 3])]
    rollout = generate(policy, prompts, max_new_tokens=5, seeds=torch.zeros(1, dtype=torch.int64))
    log_p = policy.head.logits(policy.packed_hidden(rollout.batch)).log_softmax(-1)
    expected = log_p.gather(1, rollout.token_ids[:, None])[:, 0]
    torch.testing.assert_close(rollout.logprobs, expected, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="expected prompt and max_new_tokens at most 8 tokens"):
        generate(policy, prompts, max_new_tokens=6, seeds=torch.zeros(1, dtype=torch.int64))


@pytest.mark.parametrize("name", ["gpt2", "opt", "llama", "gpt_neox"])
def test_positions_end_where_the_model_has_a_table_of_them(name):
    """At the limit all goes well; behind it a message comes before anything is read."""
    policy = HuggingFacePolicy(build(name, max_position_embeddings=12)).eval()
    prompts, (completion,) = some_ids(2, 7), some_ids(5)
    seeds = torch.tensor([1, 2])

    def sampled(max_new_tokens):
        rollout = generate(policy, prompts, max_new_tokens=max_new_tokens, seeds=seeds)
        policy.packed_hidden(rollout.batch)

    sampled(5)
    state = policy.hidden_states(prompts[1][None])[1]
    policy.hidden_states(completion[None], state)
    branches = PackedBatch.from_segments([prompts[1], completion, completion], [-1, 0, 0])
    policy.packed_hidden(branches)  # 17 tokens, of which no path has more than 12
    if name in ("llama", "gpt_neox"):
        assert policy.num_positions is None
        sampled(6)
        return
    policy.trunk.register_forward_pre_hook(lambda *_: pytest.fail("something was read"))
    with pytest.raises(ValueError, match=r"generate: .* at most 12 tokens.*, got 7 \+ 6 at 1\."):
        sampled(6)
    chain = PackedBatch.from_segments([prompts[1], completion, completion[:1]], [-1, 0, 1])
    with pytest.raises(ValueError, match="packed_hidden: .* at most 12 tokens.*, got 13"):
        policy.packed_hidden(chain)
    with pytest.raises(ValueError, match="hidden_states: .* at most 12 tokens.*, got 13"):
        policy.hidden_states(completion[None, :1], state)


def test_only_the_adapter_has_gradients():
    policy = HuggingFacePolicy(with_lora())
    policy.packed_hidden(pack_groups(*groups())).square().sum().backward()
    got = {name for name, x in policy.named_parameters() if x.grad is not None}
    assert got == {name for name, _ in policy.named_parameters() if "lora_" in name}
    assert len(got) == 8  # A and B of two modules in two layers


def test_the_reference_of_an_adapter_is_the_model_without_it():
    base, policy = HuggingFacePolicy(build("llama")), HuggingFacePolicy(with_lora())
    batch = pack_groups(*groups())
    frozen = next(x for name, x in policy.named_parameters() if "lora_A" in name)
    frozen.requires_grad_(False)
    trained = [x.requires_grad for x in policy.parameters()]
    reference = reference_policy(policy.train())
    hidden = policy.packed_hidden(batch)
    assert isinstance(reference, PolicyModel)
    assert torch.equal(reference.packed_hidden(batch), base.packed_hidden(batch))
    assert torch.equal(policy.packed_hidden(batch), hidden)  # the adapter is on again
    assert (hidden - base.packed_hidden(batch)).abs().max() > 0.1
    assert [x.requires_grad for x in policy.parameters()] == trained
    assert not reference.packed_hidden(batch).requires_grad and policy.training
    decoders = [x.decoder(1, 4) for x in (reference, base)]
    for decoder in decoders:
        decoder.open([0] if len(decoder.read(some_ids(5))) else [])
    steps = [decoder.step(torch.tensor([3])) for decoder in decoders]
    assert torch.equal(*steps)
    ids = torch.stack(some_ids(5))
    assert torch.equal(*(x.hidden_states(ids)[0] for x in (reference, base)))


def test_the_reference_of_another_model_is_a_copy():
    policy = HuggingFacePolicy(build("llama"))
    batch = pack_groups(*groups())
    reference, before = reference_policy(policy), policy.packed_hidden(batch)
    with torch.no_grad():
        policy.model.model.embed_tokens.weight.mul_(2)
    assert torch.equal(reference.packed_hidden(batch), before)
    assert not torch.equal(policy.packed_hidden(batch), before)
    assert not any(x.requires_grad for x in reference.parameters())


@pytest.mark.parametrize(
    "options, message",
    [
        ({"target_modules": ["lm_head"]}, "expected no adapter on the output head, got Linear"),
        ({"modules_to_save": ["lm_head"]}, "on the output head, got ModulesToSaveWrapper"),
    ],
)
def test_adapters_on_the_head_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        as_policy(with_lora(**options))


def test_adapters_that_depend_on_more_than_a_layers_input_are_refused():
    from peft import AdaptionPromptConfig, PromptTuningConfig, get_peft_model

    prompt = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    inside = AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=2, adapter_layers=1)
    for config, got in (
        (prompt, "one that adds tokens to the prompt"),
        (inside, "AdaptionPromptM"),
    ):
        with pytest.raises(ValueError, match=f"an adapter of layers, like LoRA, got {got}"):
            as_policy(get_peft_model(build("llama"), config))
    with pytest.raises(ValueError, match="like LoRA, got one that begins at its alora_invoc"):
        as_policy(with_lora(alora_invocation_tokens=[5, 6], task_type="CAUSAL_LM"))
