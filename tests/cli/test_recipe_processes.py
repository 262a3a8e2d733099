"""`fastrl train RECIPE` in two processes: one run, what one process makes of it, said once."""

import io
import json
import os
import signal
import socket
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

for package in ("rich", "safetensors", "tensorboard", "transformers"):
    pytest.importorskip(package)

from safetensors.torch import load_file  # noqa: E402

from fastrl.cli import main as cli  # noqa: E402
from fastrl.cli.recipes.device import find_device  # noqa: E402
from fastrl.cli.recipes.toml import RecipeError  # noqa: E402
from fastrl.trainers import _steps  # noqa: E402

RECIPE = """
algorithm = "ppo"
[model]
lstm = {embed_dim = 8, hidden_dim = 16}
tokenizer = "bpe"
vocab_size = 270
[data]
builder = "task.py:build"
[rewards]
functions = ["task.py:drawing"]
[supervised]
steps = 7
tokens_per_step = 60
validate_every = 3
prompt_weight = 0.5
[train]
max_steps = 4
prompts_per_step = 3
completions_per_prompt = 2
max_new_tokens = 5
learning_rate = 1e-2
kl_coef = 0.01
save_every = 3
[log]
samples_every = 2
[eval]
every = 2
[over_optimization]
gold = "task.py:drawing"
every = 2
"""
TASK = """
import os
import torch
def build(folder, seed):
    if "RANK" in os.environ and os.environ.get("FAILS_IN") == os.environ["RANK"]:
        raise ValueError(f"build: expected a table, got none in {os.environ['RANK']}")
    rows = [{"prompt": f"count {i} ", "reference": f"then {i + 1}"} for i in range(30)]
    held_out = [{"prompt": f"count {i} ", "reference": f"then {i + 1}"} for i in range(50, 60)]
    return {"train": rows, "held_out": held_out}
def unordered(folder, seed):
    rows = build(folder, seed)
    if os.environ.get("RANK") == "1":
        rows["supervised"] = rows["train"][::-1]
    return rows
def drawing(completions, reference, **columns):
    return [len(set(c) & set(r)) + float(torch.rand(())) for c, r in zip(completions, reference)]
def raising(**columns):
    raise OSError("no reward today")
def exiting(**columns):
    raise SystemExit(3)
"""


def worker(rank, folder):
    """One of the two processes: the command that job.json has, as torchrun would start it."""
    job = json.loads(Path(folder, "job.json").read_text())
    variables = {"RANK": str(rank), "LOCAL_RANK": str(rank), **job["environment"]}
    make_step = _steps._make_step

    def make_step_with_signal(trainer):
        result = make_step(trainer)
        if [rank, trainer.step] == job["signal"]:
            os.kill(os.getpid(), signal.SIGTERM)
        return result

    out, err = io.StringIO(), io.StringIO()
    os.environ |= variables
    _steps._make_step = make_step_with_signal
    try:
        with redirect_stdout(out), redirect_stderr(err):
            status = cli.main(job["arguments"])
    finally:
        _steps._make_step = make_step
        for name in variables:
            del os.environ[name]
        if dist.is_initialized():  # after an error, when a process of its own would end
            dist.destroy_process_group()
    found = {"status": status, "out": out.getvalue(), "err": err.getvalue()}
    torch.save(found, Path(folder, f"{rank}.pt"))


@pytest.fixture
def both(two_ranks, tmp_path):
    """Run `fastrl *arguments` in both processes; what became of it in each."""

    def run(*arguments, signal=None, **environment):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        job = {"arguments": [str(argument) for argument in arguments], "signal": signal}
        (tmp_path / "job.json").write_text(json.dumps({**job, "environment": group | environment}))
        return two_ranks.run(__file__, tmp_path)

    return run


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("recipe")
    (folder / "task.py").write_text(TASK)
    (folder / "recipe.toml").write_text(RECIPE)
    return folder / "recipe.toml"


