"""The supervised start of a recipe: its loss, its resumption, and what runs share of it."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch

for package in ("rich", "safetensors", "tensorboard", "transformers"):
    pytest.importorskip(package)

from safetensors.torch import load_file  # noqa: E402

from fastrl.cli import eval as evaluation  # noqa: E402
from fastrl.cli import sample, train  # noqa: E402
from fastrl.cli.recipes.models import load_tokenizer, train_tokenizer  # noqa: E402
from fastrl.cli.recipes.packing import RowBatches, encoded, packed  # noqa: E402
from fastrl.cli.recipes.schema import Supervised  # noqa: E402
from fastrl.cli.recipes.supervised import SupervisedTraining  # noqa: E402
from fastrl.cli.recipes.toml import RecipeError  # noqa: E402
from fastrl.models import LSTMLanguageModel, as_policy, load_model  # noqa: E402
from fastrl.trainers.loggers import JsonLines  # noqa: E402

ROWS = [
    {"prompt": "one and ", "reference": "two"},
    {"prompt": "three", "reference": " or four"},
    {"prompt": "one and ", "reference": "three"},
    {"prompt": "a", "reference": ""},
]


def nll_of(model, prompt, reference, prompt_weight):
    """Σ w · −log P and Σ w of one row, by plain torch."""
    ids = torch.tensor([prompt + reference])
    logits, _ = model(ids[:, :-1])
    losses = -logits[0].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
    weights = torch.tensor([prompt_weight] * (len(prompt) - 1) + [1.0] * len(reference))
    return (losses * weights).sum(), weights.sum()


@pytest.mark.parametrize("prompt_weight", [0.0, 0.25])
def test_the_loss_is_that_of_unpacked_rows_but_a_shared_prompt_counts_once(prompt_weight):
    torch.manual_seed(0)
    tokenizer = load_tokenizer("bytes")
    model = LSTMLanguageModel(257, 8, 16, 1)
    settings = Supervised(steps=1, prompt_weight=prompt_weight, tokens_per_step=500, warmup=0)
    training = SupervisedTraining(model, tokenizer, ROWS, ROWS[:2], settings, seed=0)
    total = count = 0.0
    seen = set()
    with torch.no_grad():
        for row in ROWS:
            prompt = tokenizer.encode(row["prompt"])
            weight = 0.0 if row["prompt"] in seen else prompt_weight
            nll, weights = nll_of(model, prompt, [*tokenizer.encode(row["reference"]), 0], weight)
            total, count = total + nll, count + weights
            seen.add(row["prompt"])
        validation = [
            nll_of(model, tokenizer.encode(r["prompt"]), [*tokenizer.encode(r["reference"]), 0], 0)
            for r in ROWS[:2]
        ]
    expected = sum(nll for nll, _ in validation) / sum(weights for _, weights in validation)
    assert training._validate() == pytest.approx(float(expected), rel=1e-5)
    records = []
    training.train(records.append)
    assert records[0]["loss"] == pytest.approx(float(total / count), rel=1e-5)


def test_batches_hold_every_row_once_an_epoch_and_are_a_function_of_the_seed():
    tokenizer = load_tokenizer("bytes")
    rows = [{"prompt": f"{i // 3} ", "reference": "r" * (i % 7)} for i in range(40)]
    groups = encoded(rows, tokenizer, [0])
    assert len(groups) == 14 and sum(len(references) for _, references in groups) == 40
    batches = RowBatches(groups, 20, seed=3)
    taken = []
    while batches.epochs < 2:
        batch = batches.next()
        assert sum(len(p) + sum(map(len, refs)) for p, refs in batch) <= 20
        taken.append(batch)
        if len(taken) == 5:
            state = batches.state_dict()
    rows_of = [(tuple(p), tuple(r)) for batch in taken for p, refs in batch for r in refs]
    once = [(tuple(p), tuple(r)) for p, refs in groups for r in refs]
    assert sorted(rows_of) == sorted(once * 2)
    assert rows_of[:40] != rows_of[40:]
    other = RowBatches(groups, 20, seed=3)
    other.load_state_dict(state)
    assert [other.next() for _ in taken[5:]] == taken[5:]
    batch, weights = packed(taken[0], 0.5)
    assert len(weights) == len(batch.target_ids) and set(weights.tolist()) <= {0.5, 1.0}


def test_a_trained_tokenizer_gives_texts_back():
    texts = ["the lobster and the other lobster", "the sea, the sea"] * 5
    tokenizer = train_tokenizer(texts, 280)
    assert len(tokenizer) <= 280 and tokenizer.eos_token_id == 0
    ids = tokenizer.encode("the lobster 日本")
    assert tokenizer.decode(ids) == "the lobster 日本" and len(ids) < len(
        "the lobster 日本".encode()
    )


RECIPE = """
algorithm = "grpo"
[model]
lstm = {embed_dim = 8, hidden_dim = 16}
tokenizer = "bpe"
vocab_size = 270
[data]
builder = "task.py:build"
folder = "."
[rewards]
functions = [{use = "task.py:Overlap", case = true}, "fastrl.cli.recipes.toy_rewards:vowels"]
weights = [1.0, 0.1]
[supervised]
steps = 8
tokens_per_step = 60
validate_every = 3
[train]
max_steps = 2
prompts_per_step = 2
completions_per_prompt = 2
max_new_tokens = 5
[train.a2c]
critic_coef = 0.1
[log]
tensorboard = false
samples_every = 0
"""
TASK = """
def build(folder, seed):
    rows = [{"prompt": f"count {i} ", "reference": f"then {i + 1}"} for i in range(40)]
    held_out = [{"prompt": f"count {i} ", "reference": f"then {i + 1}"} for i in range(50, 53)]
    return {"train": rows, "held_out": held_out}

