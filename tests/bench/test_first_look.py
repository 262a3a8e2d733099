"""The GPU tests as `make gpu` runs them: in which order, and what is left when one ends it all."""

import json
import os
import subprocess
import sys

import pytest

from bench.gpu.first_look import far_apart
from bench.gpu.parts import ROOT

TESTS = """
import pytest
import torch

@pytest.mark.parametrize("i", range(8))
def test_many(i):
    assert i != 3

def test_that_breaks_the_context(monkeypatch):
    def broken():
        raise RuntimeError("CUDA error: an illegal memory access")
    torch.cuda.is_initialized, torch.cuda.synchronize = lambda: True, broken

def test_behind_it():
    pass
"""


def test_one_of_each_function_comes_first_and_a_broken_context_ends_the_process(
    tmp_path, monkeypatch
):
    """As a worker of pytest-xdist: another one would go on."""
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)  # which this test may be run by
    path, found = tmp_path / "test_there.py", tmp_path / "found.jsonl"
    path.write_text(TESTS)
    command = [sys.executable, "-m", "pytest", "-p", "bench.gpu.first_look", "-q", str(path)]
    command += [f"--found={found}", "-p", "no:cacheprovider", "--rootdir", str(tmp_path)]

    def run(**env):
        found.unlink(missing_ok=True)
        done = subprocess.run(
            command, cwd=ROOT, env=os.environ | env, capture_output=True, text=True
        )
        lines = [json.loads(text) for text in found.read_text().splitlines()]
        names = [x["name"].partition("::")[2] for x in lines if x.get("outcome") == "failed"]
        return done, lines, names

    done, lines, names = run()
    assert "the GPU's context is broken" in done.stdout
    assert set(names) == {"test_that_breaks_the_context"}  # as it ends, and as it is torn down
    assert lines[0] == {"collected": 10} and lines[2]["name"].endswith("test_many[0]")
    assert lines[-2]["message"] == "RuntimeError: CUDA error: an illegal memory access"
    done, lines, names = run(PYTEST_XDIST_WORKER="gw0")
    assert done.returncode == 1 and "FAILURES" not in done.stdout
    assert names == ["test_that_breaks_the_context"] and len(lines) == 2


@pytest.mark.parametrize("count", [1, 2, 3, 8, 36, 120])
def test_neighbours_among_parameters_are_far_apart(count):
    order = far_apart(count)
    assert sorted(order) == list(range(count)) and order[0] == 0
    if count > 8:
        assert {i // (count // 4) for i in order[:8]} >= {0, 1, 2, 3}