@pytest.fixture(scope="module")
def alone(recipe, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "alone"
    assert cli.main(["train", str(recipe), "--output", str(folder)]) == 0
    return folder


def records(folder, name):
    lines = [json.loads(line) for line in (folder / name).read_text().splitlines()]
    timed = ("time/", "tokens_per_second")
    return [{k: v for k, v in r.items() if not k.startswith(timed)} for r in lines]


def assert_same_run(folder, other):
    """Up to the order of sums, and to the last file."""
    for name in ("supervised.jsonl", "metrics.jsonl"):
        mine, theirs = records(folder, name), records(other, name)
        assert len(mine) == len(theirs)
        for record, expected in zip(mine, theirs, strict=True):
            # The largest difference of a log-prob is rounding and no more.
            gap = expected.pop("logprob_gap", 0.0), record.pop("logprob_gap", 0.0)
            assert max(gap) < 1e-5
            assert record == pytest.approx(expected, rel=1e-4, abs=1e-6, nan_ok=True)
    texts = [
        [(s["step"], s["prompt"], s["completion"]) for s in records(f, "samples.jsonl")]
        for f in (folder, other)
    ]
    assert texts[0] == texts[1]
    for part in ("start", "checkpoint"):
        mine, theirs = (load_file(f / part / "model.safetensors") for f in (folder, other))
        assert mine.keys() == theirs.keys()
        for name, weight in theirs.items():
            assert (mine[name] - weight).abs().max() < 1e-5, (part, name)
    mine, theirs = (json.loads((f / "results.json").read_text()) for f in (folder, other))
    assert mine.keys() == theirs.keys() == {"before", "after", "monitor"}
    for entry in ("before", "after"):
        prompts, expected = (found[entry]["prompt_rewards"] for found in (mine, theirs))
        assert prompts == pytest.approx(expected, rel=1e-5)
        texts = [[s["completion"] for s in found[entry]["samples"]] for found in (mine, theirs)]
        assert texts[0] == texts[1] and len(texts[0]) == 10
    files = [{p.relative_to(f).parts[0] for p in f.rglob("*")} for f in (folder, other)]
    assert files[0] == files[1]


def test_two_processes_make_the_run_of_one(both, alone, recipe, tmp_path):
    folder = tmp_path / "run"
    first, second = both("train", recipe, "--output", folder)
    assert (first["status"], first["err"]) == (0, "") and "held out" in first["out"]
    assert second == {"status": 0, "out": "", "err": ""}
    assert_same_run(folder, alone)
    assert len(list((folder / "tensorboard").iterdir())) == 1
    starts = json.loads((folder / "versions.json").read_text())["starts"]
    assert [start["step"] for start in starts] == [0]


@pytest.mark.parametrize(("rank", "step"), [(0, 1), (1, 3)])
def test_a_signal_to_one_ends_both_and_any_number_goes_on(
    both, alone, recipe, tmp_path, rank, step
):
    folder = tmp_path / "run"
    stopped = both("train", recipe, "--output", folder, signal=[rank, step])
    assert [found["status"] for found in stopped] == [0, 0]
    assert f"SIGTERM after step {step}. Everything is saved" in stopped[0]["err"]
    assert stopped[1]["err"] == ""
    assert len(records(folder, "metrics.jsonl")) == step
    if rank == 0:
        assert cli.main(["train", "--resume", str(folder)]) == 0
    else:
        again = both("train", recipe, "--output", folder, "--resume")
        assert [(found["status"], found["err"]) for found in again] == [(0, ""), (0, "")]
    assert_same_run(folder, alone)


def test_a_run_of_one_goes_on_in_two(both, alone, recipe, tmp_path, monkeypatch):
    folder, make_step = tmp_path / "run", _steps._make_step

    def killed(trainer):
        if trainer.step == 3:  # right after a checkpoint
            raise OSError("killed")
        return make_step(trainer)

    with monkeypatch.context() as patch:
        patch.setattr(_steps, "_make_step", killed)
        assert cli.main(["train", str(recipe), "--output", str(folder)]) == 1
    found = both("train", "--resume", folder)
    assert [process["status"] for process in found] == [0, 0]
    assert_same_run(folder, alone)


def set_rewards(name):
    return "--set", f'rewards.functions=["{name}"]'


@pytest.mark.parametrize(
    ("arguments", "environment", "status", "speaker", "message"),
    [
        (["no_such_recipe"], {}, 2, 0, "expected a recipe"),
        (["--set", "train.no_such=1"], {}, 2, 0, "no_such"),
        (["--output", "{taken}"], {}, 2, 0, "expected --output a new or empty folder"),
        (["--resume", "{taken}"], {}, 2, 0, "expected --resume the folder of a run"),
        ([], {"FAILS_IN": "1"}, 2, 1, "got none in 1"),
        ([], {"FAILS_IN": "0"}, 2, 0, "got none in 0"),
        (set_rewards("{code}:raising"), {}, 1, 0, "no reward today"),
        (set_rewards("{code}:exiting"), {}, 1, 0, "got sys.exit(3)"),
        (["--set", "model.device=cuda:7"], {}, 2, 0, "expected model.device"),
        (["--set", "data.builder={code}:unordered"], {}, 2, 0, "the same supervised rows in all"),
        (["--no-such-option"], {}, 2, 0, "unrecognized arguments"),
    ],
)
def test_what_fails_is_said_once(
    both, recipe, tmp_path, arguments, environment, status, speaker, message
):
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "file").write_text("")
    names = {"{taken}": str(taken), "{code}": str(recipe.parent / "task.py")}
    for name, value in names.items():
        arguments = [argument.replace(name, value) for argument in arguments]
    given = arguments if "no_such_recipe" in arguments else [recipe, *arguments]
    if not {"--output", "--resume"} & set(arguments):
        given += ["--output", tmp_path / "run"]
    found = both("train", *given, **environment)
    assert message in found[speaker]["err"] and found[speaker]["status"] == status
    assert found[1 - speaker]["err"] == "" and found[1 - speaker]["status"] in (1, status)
    if status == 2:
        assert not (tmp_path / "run").exists()