class Overlap:
    __name__ = "overlap"
    def __init__(self, texts, token_bytes, *, case=False, tokenizer=None):
        assert case and tokenizer.eos_token_id == 0 and token_bytes[0] == b""
        assert "count 3 then 4" in texts
    def __call__(self, completions, reference, **columns):
        return [len(set(c) & set(r)) / len(set(r)) for c, r in zip(completions, reference)]
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("recipe")
    (folder / "task.py").write_text(TASK)
    (folder / "recipe.toml").write_text(RECIPE)
    return folder / "recipe.toml"


@pytest.fixture(scope="module")
def finished(recipe, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "finished"
    assert train.main([str(recipe), "--output", str(folder)]) == 0
    return folder


def lines(folder, name="supervised.jsonl"):
    found = [json.loads(line) for line in (folder / name).read_text().splitlines()]
    timed = ("time/", "tokens_per_second")
    return [{k: v for k, v in line.items() if not k.startswith(timed)} for line in found]


def assert_same_weights(folder, other, part):
    mine, theirs = (load_file(f / part / "model.safetensors") for f in (folder, other))
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[key], theirs[key]) for key in mine)


def test_a_run_with_a_supervised_start_leaves_it_with_its_records(finished, capsys):
    found = lines(finished)
    assert [line["step"] for line in found] == list(range(1, 9))
    assert [line["step"] for line in found if "validation_loss" in line] == [3, 6, 8]
    assert found[-1]["validation_loss"] < found[2]["validation_loss"]
    assert load_model(finished / "start").vocab_size == len(load_tokenizer(str(finished / "start")))
    assert not (finished / "supervised.safetensors").exists()
    assert {"start", "tokenizer", "checkpoint"} <= {path.name for path in finished.iterdir()}
    results = json.loads((finished / "results.json").read_text())
    samples = results["after"]["samples"]
    assert [s["reference"] for s in samples] == ["then 51", "then 52", "then 53"]
    assert [s["reward"] for s in samples] == pytest.approx(results["after"]["prompt_rewards"])
    assert train.main(["--resume", str(finished)]) == 0  # it is finished
    assert "Held out, 3 prompts" in capsys.readouterr().out


def test_what_was_trained_is_sampled_from_and_evaluated(finished, tmp_path, capsys):
    greedy = ["--prompt", "count 3 ", "--temperature", "0", "--max-new-tokens", "4", "--json"]
    for model in (finished, finished / "start"):
        assert sample.main([str(model), *greedy]) == 0
        assert "completion" in json.loads(capsys.readouterr().out.strip())
    path = tmp_path / "eval.json"
    assert evaluation.main([str(finished), "--json", str(path)]) == 0
    result = json.loads(path.read_text())
    assert result["num_prompts"] == 3 and 0 <= result["rewards/overlap"]["mean"] <= 1
    assert evaluation.main([str(finished / "start"), str(finished / "recipe.toml"),
                            "--set", "data.eval_limit=2", "--json", str(path)]) == 0  # fmt: skip
    assert json.loads(path.read_text())["num_prompts"] == 2


