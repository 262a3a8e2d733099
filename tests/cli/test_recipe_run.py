import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

for package in ("rich", "safetensors", "tensorboard", "transformers"):
    pytest.importorskip(package)

from safetensors.torch import load_file  # noqa: E402

from fastrl.cli import main as cli  # noqa: E402
from fastrl.cli import report, train  # noqa: E402
from fastrl.trainers.loggers import JsonLines  # noqa: E402

RECIPE = """
algorithm = "ppo"
[model]
lstm = {embed_dim = 8, hidden_dim = 16}
tokenizer = "bytes"
[data]
prompts = ["one", "two words", "three", "four"]
eval = "held_out.txt"
[rewards]
functions = ["rewards.py:drawing", "fastrl.cli.recipes.toy_rewards:vowels"]
weights = [1.0, 0.5]
[train]
max_steps = 6
prompts_per_step = 2
completions_per_prompt = 2
max_new_tokens = 5
learning_rate = 1e-2
save_every = 4
kl_coef = 0.01
[log]
samples_every = 2
[eval]
every = 3
"""
# It draws from torch's generator: a resume has to restore that as well.
REWARDS = """
import torch
def drawing(completions, **columns):
    return [len(text) + float(torch.rand(())) for text in completions]
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("recipe")
    (folder / "held_out.txt").write_text("five\nsix\nseven\n")
    (folder / "rewards.py").write_text(REWARDS)
    (folder / "recipe.toml").write_text(RECIPE)
    return folder / "recipe.toml"


@pytest.fixture(scope="module")
def finished(recipe, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "finished"
    assert cli.main(["train", str(recipe), "--output", str(folder)]) == 0
    return folder


def records(folder: Path, name: str = "metrics.jsonl") -> list[dict]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def without_times(folder: Path) -> list[dict]:
    timed = ("time/", "tokens_per_second")
    return [{k: v for k, v in r.items() if not k.startswith(timed)} for r in records(folder)]


def assert_same_run(folder: Path, other: Path) -> None:
    assert without_times(folder) == without_times(other)
    assert records(folder, "samples.jsonl") == records(other, "samples.jsonl")
    weights, others = (load_file(f / "checkpoint/model.safetensors") for f in (folder, other))
    assert weights.keys() == others.keys()
    assert all(torch.equal(weights[key], others[key]) for key in weights)
    mine, theirs = (json.loads((f / "results.json").read_text()) for f in (folder, other))
    assert mine == theirs
    for name in ("state.json", "state.safetensors"):  # each generator's state too
        mine, theirs = ((f / "checkpoint" / name).read_bytes() for f in (folder, other))
        assert mine == theirs, name


def test_a_run_depends_on_its_seed_and_on_nothing_that_was_drawn_before(recipe, tmp_path):
    folders = [tmp_path / "one", tmp_path / "other"]
    for number, folder in enumerate(folders):
        random.seed(number)
        np.random.seed(number)
        torch.manual_seed(number)
        options = ["--set", "train.max_steps=1", "--output", str(folder)]
        assert cli.main(["train", str(recipe), *options]) == 0
    assert_same_run(*folders)


def test_a_run_leaves_what_it_promises(finished, recipe):
    assert {path.name for path in finished.iterdir()} == {
        ".lock", "recipe.toml", "config.json", "metrics.jsonl", "samples.jsonl", "tensorboard",
        "results.json", "checkpoint", "versions.json",
    }  # fmt: skip
    lines = records(finished)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert {"reward", "kl", "entropy", "rewards/drawing/mean", "value"} <= lines[0].keys()
    assert [line["step"] for line in lines if "eval/reward" in line] == [3]
    samples = records(finished, "samples.jsonl")
    assert [sample["step"] for sample in samples] == [2] * 4 + [4] * 4 + [6] * 4
    at_2 = [s["rewards/drawing"] for s in samples if s["step"] == 2]
    assert math.fsum(at_2) / 4 == pytest.approx(lines[1]["rewards/drawing/mean"])
    results = json.loads((finished / "results.json").read_text())
    assert [(results[k]["step"], len(results[k]["prompt_rewards"])) for k in results] == [
        (0, 3), (6, 3),
    ]  # fmt: skip
    saved = (finished / "recipe.toml").read_text()
    assert (
        str(recipe.parent / "held_out.txt") in saved and str(recipe.parent / "rewards.py") in saved
    )
    assert any((finished / "tensorboard").iterdir())


def test_a_finished_run_shows_its_result_again(finished, capsys):
    before = {p: p.read_bytes() for p in finished.rglob("*.json*")}
    assert train.main(["--resume", str(finished)]) == 0
    shown = capsys.readouterr().out
    for words in ("ppo, 6 steps", "rewards/drawing/mean", "Held out, 3 prompts", "gain", "±"):
        assert words in shown
    assert before == {p: p.read_bytes() for p in finished.rglob("*.json*")}


@pytest.mark.parametrize("step", [1, 4])
def test_sigterm_saves_and_exits_0_and_the_run_goes_on_to_the_same_end(
    finished, recipe, tmp_path, monkeypatch, capsys, step
):
    folder = tmp_path / "run"
    call = JsonLines.__call__

    def interrupting(log, record):
        call(log, record)
        if log.path.name == "metrics.jsonl" and record["step"] == step:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)  # a second one changes nothing

    with monkeypatch.context() as patch:
        patch.setattr(JsonLines, "__call__", interrupting)
        assert train.main([str(recipe), "--output", str(folder)]) == 0
    assert f"after step {step}. Everything is saved" in capsys.readouterr().err
    # As a job that is started again and again would: the same line, with --resume.
    assert train.main([str(recipe), "--output", str(folder), "--resume"]) == 0
    assert_same_run(folder, finished)


def test_a_signal_ends_an_evaluation_at_once(recipe, tmp_path):
    """It comes while a reward function runs, which is not to blame for it."""
    (tmp_path / "signalling.py").write_text(
        "import signal\n"
        "class Signalling:\n"
        "    evaluations = 0\n"
        "    def __call__(self, prompts, **columns):\n"
        "        self.evaluations += prompts[0] == 'five'\n"
        "        if self.evaluations == 2:\n"
        "            signal.raise_signal(signal.SIGINT)\n"
        "            raise AssertionError('the signal came late')\n"
        "        return [0.5] * len(prompts)\n"
    )
    functions = f"rewards.functions=['{tmp_path}/signalling.py:Signalling', '{recipe.parent}/"
    sets = ["--set", functions + "rewards.py:drawing']", "--set", 'train.reward_errors="mask"']
    folder = tmp_path / "run"
    assert train.main([str(recipe), *sets, "--output", str(folder)]) == 130
    lines = records(folder)
    assert [line["step"] for line in lines] == [1, 2, 3] and "eval/reward" not in lines[-1]
    assert json.loads((folder / "checkpoint/trainer.json").read_text())["step"] == 3


def test_a_signal_while_the_model_is_loaded(recipe, tmp_path, capsys):
    (tmp_path / "slow.py").write_text("import signal\nsignal.raise_signal(signal.SIGTERM)\n")
    sets = ["--set", f"rewards.functions=['{tmp_path}/slow.py:f']", "--set", "rewards.weights=[1]"]
    assert train.main([str(recipe), *sets, "--output", str(tmp_path / "run")]) == 0
    assert "stopped by SIGTERM before it began" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_killed_run_goes_on_from_its_last_checkpoint(finished, recipe, tmp_path, monkeypatch):
    """Steps after the checkpoint, and a line cut short, are computed and logged again."""
    folder = tmp_path / "run"
    call = JsonLines.__call__

    class Killed(BaseException):
        pass

    def dying(log, record):
        call(log, record)
        if log.path.name == "metrics.jsonl" and record["step"] == 6:
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(JsonLines, "__call__", dying)
        train.main([str(recipe), "--output", str(folder)])
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 7, "rew')
    assert train.main(["--resume", str(folder)]) == 0
    assert_same_run(folder, finished)


def test_what_a_resumed_run_may_change(finished, tmp_path, capsys):
    folder = tmp_path / "run"
    for path in finished.rglob("*"):
        if path.is_file():
            (folder / path.relative_to(finished)).parent.mkdir(parents=True, exist_ok=True)
            (folder / path.relative_to(finished)).write_bytes(path.read_bytes())
    assert train.main(["--resume", str(folder), "--set", "train.gamma=0.5"]) == 2
    assert "got another train.gamma" in capsys.readouterr().err
    assert train.main(["--resume", str(folder), "--set", "train.max_steps=7"]) == 0
    assert [line["step"] for line in records(folder)] == [1, 2, 3, 4, 5, 6, 7]
    assert "max_steps = 7" in (folder / "recipe.toml").read_text()
    assert json.loads((folder / "results.json").read_text())["after"]["step"] == 7
    model = folder / "checkpoint" / "model.safetensors"
    model.write_bytes(model.read_bytes()[:100])
    assert train.main(["--resume", str(folder)]) == 2
    assert "model.safetensors" in (error := capsys.readouterr().err) and "begin again" in error


def test_what_has_changed_in_the_files_since(recipe, tmp_path, capsys):
    folder, prompts = tmp_path / "run", tmp_path / "prompts.jsonl"
    names = ("rewards.py", "held_out.txt", "recipe.toml")
    rewards, held_out, own = (tmp_path / name for name in names)
    for path in (rewards, held_out, own):
        path.write_bytes((recipe.parent / path.name).read_bytes())
    prompts.write_text('{"prompt": "one", "answer": 1}\n{"prompt": "two", "answer": 2}\n')
    options = ["--set", f"data.prompts={prompts}", "--set", "train.max_steps=1"]
    assert train.main([str(own), *options, "--output", str(folder)]) == 0
    again = ["--resume", str(folder), "--set"]
    assert train.main([*again, "train.max_steps=2"]) == 0
    assert "changed" not in capsys.readouterr().err
    rewards.write_text(REWARDS.replace("len(text)", "2 * len(text)"))
    held_out.write_text("five\nsix\n")
    assert train.main([*again, "train.max_steps=3"]) == 0
    error = capsys.readouterr().err
    assert f"train: {rewards} has been changed since" in error and error.count("\n") == 2
    assert "train: the held-out rows are others than before" in error
    assert train.main([*again, "train.max_steps=1"]) == 2  # and both are not said again
    assert capsys.readouterr().err.startswith("train: expected train.max_steps >= 3, the steps")
    starts = json.loads((folder / "versions.json").read_text())["starts"]
    assert [start["step"] for start in starts] == [0, 2]
    prompts.write_text(prompts.read_text().replace('"answer": 1', '"answer": 3'))
    assert train.main([*again, "train.max_steps=4"]) == 2
    assert "got other train rows. Put the old ones back" in capsys.readouterr().err
    assert [line["step"] for line in records(folder)] == [1, 2, 3]
    for damaged in ('{"starts": 3}', '{"starts": [3]}', "{}"):
        (folder / "versions.json").write_text(damaged)
        for command in (train, report):
            arguments = again[:2] if command is train else [str(folder)]
            assert command.main(arguments) == 2
            assert "versions.json with a list of objects" in capsys.readouterr().err
    (folder / "versions.json").unlink()
    assert train.main([*again, "train.max_steps=4"]) == 0


def test_bad_input_writes_nothing(recipe, tmp_path, capsys, monkeypatch):
    folder = tmp_path / "run"
    (recipe.parent / "taken.jsonl").write_text('{"prompt": "a", "completions": "b"}\n')
    (tmp_path / "raising.py").write_text(
        "class C:\n  def __init__(self):\n    raise RuntimeError('no GPU here')\n"
        "def needs(completions, answer):\n  return answer\n"
        "from fastrl.rewards import WeightedSum\n"
        "def both():\n  return WeightedSum({'a': WeightedSum([needs])}, name='both')\n"
    )
    monkeypatch.chdir(tmp_path)
    for options, message in {
        ("nowhere.toml",): "to be a file that can be read",
        (str(recipe), "--set", "rewards.functions=['rewards.py:no']", "--set",
         "rewards.weights=[1]"): "to name a file that exists",
        (str(recipe), "--set", "data.prompts=none.txt"): "none.txt: No such file",
        (str(recipe), "--set", "data.eval=none.txt"): "none.txt: No such file",
        (str(recipe), "--set", 'data.prompts=["a", ""]'): "in data.prompts: Trainer:",
        (str(recipe), "--set", "model.tokenizer=./nowhere"): "model.tokenizer to be a name",
        (str(recipe), "--set", "model.lstm={embed_dim=0, hidden_dim=2}"): "embed_dim >= 1, got 0",
        (str(recipe), "--set", "model.lstm.vocab_size=20"): "each of the tokenizer's 257 tokens",
        (str(recipe), "--set", "model.device=abacus"): "device auto, cpu or an available cuda",
        (str(recipe), "--set", "model.device='cpu:'"): "or an available cuda, got cpu:.",
        (str(recipe), "--set", "model.device=cuda:²"): "or an available cuda, got cuda:².",
        (str(recipe), "--set", "model.random={model_type='gpt2', n_embd=8, n_head=2}", "--set",
         "model.random.n_positions=8", "--set", "model.lstm="): "has positions for, got 9 + 5 at",
        (str(recipe), "--set", f"data.prompts={recipe.parent}/taken.jsonl"): "['completions']. Rew",
        (str(recipe), "--set", "train.seed=9223372036854775808"): "seed below 2 ** 63, got 92",
        (str(recipe), "--set", "data.eval="): "held-out prompts with eval.every = 3, got",
        (str(recipe), "--set", "data.eval=", "--set", "data.eval_limit=2"): "with data.eval, got",
        (str(recipe), "--set", "rewards.functions=['raising.py:C']", "--set",
         "rewards.weights=[1]"): f"RuntimeError: no GPU here ({tmp_path}/raising.py, line 3)",
        (str(recipe), "--set", "rewards.functions=['raising.py:needs']", "--set",
         "rewards.weights=[1]"): "with the column 'answer', which reward function needs needs, got",
        (str(recipe), "--set", "rewards.functions=[{use='raising.py:both'}]", "--set",
         "rewards.weights=[1]"): "which reward function both/a/needs needs, got columns",
        (str(recipe), "--set", "over_optimization={gold='raising.py:needs', alpha=0.5}"):
         "with the column 'answer', which reward function needs needs, got",
        (str(recipe), "--resume", "x"): "without --output",
        ("--set", "a.b=1"): "a RECIPE.toml, or --resume FOLDER, got neither",
    }.items():  # fmt: skip
        assert train.main([*options, "--output", str(folder)]) == 2, options
        error = capsys.readouterr().err
        assert message in error and error.startswith("train: ") and error.count("\n") == 1
        assert not folder.exists()
    assert train.main([str(recipe), "--output", str(recipe.parent)]) == 2
    assert "with files in it" not in (error := capsys.readouterr().err) or "a run" in error


def test_a_reward_function_that_raises_is_shown(recipe, tmp_path, capsys):
    (tmp_path / "bad.py").write_text("def bad(completions, **c):\n    return completions[0] / 2\n")
    sets = ["--set", f"rewards.functions=['{tmp_path}/bad.py:bad']", "--set", "rewards.weights=[1]"]
    options = [str(recipe), *sets, "--output", str(tmp_path / "run")]
    assert train.main(options) == 1
    error = capsys.readouterr().err
    assert "return completions[0] / 2" in error and "reward function bad raised TypeError" in error


def test_code_of_a_recipe_that_exits_has_not_finished_the_run(recipe, tmp_path, capsys):
    (tmp_path / "exits.py").write_text("def exits(completions, **c):\n    raise SystemExit(0)\n")
    sets = ["--set", f"rewards.functions=['{tmp_path}/exits.py:exits']", "--set"]
    options = [str(recipe), *sets, "rewards.weights=[1]", "--output", str(tmp_path / "run")]
    assert train.main(options) == 1
    assert "expected the recipe's code to return, got sys.exit(0)" in capsys.readouterr().err


def test_a_reader_of_the_output_that_goes_is_said(recipe, tmp_path, capsys, monkeypatch):
    """As in `fastrl train ... | head -1`."""
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        assert cli.main(["train", str(recipe), "--output", str(tmp_path / "run")]) == 1
    error = capsys.readouterr().err
    assert error.startswith("train: expected standard output to have a reader, got none")


def test_help_explains_recipes_and_the_demo(capsys):
    assert cli.main(["train", "--help"]) == 0
    shown = capsys.readouterr().out
    for words in ("--set KEY=VALUE", "samples_every = 20", "Exit status", "--corpus"):
        assert words in shown
    assert train.main(["tiny_grpo", "--help"]) == 0


def test_sigterm_of_a_process(recipe, tmp_path):
    """In a process of its own: the signal, the exit status and the message are the shell's."""
    folder = tmp_path / "run"
    command = [sys.executable, "-m", "fastrl", "train", str(recipe), "--output", str(folder)]
    process = subprocess.Popen(
        [*command, "--set", "train.max_steps=100000", "--set", "eval.every=0"],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
    )
    try:
        while not (folder / "metrics.jsonl").exists() or not (folder / "metrics.jsonl").read_text():
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        _, error = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0
    assert f"--resume {folder}" in error.decode() and "Traceback" not in error.decode()
    steps = [line["step"] for line in records(folder)]
    assert json.loads((folder / "checkpoint/trainer.json").read_text())["step"] == steps[-1]
    resumed = ["--resume", str(folder), "--set", f"train.max_steps={steps[-1] + 1}"]
    assert train.main(resumed) == 0
    assert [line["step"] for line in records(folder)] == [*steps, steps[-1] + 1]