def test_preference_models_and_the_demo_are_of_one_process(both, tmp_path):
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n' * 4)
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        'algorithm = "preference"\n[model]\nlstm = {embed_dim = 8, hidden_dim = 8}\n'
        'tokenizer = "bytes"\n[data]\npairs = "pairs.jsonl"\neval_pairs = "pairs.jsonl"\n'
    )
    first, second = both("train", recipe, "--output", tmp_path / "run")
    assert "expected one process" in first["err"] and second["err"] == ""
    assert (first["status"], second["status"]) == (2, 2)
    demo = both("train", "--output", tmp_path / "run")
    assert "expected one process for the demo, got 2" in demo[0]["err"]
    assert demo[1] == {"status": 2, "out": "", "err": ""}
    assert not (tmp_path / "run").exists()


def test_each_process_takes_the_gpu_of_its_number(monkeypatch):
    taken = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    assert find_device("auto", local_rank=1) == find_device("cuda", local_rank=1)
    assert find_device("auto", local_rank=1) == torch.device("cuda:1") and set(taken) == {1}
    assert find_device("cpu", local_rank=1) == torch.device("cpu")
    assert find_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(RecipeError, match="a GPU for each process of a machine, got cuda and 2 "):
        find_device("auto", local_rank=2)
    with pytest.raises(RecipeError, match="got cuda:1 and 2 for process 0"):
        find_device("cuda:1", local_rank=0)


def test_world_size_without_the_rest_is_an_error(recipe, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert cli.main(["train", str(recipe), "--output", str(tmp_path / "run")]) == 2
    assert "expected RANK, MASTER_ADDR, MASTER_PORT in the environm" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_torchrun(tmp_path):
    """The command that --help names."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = ["-m", "fastrl", "train", "tiny_grpo", "--output", str(tmp_path / "run")]
    options = ["--set", "train.max_steps=2", "--set", "log.tensorboard=false"]
    result = subprocess.run(
        [*torchrun, "--nproc-per-node", "2", *command, *options],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("run folder") == 1
    assert len(records(tmp_path / "run", "metrics.jsonl")) == 2
