import io
import json
import math
import statistics

import pytest
import torch

for package in ("rich", "safetensors", "tensorboard", "transformers"):
    pytest.importorskip(package)

from rich.console import Console  # noqa: E402

from fastrl.cli import eval as evaluation  # noqa: E402
from fastrl.cli import main as cli  # noqa: E402
from fastrl.cli import train  # noqa: E402
from fastrl.cli.recipes.models import load_tokenizer  # noqa: E402
from fastrl.cli.recipes.parse import read_recipe  # noqa: E402
from fastrl.cli.recipes.result import show_result  # noqa: E402
from fastrl.models import LSTMLanguageModel  # noqa: E402
from fastrl.trainers import load_model  # noqa: E402

RECIPE = """
algorithm = "a2c"
[model]
lstm = {embed_dim = 8, hidden_dim = 16}
tokenizer = "bytes"
[data]
prompts = ["one", "two words"]
eval = "held_out.jsonl"
[rewards]
functions = ["rewards.py:length", "rewards.py:fancy"]
weights = [1.0, 0.5]
[train]
max_steps = 2
prompts_per_step = 2
completions_per_prompt = 2
max_new_tokens = 4
learning_rate = 0.1
[log]
tensorboard = false
samples_every = 0
[eval]
completions_per_prompt = 3
temperature = 0
"""
REWARDS = """
def length(completion_ids, **columns):
    return [float(len(ids)) for ids in completion_ids]

def fancy(completions, worth, **columns):
    return worth

def broken(completions, **columns):
    raise OSError("no such judge")
"""
WORTH = [1.0, 2.0, 6.0, None]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("eval")
    (folder / "recipe.toml").write_text(RECIPE)
    (folder / "rewards.py").write_text(REWARDS)
    rows = [{"prompt": text, "worth": worth} for text, worth in zip("abcd", WORTH, strict=True)]
    (folder / "held_out.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "train.jsonl").write_text('{"prompt": "x", "worth": 0.0}\n')
    output = folder / "run"
    sets = ["--set", f"data.prompts={folder}/train.jsonl"]
    assert train.main([str(folder / "recipe.toml"), *sets, "--output", str(output)]) == 0
    return output


def evaluated(tmp_path, *options):
    path = tmp_path / "result.json"
    assert evaluation.main([*map(str, options), "--json", str(path)]) == 0
    return json.loads(path.read_text())


def test_rewards_have_intervals_over_prompts(run, tmp_path):
    found = evaluated(tmp_path, run, "--max-new-tokens", 3)
    worth = WORTH[:3]
    assert found["rewards/fancy"] == {
        "mean": pytest.approx(3.0),
        "half_width": pytest.approx(1.96 * statistics.stdev(worth) / math.sqrt(3)),
        "prompts": 3,
    }
    lengths = [r - 0.5 * (w or 0) for r, w in zip(found["prompt_rewards"], WORTH, strict=True)]
    assert found["rewards/length"]["mean"] == pytest.approx(statistics.mean(lengths))
    assert found["completions/mean_length"] == pytest.approx(statistics.mean(lengths))
    assert found["reward"]["mean"] == pytest.approx(statistics.mean(found["prompt_rewards"]))
    assert (found["num_prompts"], found["completions_per_prompt"]) == (4, 3)
    assert (found["max_new_tokens"], found["temperature"]) == (3, 0)
    assert found["ended"] == pytest.approx(1 - found["completions/clipped_ratio"])


def test_entropy_and_kl_are_those_of_the_models(run, tmp_path):
    """Greedy, so that the completion is known without fastrl's sampling."""
    torch.manual_seed(5)
    other = LSTMLanguageModel(257, 8, 16)
    from fastrl.models.storage import save_model

    (tmp_path / "other").mkdir()
    save_model(other, tmp_path / "other")
    (tmp_path / "p.txt").write_text("hello\n")
    options = ["--data", tmp_path / "p.txt", "--rewards", f"{run.parent}/rewards.py:length"]
    found = evaluated(
        tmp_path, run / "checkpoint", *options, "--reference", tmp_path / "other",
        "--tokenizer", "bytes", "--temperature", 0, "--max-new-tokens", 5,
    )  # fmt: skip
    model, ids = load_model(run / "checkpoint").language_model, load_tokenizer("bytes")("hello")
    ids = ids["input_ids"]
    entropies, divergences = [], []
    with torch.no_grad():
        for _ in range(5):
            rows = [m(torch.tensor([ids]))[0][0, -1].log_softmax(-1) for m in (model, other)]
            entropies.append(-float((rows[0].exp() * rows[0]).sum()))
            token = int(rows[0].argmax())
            gap = float(rows[1][token] - rows[0][token])
            divergences.append(math.exp(gap) - gap - 1)
            ids = [*ids, token]
            if token == 0:
                break
    assert found["entropy"] == pytest.approx(statistics.mean(entropies), rel=1e-4)
    assert found["kl"] == pytest.approx(statistics.mean(divergences), rel=1e-3)
    assert found["rewards/length"]["mean"] == len(divergences)
    itself = evaluated(tmp_path, run, "--reference", run)
    assert itself["kl"] == pytest.approx(0, abs=1e-6)
    assert "kl" not in evaluated(tmp_path, run)


def test_a_recipe_beside_a_model_and_what_a_person_reads(run, tmp_path, capsys):
    options = [str(run / "checkpoint"), str(run / "recipe.toml"), "--limit", "2", "-n", "2"]
    assert cli.main(["eval", *options]) == 0
    shown = capsys.readouterr().out
    for words in ("2 prompts, 2 completions each", "rewards/fancy", "1.5000 ± 0.9800", "entropy"):
        assert words in shown
    assert "\x1b" not in shown


def test_one_prompt_has_no_interval(run, tmp_path, capsys):
    found = evaluated(tmp_path, run, "--limit", 1)
    assert found["reward"]["half_width"] is None and found["reward"]["prompts"] == 1
    assert "±" not in next(x for x in capsys.readouterr().out.splitlines() if " reward " in x)


def test_a_run_whose_held_out_prompts_have_no_reward_shows_its_result(tmp_path):
    line = '{"step": 1, "reward": 1.0, "a line\u2028separator": 2.0}\n'  # as a reward may log it
    (tmp_path / "metrics.jsonl").write_text(line, encoding="utf-8")
    (tmp_path / "recipe.toml").write_text(RECIPE)
    console = Console(file=io.StringIO(), width=100)
    none = {"prompt_rewards": [None, math.nan], "eval/kl": 0.5}
    recipe = read_recipe(tmp_path / "recipe.toml")
    show_result(console, tmp_path / "metrics.jsonl", {"before": none, "after": none}, recipe)
    rows = [line.split() for line in console.file.getvalue().splitlines()]
    assert ["reward", "–", "–", "–"] in rows


def test_mistakes(run, tmp_path, capsys):
    plain = str(run / "checkpoint")
    data = ["--data", str(run.parent / "held_out.jsonl")]
    for options, message in [
        ([plain], "a RECIPE or --rewards NAME, got neither"),
        ([plain, "--rewards", f"{run.parent}/rewards.py:length"], "a RECIPE or --data FILE"),
        ([plain, "--rewards", "nowhere:f", *data], "eval: expected rewards.functions to name"),
        ([plain, "none.toml"], "to be a file that can be read"),
        ([str(run), "--rewards", f"{run.parent}/rewards.py:length", "--weights", "1", "2"],
         "reward_weights for 1 reward functions, got 2"),
        ([str(run), "--weights", "2"], "eval: expected --rewards with --weights, got none"),
        ([str(run), "--column", "text"], "eval: expected --data with --column, got none"),
        ([str(run), "--split", "test"], "eval: expected --data with --split, got none"),
        ([str(run), *data, "--split", "test"], "eval: expected --split with a dataset by name"),
        ([str(run), "--limit", "-1"], "eval: expected --limit >= 1, got -1"),
        ([str(run), "-n", "-3"], "completions_per_prompt a whole number >= 1, got -3"),
    ]:  # fmt: skip
        assert evaluation.main(options) == 2, options
        assert message in (error := capsys.readouterr().err) and "Traceback" not in error, error
    assert evaluation.main([str(run), "--rewards", f"{run.parent}/rewards.py:broken"]) == 1
    assert "broken raised OSError: no such judge" in capsys.readouterr().err
    early = [str(run), "--json", str(tmp_path / "no" / "such.json")]
    assert evaluation.main(early) == 2  # before anything is sampled
    assert "--json a file in a folder that is there, got" in capsys.readouterr().err
    full = [str(run), "--json", "/dev/full"]
    assert evaluation.main(full) == 1
    shown = capsys.readouterr()
    assert "eval: expected to write the result, got" in shown.err and "reward" in shown.out
