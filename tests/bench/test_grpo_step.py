import json
import re

import pytest

from bench import grpo_step

TINY = "--vocab 97 --hidden 16 --head-size 8 --layers 1 --prompts 2 --completions 2 --tokens 4"
TARGETS = {  # as the issue has them, for the case "long"
    "step, TRL / fastrl GRPO": ">= 6x",
    "peak memory, fastrl GRPO / TRL": "<= 0.5x",
    "rollout, transformers / fastrl": ">= 5x",
    "step, fastrl PPO / fastrl GRPO": "<= 1.3x",
    "largest log-prob gap, rollout to update": "<= 1e-05",
}


def test_a_tiny_run_has_every_contestant_do_all_the_work(capsys, tmp_path, monkeypatch):
    pytest.importorskip(
        "trl", reason="TRL is not installed: `make test` does it, from Python 3.11 on"
    )
    # A process for each costs seconds; here they are measured one by one in this one.
    monkeypatch.setattr(grpo_step, "peak_in_a_process", grpo_step.peak_of)
    path = tmp_path / "found.json"
    given = [*TINY.split(), "--prompt-tokens", "6", "--steps", "2", "--rounds", "1"]
    grpo_step.main([*given, "--json", str(path)])
    printed = capsys.readouterr().out
    found = json.loads(path.read_text())
    assert list(found["runs"]) == list(grpo_step.CONTESTANTS)
    for name, run in found["runs"].items():
        assert run["median"] > 0 and run["first"] > 0 and len(run["records"]) == 2
        for record in run["records"]:  # no completion ends before it has all its tokens
            assert record["completions/mean_length"] == 4, name
            assert 0 < record["reward"] < 6, name
        if name in ("trl", "grpo", "ppo"):
            assert all(record["grad_norm"] > 0.01 for record in run["records"]), name
    for name, promise in TARGETS.items():
        assert re.search(
            rf"^{re.escape(name)} +\S+ +{re.escape(promise)} +(kept|MISSED)$", printed, re.M
        )
    gap = next(t["value"] for t in found["targets"] if t["name"].startswith("largest log-prob gap"))
    assert 0 <= gap <= 1e-5


def test_a_target_says_whether_it_was_kept():
    assert str(grpo_step.Target("step", 5.99, 6, at_most=False)).endswith(">= 6x     MISSED")
    assert str(grpo_step.Target("step", 6.0, 6, at_most=False)).endswith("kept")
    assert str(grpo_step.Target("peak", 0.51, 0.5, at_most=True)).endswith("MISSED")
