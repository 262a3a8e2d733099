"""SIGKILL at any moment: a run that is resumed ends bitwise where one that was not killed ends."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import fastrl

SCRIPT = Path(__file__).with_name("killed_run.py")
TESTS = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """The folders of all runs, and the report of what happened in them."""
    root = tmp_path_factory.mktemp("killed")
    package = Path(fastrl.__file__).parents[1]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{package}:{TESTS}"}
    command = [sys.executable, str(SCRIPT), str(root)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return root, json.loads((root / "report.json").read_text())


def contents(folder, may_be_left=()):
    """All bytes of a run's checkpoint: weights, moments, generators, the trainer's state."""
    assert {path.name for path in folder.iterdir()} - {*may_be_left} == {"checkpoint"}
    files = {p.name: p.read_bytes() for p in (folder / "checkpoint").rglob("*") if p.is_file()}
    description = json.loads(files["trainer.json"])
    description["config"].pop("output_dir")
    return {**files, "trainer.json": description}


@pytest.mark.parametrize("kind", ["reinforce", "vtrace"])
def test_twenty_random_moments(killed, kind):
    root, report = killed
    report = report[kind]["random"]
    assert len(report["hits"]) >= 20
    assert set(report["hits"]) == {"start", "rollout", "update", "save"}
    whole = contents(root / kind / "random" / "whole")
    assert whole["trainer.json"]["step"] == 30
    for run in range(report["runs"]):
        # If the last save was killed while it tidied up, no other one has done so.
        folder = root / kind / "random" / f"killed{run}"
        assert contents(folder, {".checkpoint.previous"}) == whole


@pytest.mark.parametrize("when, step", [("first", 1), ("later", 3)])
def test_between_any_two_operations_of_a_save(killed, when, step):
    root, report = killed
    report = report["reinforce"][when]
    assert report["operations"] > 20
    whole = contents(root / "reinforce" / when / "whole")
    assert whole["trainer.json"]["step"] == step + 1
    for run in range(report["operations"] + 1):
        assert contents(root / "reinforce" / when / f"killed{run}") == whole
    # What a resume found: the step before as long as the new one was not in its place.
    found = report["found"]
    assert found == sorted(found)
    assert set(found) == {step - 1, step}
