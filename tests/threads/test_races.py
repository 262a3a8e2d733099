"""The C++ ops on several threads, watched by ThreadSanitizer."""

import os
import shutil
import subprocess
import sys

import pytest
from threads.conftest import FLAGS, HERE, ROOT, TORCH

OPS = ["returns", "edges", "edges_behind_an_end", "strides", "token_logprobs", "kept_logprobs"]
OPS += ["sample_tokens", "sample_tokens_kept", "attention", "decode_attention"]
OPS += ["decode_attention_step", "linear_token_logprobs", "linear_token_loss", "frozen_head"]
SUITES = [f"tests/ops/test_{op}.py" for op in OPS]

pytestmark = pytest.mark.slow


def test_a_planted_race_is_seen(watched, tmp_path):
    library = tmp_path / "planted.so"
    link = [f"-L{TORCH / 'lib'}", "-ltorch_cpu", "-lc10", "-o", library]
    subprocess.run(["g++", *FLAGS, HERE / "planted.cpp", *link], check=True)
    call = f"import torch, ctypes; ctypes.CDLL('{library}').write_numbers"
    status, printed = watched(2, "-c", f"{call}(True)", cwd=tmp_path)
    assert status == 66 and "data race" in printed and "planted.cpp" in printed
    status, printed = watched(2, "-c", f"{call}(False)", cwd=tmp_path)
    assert status == 0, printed


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy whose binary is instrumented."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("fastrl", "csrc", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("_C*.so"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    # g++ 12 breaks down over the sanitizer and -O3 together.
    setup = (ROOT / "setup.py").read_text().replace('"-O3"', '"-O1"').replace('"-g0"', '"-g1"')
    (folder / "setup.py").write_text(setup)
    env = {"CFLAGS": "-fsanitize=thread", "LDFLAGS": "-fsanitize=thread"}
    env |= {"FASTRL_BUILD": "cpu", "MAX_JOBS": "2"}
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    subprocess.run(command, cwd=folder, env=os.environ | env, check=True)
    return folder


@pytest.mark.parametrize("threads", [2, 3])
def test_no_two_threads_meet(watched, checkout, threads):
    tests = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow", *SUITES]
    status, printed = watched(threads, *tests, cwd=checkout)
    assert status == 0, printed[-20_000:]
