"""The decoder of transformers' models: forward passes over everything, without computing them."""

import pytest
import torch
from hf_models import VOCAB, build, build_pair

from fastrl.models import HuggingFacePolicy
from fastrl.models._kv_decoder import KVDecoder
from fastrl.rollout import completion_seeds, generate

MODELS = ["llama", "qwen3", "mistral", "gemma2", "gemma3_text", "gpt_oss"]
MODELS += ["gpt2", "gpt_neox", "phi", "opt"]
CHANGES = {"gemma2": {"final_logit_softcapping": 3.0}}
# Longer than the windows of 4, one of a single token, and the longest last: places must grow.
LENGTHS = (5, 1, 3, 6, 2, 9)
EOS = [3, 5, 7, 9, 11, 13, 20, 33]  # completions of many lengths


def prompts():
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(1, VOCAB, (length,), generator=generator) for length in LENGTHS]


def sample(policy, count=3, length=12, **options):
    seeds = completion_seeds(0, 0, torch.arange(len(LENGTHS)), count)
    options = {"eos_token_id": EOS, **options}
    return generate(
        policy,
        prompts(),
        completions_per_prompt=count,
        max_new_tokens=length,
        seeds=seeds,
        **options,
    )


@pytest.mark.parametrize("name", MODELS)
def test_logprobs_while_sampling_are_those_of_a_packed_forward(name):
    policy = HuggingFacePolicy(build(name, **CHANGES.get(name, {})))
    rollout = sample(policy)
    assert len(set(rollout.lengths.tolist())) > 3
    with torch.no_grad():
        log_p = policy.head.logits(policy.packed_hidden(rollout.batch)).log_softmax(-1)
    expected = log_p.gather(1, rollout.token_ids[:, None])[:, 0]
    torch.testing.assert_close(rollout.logprobs, expected, rtol=0, atol=1e-5)
    # Few rows at a time: prompts and rows come and go, and the caches move.
    few = sample(policy, max_rows=4)
    assert torch.equal(few.token_ids, rollout.token_ids)
    torch.testing.assert_close(few.logprobs, rollout.logprobs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_greedy_tokens_are_those_of_transformers_generate(name):
    ours, theirs = build_pair(name, **CHANGES.get(name, {}))
    rollout = sample(HuggingFacePolicy(ours), count=1, temperature=0.0, eos_token_id=None)
    for prompt, got in zip(prompts(), rollout.completion_ids, strict=True):
        ids = theirs.generate(
            prompt[None], attention_mask=torch.ones_like(prompt)[None], max_new_tokens=12,
            do_sample=False, eos_token_id=None,
        )  # fmt: skip
        assert torch.equal(got, ids[0, len(prompt) :])


def test_finished_rows_are_in_no_product_and_prompts_are_read_once():
    model = build("llama")
    policy, read = HuggingFacePolicy(model), []
    model.model.layers[0].mlp.register_forward_hook(
        lambda _, args, __: read.append(args[0].shape[:-1].numel())
    )
    lengths = sample(policy).lengths
    assert read[0] == sum(LENGTHS)
    assert read[1:] == [int((lengths > step).sum()) for step in range(1, int(lengths.max()))]


def decoder_of(model, max_rows, **options):
    policy = HuggingFacePolicy(model)
    return policy, policy.decoder(max_rows, **{"max_new_tokens": 4, **options})


def test_rows_that_are_dead_but_not_moved_change_nothing():
    policy, decoder = decoder_of(build("mistral"), 12)
    some = prompts()[:2]
    decoder.read(some)
    decoder.open([0] * 6 + [1] * 6)
    first, second = torch.arange(12) + 1, torch.arange(11) + 20
    decoder.step(first)
    kept = torch.tensor([0, 1, 2, 4, 5, 6, 7, 8, 9, 10, 11])
    decoder.keep(kept)
    assert len(decoder._owners) == 12  # nothing has moved
    texts = [
        torch.cat([some[int(row) // 6], torch.stack([old, new])])
        for row, old, new in zip(kept, first[kept], second, strict=True)
    ]
    hidden = decoder.step(second)
    for got, ids in zip(hidden, texts, strict=True):
        expected, _ = policy.hidden_states(ids[None])
        torch.testing.assert_close(got, expected[0, -1], rtol=0, atol=1e-5)
    decoder.open([1])  # the dead row has to make room
    third = torch.arange(12) + 5
    for got, ids, new in zip(decoder.step(third), [*texts, some[1]], third, strict=True):
        expected, _ = policy.hidden_states(torch.cat([ids, new[None]])[None])
        torch.testing.assert_close(got, expected[0, -1], rtol=0, atol=1e-5)


def test_prompts_that_are_through_make_room_for_others():
    policy, decoder = decoder_of(build("llama"), 2)
    for _ in range(20):
        read = decoder.read(prompts()[:1])
        decoder.open([decoder._prompts._num_read - 1])
        ids = torch.cat([prompts()[0], torch.tensor([8])])
        expected, _ = policy.hidden_states(ids[None])
        torch.testing.assert_close(read[0], expected[0, -2], rtol=0, atol=1e-5)
        hidden = decoder.step(torch.tensor([8]))
        torch.testing.assert_close(hidden[0], expected[0, -1], rtol=0, atol=1e-5)
        decoder.keep(torch.empty(0, dtype=torch.int64))
    assert decoder._cache.places <= 3


def test_prompts_behind_a_long_row_make_room_for_others():
    policy, decoder = decoder_of(build("llama"), 2, max_new_tokens=30)
    decoder.read(prompts()[:1])
    decoder.open([0])
    for number in range(1, 20):
        decoder.read(prompts()[number % 3 : number % 3 + 1])
        decoder.open([number])
        hidden = decoder.step(torch.tensor([8, 9]))
        decoder.keep(torch.tensor([0]))
        for row, first in ((0, [8] * number), (number % 3, [9])):
            ids = torch.cat([prompts()[row], torch.tensor(first)])
            expected, _ = policy.hidden_states(ids[None])
            at = 0 if first[0] == 8 else 1
            torch.testing.assert_close(hidden[at], expected[0, -1], rtol=0, atol=1e-5)
    assert decoder._cache.places <= 6


def test_prompts_are_read_some_at_a_time(monkeypatch):
    monkeypatch.setattr("fastrl.models._kv_decoder._TOKENS_AT_A_TIME", 8)
    policy = HuggingFacePolicy(build("llama"))
    in_parts = sample(policy)
    monkeypatch.undo()
    assert torch.equal(in_parts.token_ids, sample(policy).token_ids)


def test_under_autocast_the_cache_has_its_dtype():
    policy = HuggingFacePolicy(build("llama"))
    with torch.autocast("cpu", torch.bfloat16):
        rollout = sample(policy)
        decoder = policy.decoder(2, 4)
        decoder.read(prompts())
        log_p = policy.head.logits(policy.packed_hidden(rollout.batch)).log_softmax(-1)
    assert {x.key.dtype for x in decoder._cache.layers.values()} == {torch.bfloat16}
    expected = log_p.gather(1, rollout.token_ids[:, None])[:, 0]
    assert (rollout.logprobs - expected).abs().mean() < 0.1  # nats; logits here are of order 10


def test_more_rows_than_there_is_room_for_are_an_error():
    _, decoder = decoder_of(build("llama"), 2)
    decoder.read(prompts()[:1])
    with pytest.raises(ValueError, match="expected at most max_rows = 2 rows, got 3"):
        decoder.open([0, 0, 0])


def test_a_step_too_many_is_an_error():
    _, decoder = decoder_of(build("llama"), 2)  # whose buffers have no row behind these
    decoder.read(prompts()[:1])
    decoder.open([0, 0])
    for _ in range(3):
        decoder.step(torch.tensor([8, 9]))
    with pytest.raises(ValueError, match=r"expected key_end in \[0, 3\], got 4"):
        decoder.step(torch.tensor([8, 9]))


def test_rows_that_take_the_places_of_others_are_quick_too(monkeypatch):
    own, slow = KVDecoder.attend, []
    monkeypatch.setattr(KVDecoder, "attend", lambda *a, **k: slow.append(1) or own(*a, **k))
    model = build("llama")
    assert len(sample(HuggingFacePolicy(model), max_rows=4).token_ids) > 100
    assert len(slow) == model.config.num_hidden_layers  # in the first step


def test_models_whose_caches_are_not_one_a_layer_are_refused():
    model = build("llama")
    policy, decoder = decoder_of(model, 2)
    model.model.layers[1].self_attn.layer_idx = 0
    with pytest.raises(ValueError, match=r"expected keys from each of 2 layers.*layers \[0, 0\]"):
        decoder.read(prompts())
    del model.model.layers[1].self_attn.layer_idx
    for nameless in (decoder, policy.decoder(2, 4)):
        with pytest.raises(ValueError, match="expected layer_idx in LlamaAttention, got none"):
            nameless.read(prompts())
    model.config.num_kv_shared_layers = 1
    with pytest.raises(ValueError, match="expected a cache of its own in each layer"):
        policy.decoder(2, 4)


def test_a_model_that_hides_its_window_is_refused_when_it_may_matter():
    model = build("phi")  # whose layers pass no window on
    model.config.sliding_window = 8
    _, decoder = decoder_of(model, 2, max_new_tokens=6)
    with pytest.raises(ValueError, match="expected a sliding_window from each layer"):
        decoder.read(prompts()[:1])  # 5 tokens, and 5 more
    model.config.sliding_window = 0  # none, as Qwen2Moe's configuration says it
    decoder.read(prompts()[:1])