@pytest.mark.parametrize("step, saves", [(4, True), (5, False)])
def test_a_supervised_part_that_was_ended_goes_on_to_the_same_weights(
    finished, recipe, tmp_path, monkeypatch, capsys, step, saves
):
    """By SIGTERM, which saves; or killed, and repeated from the last validation."""
    folder = tmp_path / "run"
    call = JsonLines.__call__

    class Killed(BaseException):
        pass

    def ending(log, record):
        call(log, record)
        if log.path.name == "supervised.jsonl" and record["step"] == step:
            if not saves:
                raise Killed
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(JsonLines, "__call__", ending)
        if saves:
            assert train.main([str(recipe), "--output", str(folder)]) == 0
            assert "in the supervised part. Everything is saved" in capsys.readouterr().err
        else:
            with pytest.raises(Killed):
                train.main([str(recipe), "--output", str(folder)])
    assert not (folder / "start").exists() and (folder / "supervised.safetensors").exists()
    assert train.main(["--resume", str(folder)]) == 0
    assert lines(folder) == lines(finished)
    assert_same_weights(folder, finished, "start")
    assert_same_weights(folder, finished, "checkpoint")
    mine, theirs = (json.loads((f / "results.json").read_text()) for f in (folder, finished))
    assert mine == theirs


def test_another_algorithm_starts_from_the_same_start(finished, recipe, tmp_path):
    shared = tmp_path / "shared"
    shutil.copytree(finished / "start", shared)
    folder = tmp_path / "run"
    sets = ["--set", "algorithm=a2c", "--set", f"model.start={shared}"]
    sets += ["--set", "model.critic=same", "--set", "train.save_every=1"]
    assert train.main([str(recipe), *sets, "--output", str(folder)]) == 0
    assert not (folder / "supervised.jsonl").exists()
    assert_same_weights(folder, finished, "start")
    before = [json.loads((f / "results.json").read_text())["before"] for f in (folder, finished)]
    assert before[0]["prompt_rewards"] == before[1]["prompt_rewards"]
    assert json.loads((folder / "config.json").read_text())["critic_coef"] == 0.1
    shutil.rmtree(shared)  # the run has its own copy
    assert train.main(["--resume", str(folder), "--set", "train.max_steps=3"]) == 0
    assert len(lines(folder, "metrics.jsonl")) == 3


def test_a_start_is_not_measured_on_what_it_was_trained_on(finished, recipe, tmp_path, capsys):
    """As with data of another seed; the copy of a copy knows as well."""
    (tmp_path / "other.py").write_text(TASK.replace("range(50, 53)", "range(38, 40)").replace(
        "range(40)", "range(38)"))  # fmt: skip
    copy = tmp_path / "run"
    sets = ["--set", f"model.start={finished / 'start'}"]
    assert train.main([str(recipe), *sets, "--output", str(copy)]) == 0
    sets = ["--set", f"model.start={copy / 'start'}", "--output", str(tmp_path / "third")]
    sets += ["--set", f"data.builder={tmp_path}/other.py:build"]
    capsys.readouterr()
    assert train.main([str(recipe), *sets]) == 2
    assert "was not trained on, got 'count 38 '" in capsys.readouterr().err
    assert not (tmp_path / "third").exists()


def test_rows_without_references_are_an_error(recipe, tmp_path, capsys):
    (tmp_path / "bad.py").write_text(
        "def rows(folder, seed):\n    return {'train': [{'prompt': str(i)} for i in range(40)]}\n"
    )
    sets = ["--set", f"data.builder={tmp_path}/bad.py:rows"]
    assert train.main([str(recipe), *sets, "--output", str(tmp_path / "run")]) == 2
    assert 'with texts "prompt" and "reference"' in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_rows_without_a_token_to_begin_with_are_an_error():
    model, tokenizer = LSTMLanguageModel(257, 8, 16, 1), load_tokenizer("bytes")
    empty = [{"prompt": "", "reference": "alone"}]
    for parts in ((empty, ROWS), (ROWS, empty)):
        with pytest.raises(RecipeError, match="with prompts that have tokens, got 1 without any"):
            SupervisedTraining(model, tokenizer, *parts, Supervised(steps=1), seed=0)


def test_dropout_of_a_hugging_face_model_is_off():
    """GPT-2 has some by default: two trainings are the same, and the loss that of evaluation."""
    transformers = pytest.importorskip("transformers")
    tokenizer = load_tokenizer("bytes")
    config = transformers.GPT2Config(
        vocab_size=257, n_embd=16, n_layer=1, n_head=2, n_positions=32, resid_pdrop=0.5,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    rows = [{"prompt": f"{i}: ", "reference": "abc"} for i in range(4)]

    def records():
        torch.manual_seed(0)
        policy = as_policy(transformers.GPT2LMHeadModel(config))
        training = SupervisedTraining(policy, tokenizer, rows, rows, Supervised(steps=2), 0)
        start = training._validate()
        torch.manual_seed(1)  # what dropout would draw
        found = []
        training.train(found.append)
        return start, [record["loss"] for record in found]

    (start, losses), (_, again) = records(), records()
    assert losses == again and losses[0] == pytest.approx(start, rel=1e-5)
