"""algorithm = "preference": a run that ends with a reward model."""

import json
import math
import os
import signal
from pathlib import Path

import pytest

for package in ("rich", "safetensors", "transformers"):
    pytest.importorskip(package)
preference = pytest.importorskip("fastrl.rewards.preference")

from fastrl.cli import eval as evaluation  # noqa: E402
from fastrl.cli import report, sample, train  # noqa: E402
from fastrl.cli.recipes.data import load_data  # noqa: E402
from fastrl.cli.recipes.parse import read_recipe  # noqa: E402
from fastrl.cli.recipes.toml import RecipeError  # noqa: E402
from fastrl.trainers.loggers import JsonLines  # noqa: E402

RECIPE = """
algorithm = "preference"
[model]
lstm = {embed_dim = 16, hidden_dim = 16}
tokenizer = "bytes"
[data]
pairs = "pairs.jsonl"
eval_pairs = "held_out.jsonl"
[supervised]
steps = 2
tokens_per_step = 100
[preference]
epochs = 4
pairs_per_step = 8
learning_rate = 0.02
folds = 2
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("preference")
    for name, numbers in (("pairs", range(60)), ("held_out", range(60, 80))):
        pairs = [
            {"prompt": f"{i}: ", "chosen": f"yes {i % 7}", "rejected": f"no {i % 7}"}
            for i in numbers
        ]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    (folder / "recipe.toml").write_text(RECIPE)
    return folder / "recipe.toml"


def test_a_preference_model_is_trained_from_pairs(recipe, tmp_path, capsys):
    folder = tmp_path / "run"
    assert train.main([str(recipe), "--output", str(folder)]) == 0
    results = json.loads((folder / "results.json").read_text())
    assert results["before"]["eval/accuracy"] == 0.5  # a value head of zeros
    assert results["after"]["eval/accuracy"] == 1.0 and results["after"]["eval/pairs"] == 20
    assert results["after"]["eval/log_loss"] < 0.4
    assert results["calibration"]["pairs"] == 6 and results["calibration"]["temperature"] > 0
    assert len(results["cross_validation"]["folds"]) == 2
    assert results["cross_validation"]["eval/pairs"] == 60
    steps = [json.loads(x)["step"] for x in (folder / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 4 * 7 + 1))  # 54 pairs, 8 at a time
    model = preference.PreferenceModel.load(folder / "model")
    scores = model.score(["70: "] * 2, ["yes 0", "no 0"])
    assert scores[0] > scores[1]
    written = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != ".lock"}
    capsys.readouterr()
    assert train.main(["--resume", str(folder)]) == 0
    assert "after: accuracy 1.000" in capsys.readouterr().out
    assert written == {p: p.read_bytes() for p in written}
    assert evaluation.main([str(folder)]) == 2
    assert "eval: expected a recipe of a policy" in capsys.readouterr().err
    assert sample.main([str(folder), "--prompt", "a"]) == 2
    assert "expected a run of a policy" in capsys.readouterr().err
    assert report.main([str(folder)]) == 0
    page = (folder / "report.html").read_text()
    assert "accuracy 1.000 (95 % interval" in page and "in 2 folds" in page


POLICY = """
algorithm = "rloo"
[model]
lstm = {embed_dim = 16, hidden_dim = 16}
tokenizer = "bytes"
[data]
prompts = "pairs.jsonl"
eval = "held_out.jsonl"
[rewards]
functions = [{use = "PreferenceReward", model = "judge/model", immediate = true}]
[train]
max_steps = 2
prompts_per_step = 2
completions_per_prompt = 4
max_new_tokens = 4
[over_optimization]
gold = {use = "PreferenceReward", model = ["judge/folds/0", "judge/folds/1"]}
every = 1
kl_budget = 1e-9
action = "lower"
[log]
tensorboard = false
"""


@pytest.mark.filterwarnings("ignore:KL budget")
def test_a_policy_learns_from_the_model_and_is_watched_by_the_folds(recipe, monkeypatch, tmp_path):
    """From another folder than the recipe's, and resumed from a third one."""
    folder = recipe.parent
    sets = ["--set", "preference.epochs=1", "--output", str(folder / "judge")]
    assert train.main([str(recipe), *sets]) == 0
    (folder / "policy.toml").write_text(POLICY)
    assert train.main([str(folder / "policy.toml"), "--output", str(folder / "run")]) == 0
    monkeypatch.chdir(tmp_path)
    sets = ["--set", "train.max_steps=3"]
    assert train.main(["--resume", str(folder / "run"), *sets]) == 0
    records = [json.loads(x) for x in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records] == [1, 2, 3]
    assert all(math.isfinite(r["rewards/preference/mean"] + r["gold/gold"]) for r in records)
    # Each alarm doubles it; a record has that of its own step, before its evaluation.
    assert [r["kl_coef"] for r in records] == [0, 0.05, 0.1]
    assert evaluation.main([str(folder / "run"), "--limit", "3"]) == 0


@pytest.mark.parametrize("sets", [[], ["data.eval_pairs=''"]])
def test_what_is_measured_on_is_in_no_part_of_training(recipe, sets):
    """With held-out pairs of their own, and with those that are split off."""
    data = load_data(read_recipe(recipe, sets))
    parts = [data.train, data.calibration, data.held_out]
    prompts = [{row["prompt"] for row in part} for part in parts]
    assert len(set.union(*prompts)) == sum(map(len, parts)) == (60 if sets else 80)
    assert len(prompts[1]) == 6 and len(prompts[2]) == (5 if sets else 20)
    read = {row["prompt"] for row in [*data.supervised, *data.validation]}
    assert read == prompts[0]


def test_an_interrupted_training_begins_again(recipe, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "run"
    call = JsonLines.__call__

    def interrupting(log, record):
        call(log, record)
        if log.path.name == "metrics.jsonl" and record["step"] == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    options = ["--set", "preference.folds=0", "--set", "preference.epochs=1"]
    with monkeypatch.context() as patch:
        patch.setattr(JsonLines, "__call__", interrupting)
        assert train.main([str(recipe), *options, "--output", str(folder)]) == 0
    assert "in training. This part begins again" in capsys.readouterr().err
    assert not (folder / "model").exists() and (folder / "start").is_dir()
    assert train.main(["--resume", str(folder)]) == 0
    steps = [json.loads(x)["step"] for x in (folder / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 8)) and (folder / "model").is_dir()


@pytest.mark.parametrize(
    "sets, message",
    [
        (["preference.epoch=2"], "The nearest is preference.epochs"),
        (["preference.epochs=0"], r"in \[preference\] of .*epochs a whole number >= 1"),
        (["preference.folds=1"], "preference.folds to be 0, or a whole number >= 2, got 1"),
        (["train.gamma=1"], "without algorithm preference"),
        (["rewards.functions=['a:b']"], "without algorithm preference, got preference"),
        (["data.builder=multi30k_pairs"], "data.pairs in .* or else data.builder, got both"),
    ],
)
def test_a_recipe_of_a_preference_model_that_cannot_work(recipe, sets, message):
    with pytest.raises(RecipeError, match=message):
        read_recipe(recipe, sets)


def test_pairs_that_are_none(recipe, tmp_path, capsys):
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a", "chosen": "b"}\n')
    sets = ["--set", f"data.pairs={tmp_path}/bad.jsonl", "--output", str(tmp_path / "run")]
    assert train.main([str(recipe), *sets]) == 2
    assert 'with "prompt", "chosen" and "rejected", got no "rejected"' in capsys.readouterr().err
