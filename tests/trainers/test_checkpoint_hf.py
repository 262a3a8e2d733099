"""Checkpoints of Hugging Face policies: bitwise resumption, and folders that transformers loads."""

import pytest
import safetensors.torch
import torch
from hf_models import VOCAB, build
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from fastrl.models import ActorCritic

TOKEN_IDS = torch.tensor([[1, 5, 9, 2]])


def with_lora(model):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(3)
    return get_peft_model(model, LoraConfig(target_modules=["q_proj", "v_proj"], r=2))


MODELS = {
    "llama": lambda: build("llama"),
    "tied": lambda: build("qwen2", tie_word_embeddings=True),
    "lora": lambda: with_lora(build("llama")),
    "values": lambda: ActorCritic(build("llama")),
    "lora_values": lambda: ActorCritic(with_lora(build("llama"))),
    "critic": lambda: ActorCritic(with_lora(build("llama")), build("qwen2")),
}


def weights_of(trainer):
    return {name: w.detach().clone() for name, w in trainer.model.state_dict().items()}


@pytest.mark.parametrize("name", MODELS)
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(make_trainer, tmp_path, name):
    kind = "actor_critic" if isinstance(MODELS[name](), ActorCritic) else "policy_gradient"

    def make():
        return make_trainer(kind, model=MODELS[name](), max_steps=4, kl_coef=0.1)

    whole, first, second = make(), make(), make()
    start = weights_of(first)
    records = whole.train()
    first.train(max_steps=2)
    first.save(tmp_path / "run")
    with torch.no_grad():
        for weight in second.model.parameters():
            if weight.requires_grad:
                weight.fill_(0.5)
    later = second.resume(tmp_path / "run").train()
    for key in ("loss", "kl", "reward"):
        assert [r[key] for r in later] == [r[key] for r in records[2:]]
    end, expected = weights_of(second), weights_of(whole)
    assert all(torch.equal(end[key], expected[key]) for key in start)
    parameters = second.model.named_parameters(remove_duplicate=False)
    trained = {key for key, weight in parameters if weight.requires_grad}
    moved = {key for key in start if not torch.equal(end[key], start[key])}
    assert moved == trained - {"critic.model.lm_head.weight"}  # which computes nothing


@pytest.mark.parametrize("name", ["llama", "tied", "lora"])
def test_transformers_loads_a_checkpoint(make_trainer, tmp_path, name):
    trainer = make_trainer(model=MODELS[name](), tokenizer=tokenizer())
    trainer.train(max_steps=2)
    trainer.save(tmp_path / "run")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    with torch.no_grad():
        expected = trainer.policy.causal(TOKEN_IDS).logits
        torch.testing.assert_close(loaded(TOKEN_IDS).logits, expected)
    tokens = AutoTokenizer.from_pretrained(tmp_path / "run").convert_ids_to_tokens([3, 4])
    assert tokens == ["<3>", "<4>"]
    for path in (tmp_path / "run").iterdir():
        assert (
            path.stat().st_mode & 0o777
            == (tmp_path / "run" / "trainer.json").stat().st_mode & 0o777
        )


def tokenizer():
    from tokenizers import Tokenizer, models

    vocabulary = {f"<{index}>": index for index in range(VOCAB)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(vocabulary, "<0>")))


def test_an_adapter_s_checkpoint_holds_the_starting_model_once(make_trainer, tmp_path):
    """The reference is the model with its adapter off; only the adapter has moments."""
    trainer = make_trainer(model=MODELS["lora"](), kl_coef=0.1)
    trainer.train(max_steps=1)
    trainer.save(tmp_path / "run")
    assert not (tmp_path / "run" / "reference.safetensors").exists()
    state = safetensors.torch.load_file(tmp_path / "run" / "state.safetensors")
    kept = {n for n in state if n.startswith(("weights/", "optimizer/"))}
    assert kept and all("lora_" in name for name in kept)


def test_another_adapter_is_refused(make_trainer, tmp_path):
    make_trainer(model=MODELS["lora"]()).save(tmp_path / "run")
    trainer = make_trainer(model=MODELS["llama"]())
    before = weights_of(trainer)
    with pytest.raises(ValueError, match="weights .* to be trained|expected model"):
        trainer.resume(tmp_path / "run")
    for name, weight in weights_of(trainer).items():
        assert torch.equal(weight, before[name])
