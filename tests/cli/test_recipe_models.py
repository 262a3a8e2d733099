"""Recipes whose model is one of transformers."""

import json

import pytest
import torch

for package in ("rich", "safetensors", "tensorboard", "transformers"):
    pytest.importorskip(package)

from fastrl.cli import eval as evaluation  # noqa: E402
from fastrl.cli import sample, train  # noqa: E402
from fastrl.cli.recipes import models  # noqa: E402
from fastrl.cli.recipes.built_in import find_recipe  # noqa: E402
from fastrl.cli.recipes.parse import read_recipe  # noqa: E402
from fastrl.cli.recipes.toml import RecipeError  # noqa: E402

TINY = [
    "train.max_steps=2", "train.prompts_per_step=4", "train.completions_per_prompt=4",
    "train.max_new_tokens=8", "train.save_every=1", "log.tensorboard=false",
    "eval.completions_per_prompt=1",
]  # fmt: skip


def options(*sets):
    return [option for text in (*TINY, *sets) for option in ("--set", text)]


def build(*sets, name="tiny_grpo"):
    recipe = read_recipe(find_recipe(name), sets)
    assert recipe.model.tokenizer == "bytes"
    return models.build_model(recipe, models.load_tokenizer("bytes"), seed=3)


def test_the_bytes_tokenizer_has_ids_for_any_text():
    tokenizer = models.load_tokenizer("bytes")
    text = "".join(map(chr, range(1, 800))) + " 日本 🙂"
    ids = tokenizer.encode(text)
    assert len(ids) == len(text.encode()) and max(ids) < len(tokenizer) == 257
    assert tokenizer.decode(ids) == text and tokenizer.eos_token_id == 0 not in ids


def test_a_random_model_is_a_function_of_the_seed():
    one, other = build(), build()
    weights = zip(one.parameters(), other.parameters(), strict=True)
    assert all(torch.equal(mine, theirs) for mine, theirs in weights)
    assert (one.vocab_size, one.hidden_dim) == (257, 64)
    assert build("model.dtype=bfloat16").head.weight.dtype == torch.bfloat16


def test_lora_trains_the_adapter_alone():
    pytest.importorskip("peft")
    model = build('model.lora={r = 2, target_modules = ["q_proj"]}')
    trained = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in name for name in trained)
    assert sum(trained.values()) == 2 * 2 * (64 + 64)  # layers, rank, in and out
    with pytest.raises(RecipeError, match="model.lora to be arguments of peft.LoraConfig"):
        build("model.lora={rank = 2}")


def test_a_critic_is_shared_or_of_its_own(tmp_path):
    shared = build(name="tiny_ppo")
    assert shared.critic is None and shared.value_head.in_features == 64
    own = build("model.critic=same", name="tiny_ppo")
    mine, theirs = own.language_model.head.weight, own.critic.head.weight
    assert mine.shape == theirs.shape and not torch.equal(mine, theirs)
    small = build("model.random.hidden_size=32").model
    small.save_pretrained(tmp_path)
    assert build(f"model.critic={tmp_path}", name="tiny_ppo").value_head.in_features == 32


def test_an_older_name_of_a_models_key_is_one():
    older = "{model_type='gemma3_text', hidden_size=8, intermediate_size=8, num_hidden_layers=2"
    older += ", num_attention_heads=1, num_key_value_heads=1, head_dim=8, sliding_window_pattern=2}"
    kinds = build(f"model.random={older}").model.config.layer_types
    assert kinds == ["sliding_attention", "full_attention"]


def test_models_that_cannot_be_built():
    for sets, message in {
        ("model.random.model_type=lama",): "got lama. Did you mean llama?",
        ("model.random.hiden_size=32",): "a config of llama has, got hiden_size. Did you mean hid",
        ("model.random.hidden_size=63",): "model.random",
        ("model.random.vocab_size=100",): "each of the tokenizer's 257 tokens, got 100",
    }.items():
        with pytest.raises(RecipeError, match=message):
            build(*sets)


@pytest.mark.parametrize("name", ["tiny_grpo", "tiny_ppo"])
def test_a_recipe_that_comes_with_fastrl(tmp_path, capsys, name):
    """Trained, resumed, sampled from, evaluated, and loaded by transformers."""
    from transformers import AutoModelForCausalLM

    folder = tmp_path / "run"
    assert train.main([name, *options("train.max_steps=1"), "--output", str(folder)]) == 0
    assert train.main(["--resume", str(folder), *options()]) == 0
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2] and lines[1]["logprob_gap"] < 1e-5
    capsys.readouterr()
    greedy = ["--prompt", "hi", "--temperature", "0", "--max-new-tokens", "6", "--json"]
    assert sample.main([str(folder), *greedy]) == 0
    entry = json.loads(capsys.readouterr().out)
    model = AutoModelForCausalLM.from_pretrained(folder / "checkpoint").eval()
    ids = torch.tensor([models.load_tokenizer("bytes").encode("hi")])
    expected = model.generate(ids, do_sample=False, max_new_tokens=6, eos_token_id=0)
    assert entry["token_ids"] == expected[0, 2:].tolist()
    assert evaluation.main([str(folder), "--json", str(tmp_path / "eval.json")]) == 0
    result = json.loads((tmp_path / "eval.json").read_text())
    assert result["num_prompts"] == 4 and 0 <= result["rewards/lower_case"]["mean"] <= 1
