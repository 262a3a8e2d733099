import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

for package in ("tokenizers", "safetensors", "rich", "matplotlib", "tyro"):
    pytest.importorskip(package)

from safetensors.torch import load_file  # noqa: E402

from fastrl.cli import train  # noqa: E402
from fastrl.cli.training import stages  # noqa: E402

TINY = (
    "--max-characters 60000 --vocab-size 400 --embed-dim 16 --hidden-dim 24 --warmup-steps 12 "
    "--warmup-batch 4 --steps 4 --prompts-per-step 2 --completions-per-prompt 2 "
    "--completion-tokens 16 --prompt-tokens 12 --evaluation-prompts 12 --evaluation-completions 2 "
    "--save-every 3 --threads 1"
).split()
STAGES = ("warm_up", "policy_gradient", "actor_critic")


@pytest.fixture(autouse=True)
def _same_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "finished"
    assert train.main([*TINY, "--output", str(folder)]) == 0
    return folder


def records(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def without_times(folder: Path) -> list[dict]:
    timed = ("time/", "tokens_per_second")
    return [{k: v for k, v in r.items() if not k.startswith(timed)} for r in records(folder)]


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def assert_same_run(folder: Path, other: Path) -> None:
    assert without_times(folder) == without_times(other)
    for name in ("policy_gradient/checkpoint", "actor_critic/checkpoint"):
        weights, others = (load_file(f / name / "model.safetensors") for f in (folder, other))
        assert all(torch.equal(weights[key], others[key]) for key in weights)
    mine, theirs = (json.loads((f / "results.json").read_text()) for f in (folder, other))
    for stage in STAGES:
        assert mine[stage]["prompt_rewards"] == theirs[stage]["prompt_rewards"]
        assert mine[stage]["samples"] == theirs[stage]["samples"]


def test_a_run_leaves_what_it_promises(finished):
    assert {path.name for path in finished.iterdir()} == {
        *STAGES, ".lock", "config.json", "tokenizer.json", "metrics.jsonl", "results.json",
        "learning_curve.png",
    }  # fmt: skip
    assert (finished / "learning_curve.png").read_bytes().startswith(b"\x89PNG")
    for stage, count in zip(STAGES, (12, 4, 4), strict=True):
        assert [r["step"] for r in records(finished) if r["stage"] == stage] == [
            *range(1, count + 1)
        ]
    suffixes = {path.suffix for path in finished.rglob("*") if path.is_file()}
    assert suffixes == {".json", ".jsonl", ".safetensors", ".png", ""}
    for name, content in files(finished).items():
        # The length of safetensors' header, which comes first, may be any bytes.
        start = content[8:] if name.endswith(".safetensors") else content
        assert not start.startswith((b"\x80", b"PK")), f"{name} looks like a pickle"
    results = json.loads((finished / "results.json").read_text())
    assert results["step_timing"]["gradient/relative"] < 1e-4


def test_a_finished_run_shows_its_result_again(finished, capsys):
    before = files(finished)
    assert train.main(["--resume", str(finished)]) == 0
    shown = capsys.readouterr().out
    assert "is finished" in shown
    for words in ("gain", "perplexity", "distinct-2", "truth", "fastrl.reference", "prompt"):
        assert words in shown
    assert "\x1b" not in shown  # plain text where there is no terminal
    after = files(finished)
    assert {k: v for k, v in after.items() if k != "learning_curve.png"} == {
        k: v for k, v in before.items() if k != "learning_curve.png"
    }


@pytest.mark.parametrize(
    "stage, step", [("warm_up", 5), ("policy_gradient", 2), ("actor_critic", 3)]
)
def test_an_interrupted_run_goes_on_to_the_same_end(
    finished, tmp_path, monkeypatch, capsys, stage, step
):
    folder = tmp_path / "run"
    add = stages.MetricsLog.add

    def interrupting_add(log, name, record):
        add(log, name, record)
        if (name, record["step"]) == (stage, step):
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(stages.MetricsLog, "add", interrupting_add)
        assert train.main([*TINY, "--output", str(folder)]) == 0  # as a scheduler expects
    assert f"fastrl train --resume {folder}" in capsys.readouterr().err
    assert records(folder)[-1]["step"] == step
    assert train.main(["--resume", str(folder), "--threads", "1"]) == 0
    assert_same_run(folder, finished)


def test_a_killed_run_goes_on_from_its_last_checkpoint(finished, tmp_path, monkeypatch):
    """Steps after the checkpoint, and a line cut short, are computed and logged again."""
    folder = tmp_path / "run"
    add = stages.MetricsLog.add

    class Killed(BaseException):
        pass

    def dying_add(log, name, record):
        add(log, name, record)
        if (name, record["step"]) == ("actor_critic", 4):
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(stages.MetricsLog, "add", dying_add)
        train.main([*TINY, "--output", str(folder)])
    assert records(folder)[-1]["step"] == 4  # the checkpoint stands at 3
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"stage": "actor_critic", "st')
    assert train.main(["--resume", str(folder), "--threads", "1"]) == 0
    assert_same_run(folder, finished)


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "to exist, got no such file"),
        (b"", "to hold text, got an empty file"),
        (b" \n\n\t\n", "to hold text, got an empty file"),
        (b"A short text.\n" * 10, "at least 10000 characters"),
        ("Ein kurzer Satz über nichts. ".encode("latin-1") * 900, "UTF-8, got byte 0xfc at offset"),
        (b"the same paragraph over and over, which is no corpus\n\n" * 900, "distinct paragraphs"),
    ],
)
def test_a_bad_corpus_is_a_clear_error(tmp_path, capsys, content, message):
    corpus, folder = tmp_path / "corpus.txt", tmp_path / "run"
    if content is not None:
        corpus.write_bytes(content)
    assert train.main([*TINY, "--corpus", str(corpus), "--output", str(folder)]) == 2
    error = capsys.readouterr().err
    assert message in error and str(corpus.name) in error and error.count("\n") == 1
    assert not folder.exists()


