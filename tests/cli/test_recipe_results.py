"""bench.recipe_results: runs, what is collected of them, and what is not repeated."""

import json
import statistics
from pathlib import Path

import pytest

for package in ("rich", "safetensors", "transformers"):
    pytest.importorskip(package)

from bench import recipe_results, recipe_tables  # noqa: E402
from fastrl.cli import train  # noqa: E402

RECIPE = """
algorithm = "grpo"
[model]
lstm = {embed_dim = 8, hidden_dim = 16}
tokenizer = "bytes"
[data]
builder = "task.py:build"
[rewards]
functions = ["fastrl.cli.recipes.toy_rewards:vowels"]
[supervised]
steps = 2
tokens_per_step = 60
[train]
max_steps = 3
prompts_per_step = 2
completions_per_prompt = 2
max_new_tokens = 5
learning_rate = 0.02
[log]
tensorboard = false
samples_every = 0
"""
TASK = """
def build(folder, seed):
    rows = [{"prompt": f"count {i} ", "reference": f"then {i + 1}"} for i in range(40)]
    return {"train": rows, "held_out": [{"prompt": f"count {i} "} for i in range(50, 54)]}
"""


def test_runs_are_collected_and_not_repeated(tmp_path, monkeypatch):
    (tmp_path / "task.py").write_text(TASK)
    (tmp_path / "mine.toml").write_text(RECIPE)
    commands = []

    def call(command, log, threads):
        commands.append(command)
        return train.main(command[1:])

    monkeypatch.setattr(recipe_results, "call", call)
    output, page = tmp_path / "results", tmp_path / "docs" / "results.md"
    options = ["--recipes", str(tmp_path / "mine.toml"), "--seeds", "0", "1", "2"]
    options += ["--output", str(output), "--markdown", str(page)]
    assert recipe_results.main(options) == 0
    assert len(commands) == 6
    assert recipe_results.main(options) == 0
    assert len(commands) == 6

    found = json.loads((output / "results.json").read_text())["results"]
    assert [(r["recipe"], r["algorithm"]) for r in found] == [("mine", "grpo"), ("mine", "a2c")]
    runs = {
        (a, s): json.loads((output / f"mine/{a}-{s}/results.json").read_text())
        for a in ("grpo", "a2c")
        for s in range(3)
    }
    for seed in range(3):  # both from the same start, as the evaluation before shows
        assert runs["grpo", seed]["before"] == runs["a2c", seed]["before"]
    gains = [
        statistics.fmean(runs["a2c", s]["after"]["prompt_rewards"])
        - statistics.fmean(runs["a2c", s]["before"]["prompt_rewards"])
        for s in range(3)
    ]
    assert found[1]["gain"] == pytest.approx(statistics.fmean(gains))
    assert found[1]["gain_over_seeds"] == pytest.approx(4.303 * statistics.stdev(gains) / 3**0.5)
    lengths = [runs["a2c", s]["after"]["eval/completions/mean_length"] for s in range(3)]
    assert found[1]["lengths"][1] == lengths and found[1]["gold"] == [[], []]
    text = page.read_text()
    assert text.count(recipe_tables.BEGIN) == 1 and "| mine | a2c | vowels |" in text
    said = runs["a2c", 0]["after"]["samples"][1]["completion"].replace("\n", "↵")
    assert "- `count 51 ` → `None`" in text and f"  - a2c: `{said.replace('`', chr(39))}`" in text


def test_a_key_can_be_set_for_one_recipe(tmp_path):
    sets = ("train.max_steps=3", "mine:train.seed=7", "other:train.max_steps=4")
    (tmp_path / "mine.toml").write_text(RECIPE)
    job, _ = recipe_results.jobs_of(str(tmp_path / "mine.toml"), 0, tmp_path / "out", sets, "a2c")
    assert job.sets == ("train.max_steps=3", "train.seed=7")


def test_a_table_takes_the_place_of_the_old_one(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"# Mine\n{recipe_tables.BEGIN}\nold\n{recipe_tables.END}\nafter\n")
    recipe_tables.write_between_marks(page, "new\n")
    assert page.read_text() == (f"# Mine\n{recipe_tables.BEGIN}\nnew\n{recipe_tables.END}\nafter\n")


def test_a_run_that_fails_says_where_to_look(tmp_path, monkeypatch):
    monkeypatch.setattr(recipe_results, "call", lambda command, log, threads: 2)
    job = recipe_results.Job("tiny_grpo", "grpo", 0, Path(tmp_path / "x"), None, ())
    with pytest.raises(RuntimeError, match="exit status 2. See .*x.log"):
        recipe_results.finish(job, 1)
