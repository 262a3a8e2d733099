import json
import shutil

import pytest
import torch

for package in ("rich", "safetensors", "tensorboard", "transformers"):
    pytest.importorskip(package)

from fastrl.cli import eval as evaluation  # noqa: E402
from fastrl.cli import main as cli  # noqa: E402
from fastrl.cli import sample, train  # noqa: E402
from fastrl.cli.recipes.models import load_tokenizer  # noqa: E402
from fastrl.cli.recipes.sampled_as import trained_with  # noqa: E402
from fastrl.models import LSTMLanguageModel  # noqa: E402
from fastrl.trainers import PolicyGradientConfig, PolicyGradientTrainer, load_model  # noqa: E402

RECIPE = """
algorithm = "grpo"
[model]
lstm = {embed_dim = 8, hidden_dim = 16}
tokenizer = "bytes"
[data]
prompts = ["one", "two words"]
[rewards]
functions = ["fastrl.cli.recipes.toy_rewards:vowels"]
[train]
max_steps = 2
prompts_per_step = 2
completions_per_prompt = 2
max_new_tokens = 4
learning_rate = 0.1
[log]
tensorboard = false
samples_every = 0
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sample")
    (folder / "recipe.toml").write_text(RECIPE)
    assert train.main([str(folder / "recipe.toml"), "--output", str(folder / "run")]) == 0
    return folder / "run"


def sampled(capsys, *options):
    capsys.readouterr()
    assert sample.main([*map(str, options), "--json"]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_log_probs_are_those_of_the_model(run, capsys):
    found = sampled(
        capsys, run, "--prompt", "ab", "--prompt", "xyz é", "-n", 3, "--max-new-tokens", 6,
        "--temperature", 0.7,
    )  # fmt: skip
    assert [entry["prompt"] for entry in found] == ["ab"] * 3 + ["xyz é"] * 3
    assert len({entry["completion"] for entry in found}) > 1
    model, tokenizer = load_model(run / "checkpoint"), load_tokenizer("bytes")
    for entry in found:
        prompt, ids = tokenizer.encode(entry["prompt"]), entry["token_ids"]
        logits = model(torch.tensor([prompt + ids]))[0].detach()
        rows = (logits[0, len(prompt) - 1 : -1] / 0.7).log_softmax(-1)
        expected = rows[torch.arange(len(ids)), ids]
        assert entry["logprobs"] == pytest.approx(expected.tolist(), abs=1e-5)
        assert entry["logprob"] == pytest.approx(float(expected.mean()), abs=1e-5)
        assert entry["ended"] == (ids[-1] == tokenizer.eos_token_id)
        assert entry["completion"] == tokenizer.decode(ids, skip_special_tokens=True)


def test_a_seed_and_the_filters_decide(run, capsys, tmp_path):
    (tmp_path / "prompts.txt").write_text("ab\ncd\nef\n")
    options = (run, "--file", tmp_path / "prompts.txt", "--limit", 2, "--max-new-tokens", 8)
    first = sampled(capsys, *options, "--seed", 1)
    assert [entry["prompt"] for entry in first] == ["ab", "cd"]
    assert sampled(capsys, *options, "--seed", 1) == first
    assert sampled(capsys, *options, "--seed", 2) != first
    greedy = sampled(capsys, *options, "--temperature", 0)
    assert sampled(capsys, *options, "--top-k", 1) == greedy
    assert sampled(capsys, *options, "--top-p", 1e-6) == greedy
    assert sampled(capsys, run / "checkpoint", *options[1:], "--temperature", 0) == greedy


@pytest.fixture(scope="module")
def stopping(tmp_path_factory):
    """A checkpoint of a run with settings of its own; without a recipe."""
    folder = tmp_path_factory.mktemp("stopping") / "checkpoint"
    config = PolicyGradientConfig(
        prompts_per_step=1, completions_per_prompt=2, max_new_tokens=9, max_steps=3,
        temperature=0.5, temperature_end=0.7, eos_token_id=tuple(range(20)),
        stop_strings=tuple("abcdefghijklmnopqrstuvwxyz"),
    )  # fmt: skip
    trainer = PolicyGradientTrainer(
        LSTMLanguageModel(257, 8, 16), lambda completions, **_: [0.0] * len(completions), ["ab"],
        config, tokenizer=load_tokenizer("bytes"),
    )  # fmt: skip
    trainer.train(max_steps=1)
    trainer.save(folder)
    return folder


def test_completions_are_sampled_as_in_training(stopping, capsys):
    found = sampled(capsys, stopping, "--prompt", "ab", "-n", 60)
    decode, stops = load_tokenizer("bytes").decode, set("abcdefghijklmnopqrstuvwxyz")
    for entry in found:
        *before, last = entry["token_ids"]
        assert all(token >= 20 for token in before) and not stops & set(decode(before))
        assert entry["ended"] == (last < 20 or decode([last]) in stops)
        assert entry["ended"] or len(before) == 8
    assert {entry["ended"] for entry in found} == {True, False}
    model, (entry, *_) = load_model(stopping), found
    ids = load_tokenizer("bytes").encode("ab") + entry["token_ids"]
    logits = model(torch.tensor([ids]))[0].detach()[0, 1:-1]
    rows = (logits / 0.6).log_softmax(-1)  # half way from 0.5 to 0.7
    expected = rows[torch.arange(len(rows)), entry["token_ids"]]
    assert entry["logprobs"] == pytest.approx(expected.tolist(), abs=1e-5)
    assert cli.main(["sample", str(stopping), "--prompt", "ab"]) == 0
    assert (
        "at temperature 0.6, in nats. At most 9 tokens, or up to 'a', " in capsys.readouterr().out
    )


def test_options_go_before_the_training(stopping, run, capsys):
    options = ("--prompt", "ab", "-n", 20, "--max-new-tokens", 5, "--temperature", 1)
    found = sampled(capsys, stopping, *options, "--stop", "", "--eos", "none")
    assert {(len(entry["token_ids"]), entry["ended"]) for entry in found} == {(5, False)}
    stops = [word for letter in "nopqrstuvwxyz" for word in ("--stop", letter)]
    stopped = sampled(capsys, stopping, *options, *stops, "--eos", "none")
    for entry in stopped:
        assert entry["ended"] == (entry["completion"][-1] in "nopqrstuvwxyz")
        assert entry["ended"] or len(entry["token_ids"]) == 5
    assert {entry["ended"] for entry in stopped} == {True, False}
    every = [word for token in range(257) for word in ("--eos", token)]
    assert {len(e["token_ids"]) for e in sampled(capsys, stopping, *options, *every)} == {1}
    assert {len(e["token_ids"]) for e in sampled(capsys, run, "--prompt", "ab", "-n", 9)} <= set(
        range(1, 5)  # its recipe's max_new_tokens
    )


def test_an_evaluation_samples_as_in_training_too(stopping, tmp_path):
    options = [str(stopping), "--rewards", "fastrl.cli.recipes.toy_rewards:vowels", "--tokenizer"]
    (tmp_path / "p.txt").write_text("ab\ncd\n")
    options += ["bytes", "--data", str(tmp_path / "p.txt"), "--json", str(tmp_path / "found.json")]
    assert evaluation.main([*options, "-n", "40"]) == 0
    found = json.loads((tmp_path / "found.json").read_text())
    assert (found["max_new_tokens"], found["temperature"]) == (9, pytest.approx(0.6))
    assert 0.5 < found["ended"] < 1  # a token in six or so ends it
    assert evaluation.main([*options, "--stop", "", "--eos", "none"]) == 0
    assert json.loads((tmp_path / "found.json").read_text())["ended"] == 0


def test_the_start_of_a_run_is_sampled_as_its_recipe_says(tmp_path, capsys):
    (tmp_path / "recipe.toml").write_text(RECIPE)
    (tmp_path / "start").mkdir()
    (tmp_path / "start" / "config.json").write_text("{}")
    assert sample.main([str(tmp_path), "--prompt", "a"]) == 2
    assert f"which has none yet. Pass {tmp_path}/start" in capsys.readouterr().err
    assert trained_with(str(tmp_path / "start"))["max_new_tokens"] == 4
    assert trained_with("no/such-model") == trained_with(str(tmp_path)) == {}


def test_the_column_and_the_precision_are_those_of_training(run, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    shutil.copytree(run / "checkpoint", tmp_path / "run" / "checkpoint")
    text = RECIPE.replace("[data]", '[data]\ncolumn = "question"')
    (tmp_path / "run" / "recipe.toml").write_text(text)
    (tmp_path / "p.jsonl").write_text('{"question": "ab", "prompt": "no"}\n')
    options = ("--file", tmp_path / "p.jsonl", "--temperature", 0)
    for model in (tmp_path / "run", tmp_path / "run" / "checkpoint"):
        assert sampled(capsys, model, *options)[0]["prompt"] == "ab"
    assert sampled(capsys, model, *options, "--column", "prompt")[0]["prompt"] == "no"
    evaluated = [str(model), "--rewards", "fastrl.cli.recipes.toy_rewards:vowels"]
    options = ["--data", str(tmp_path / "p.jsonl"), "--json", str(tmp_path / "found.json")]
    (tmp_path / "p.jsonl").write_text('{"question": "ab"}\n')
    assert evaluation.main([*evaluated, *options]) == 0
    assert evaluation.main([str(run), str(tmp_path / "run" / "recipe.toml"), *options]) == 0

    full = sampled(capsys, run, "--prompt", "ab")[0]["logprobs"]
    half = sampled(capsys, run, "--prompt", "ab", "--precision", "bfloat16")[0]["logprobs"]
    assert half != full and half == pytest.approx(full, abs=0.1)
    description = tmp_path / "run" / "checkpoint" / "trainer.json"
    document = json.loads(description.read_text())
    document["config"]["precision"] = "bfloat16"
    description.write_text(json.dumps(document))
    assert sampled(capsys, tmp_path / "run", "--prompt", "ab")[0]["logprobs"] == half


def test_a_model_where_one_stands(run, capsys, monkeypatch):
    monkeypatch.chdir(run)
    expected = sampled(capsys, run, "--prompt", "ab")
    assert sampled(capsys, ".", "--prompt", "ab") == expected
    monkeypatch.chdir(run / "checkpoint")
    assert sampled(capsys, ".", "--prompt", "ab") == expected
    assert sampled(capsys, "..", "--prompt", "ab") == expected


def test_prompts_that_are_no_texts(run, tmp_path, capsys):
    (tmp_path / "p.jsonl").write_text('{"prompt": [70, 71]}\n')
    assert sample.main([str(run), "--file", str(tmp_path / "p.jsonl")]) == 0
    assert "[70, 71]" in capsys.readouterr().out
    assert sample.main([str(run), "--file", str(tmp_path / "p.jsonl"), "--chat"]) == 2
    assert "sample: expected texts with --chat, got [70, 71]" in capsys.readouterr().err


def test_a_save_that_was_interrupted_leaves_a_model(run, capsys):
    options = ("--prompt", "ab", "--max-new-tokens", 8)
    before = sampled(capsys, run, *options)
    place, previous = run / "checkpoint", run / ".checkpoint.previous"
    place.rename(previous)
    try:
        assert sampled(capsys, run, *options) == before
    finally:
        previous.rename(place)


def test_what_a_person_reads(run, capsys):
    options = [str(run), "--prompt", "[b]ab", "-n", "2", "--max-new-tokens", "5"]
    assert cli.main(["sample", *options]) == 0
    shown = capsys.readouterr().out
    assert "[b]ab" in shown and "\x1b" not in shown
    for words in ("1. log-prob -", "2. log-prob -", "5 tokens, cut", "at temperature 1, in nats"):
        assert words in shown


def test_a_model_of_transformers(tmp_path, capsys):
    from transformers import AutoModelForCausalLM, LlamaConfig

    tokenizer = load_tokenizer("bytes")
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, bos_token_id=None, eos_token_id=0, initializer_range=0.5,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    prompt = torch.tensor([tokenizer.encode("hello")])
    ids = model.generate(prompt, do_sample=False, max_new_tokens=12, eos_token_id=0)
    (entry,) = sampled(
        capsys, tmp_path, "--prompt", "hello", "--temperature", 0, "--max-new-tokens", 12
    )
    assert entry["token_ids"] == ids[0, prompt.shape[1] :].tolist()


def test_mistakes(run, tmp_path, capsys):
    for options, message in {
        (str(run),): "--prompt TEXT or --file FILE, got neither",
        (str(run), "--prompt", ""): "expected a prompt [P] with P >= 1",
        (str(run), "--prompt", "a", "-n", "0"): "expected -n >= 1, got 0",
        (str(run), "--prompt", "a", "--temperature", "-1"): "temperature",
        (str(run), "--prompt", "a", "--eos", "1", "--eos", "auto"): "whole numbers, or auto or",
        (str(run), "--prompt", "a", "--eos", "257"): "sample: expected an EOS in [0, 257), got 257",
        (str(run), "--prompt", "a", "--column", "x"): "sample: expected --file with --column, got",
        (str(run), "--prompt", "a", "--limit", "3"): "sample: expected --file with --limit, got",
        (str(run), "--file", "p.txt", "--limit", "0"): "sample: expected --limit >= 1, got 0",
        (str(run), "--file", "none.txt"): "none.txt: No such file",
        (str(run), "--prompt", "a", "--chat"): "chat template",
        (str(tmp_path / "none"), "--prompt", "a"): "AutoModelForCausalLM loads, got",
        ("", "--prompt", "a"): "sample: expected a MODEL, got an empty text",
        (str(run), "--prompt", "a", "--top", "1"): "unrecognized arguments",
    }.items():
        assert sample.main(list(options)) == 2, options
        assert message in (error := capsys.readouterr().err) and "Traceback" not in error, error
    (tmp_path / "recipe.toml").write_text(RECIPE)
    assert sample.main([str(tmp_path), "--prompt", "a"]) == 2
    assert "which has none yet" in capsys.readouterr().err