def test_a_corpus_too_short_for_the_prompts(tmp_path, capsys):
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("\n\n".join(f"Paragraph {i}: " + "some words " * 20 for i in range(60)))
    options = [*TINY, "--corpus", str(corpus), "--prompt-tokens", "600"]
    assert train.main([*options, "--output", str(tmp_path / "run")]) == 2
    assert "held-out prompts of 616 tokens" in capsys.readouterr().err


def test_a_folder_in_use_is_left_alone(finished, tmp_path, capsys):
    before = files(finished)
    assert train.main([*TINY, "--output", str(finished)]) == 2
    assert f"already holds a run. Go on with it: fastrl train --resume {finished}" in (
        capsys.readouterr().err
    )
    (tmp_path / "thesis.tex").write_text("years of work")
    assert train.main([*TINY, "--output", str(tmp_path)]) == 2
    assert "with files in it" in capsys.readouterr().err
    assert train.main([*TINY, "--output", str(tmp_path / "thesis.tex")]) == 2
    assert "a folder that can be made" in capsys.readouterr().err
    assert train.main(["--resume", str(tmp_path)]) == 2
    assert "without a config.json" in capsys.readouterr().err
    assert files(finished) == before and files(tmp_path) == {"thesis.tex": b"years of work"}


@pytest.mark.parametrize(
    "name, remedy",
    [
        ("warm_up/state.safetensors", "Delete the file to repeat the warm-up"),
        ("actor_critic/checkpoint/model.safetensors", "to repeat the stage"),
        ("actor_critic/checkpoint/trainer.json", "to repeat the stage"),
        ("tokenizer.json", "Restore the file"),
        ("config.json", "Restore the file"),
        ("results.json", "Restore the file"),
    ],
)
def test_a_file_cut_short_is_a_clear_error(finished, tmp_path, capsys, name, remedy):
    folder = tmp_path / "run"
    for path, content in files(finished).items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content[: len(content) // 2] if path == name else content)
    if name.startswith("actor_critic"):  # as if interrupted in that stage
        results = json.loads((folder / "results.json").read_text())
        del results["actor_critic"], results["step_timing"]
        (folder / "results.json").write_text(json.dumps(results))
    if name.startswith("warm_up"):
        (folder / "results.json").unlink()
    before = files(folder)
    assert train.main(["--resume", str(folder)]) == 2
    error = capsys.readouterr().err
    assert remedy in error and Path(name).name in error
    after = files(folder)
    assert {k: v for k, v in after.items() if k != "metrics.jsonl"} == {
        k: v for k, v in before.items() if k != "metrics.jsonl"
    }


@pytest.mark.parametrize(
    "options, message",
    [
        (["--gamma", "1.5"], "expected --gamma in [0, 1], got 1.5"),
        (["--steps", "0"], "expected --steps >= 1, got 0"),
        (["--learning-rate", "nan"], "expected --learning-rate"),
        (["--completions-per-prompt", "1"], "expected --completions-per-prompt >= 2"),
        (["--vocab-size", "100"], "expected --vocab-size >= 320"),
        (["--held-out-fraction", "0"], "expected --held-out-fraction in (0, 0.4]"),
        (["--device", "abacus"], "expected --device auto, cpu or an available cuda"),
        (["--device", "cuda:999"], "expected --device auto, cpu or an available cuda"),
        (["--threads", "0"], "expected --threads >= 1"),
    ],
)
def test_bad_options(tmp_path, capsys, options, message):
    assert train.main([*options, "--output", str(tmp_path / "run")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_resume_takes_no_other_settings(finished, capsys):
    assert train.main(["--resume", str(finished), "--steps", "9"]) == 2
    assert "expected --resume without --steps, got 9" in capsys.readouterr().err
    assert train.main(["--resume", str(finished), "--output", "elsewhere"]) == 2
    assert "expected --resume without --output" in capsys.readouterr().err


def test_another_text_is_not_resumed(finished, tmp_path, capsys):
    folder = tmp_path / "run"
    for path, content in files(finished).items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    config = json.loads((folder / "config.json").read_text())
    config["corpus"]["sha256"] = "0" * 64
    (folder / "config.json").write_text(json.dumps(config))
    assert train.main(["--resume", str(folder)]) == 2
    assert "Put the old text back" in capsys.readouterr().err


def test_a_missing_package_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(train, "EXTRAS", (*train.EXTRAS, "no_such_package"))
    assert train.main([]) == 2
    error = capsys.readouterr().err
    assert "got no no_such_package" in error and 'pip install "fastrl[train]"' in error
    assert error.count("\n") == 1


def test_unknown_options_and_help(capsys):
    assert train.main(["--no-such-option"]) == 2
    assert train.main(["--help"]) == 0
    assert "--corpus" in capsys.readouterr().out


def test_ctrl_c_leaves_a_run_that_can_go_on(tmp_path):
    """In a process of its own: the signal, the exit status and the message are the shell's."""
    folder = tmp_path / "run"
    command = [sys.executable, "-m", "fastrl", "train", *TINY, "--warmup-steps", "100000"]
    process = subprocess.Popen(
        [*command, "--output", str(folder)], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL
    )
    try:
        while not (folder / "metrics.jsonl").exists() or not (folder / "metrics.jsonl").read_text():
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert f"--resume {folder}" in error.decode() and "Traceback" not in error.decode()
    assert (folder / "warm_up" / "state.safetensors").exists()
