import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
TORCH = Path(torch.__file__).parent

FLAGS = ["-std=c++17", "-O1", "-g1", "-fPIC", "-shared", "-pthread", "-fsanitize=thread"]
FLAGS += ["-DTORCH_TARGET_VERSION=0x020a000000000000", f"-isystem{TORCH / 'include'}"]


@pytest.fixture(scope="session")
def watched(tmp_path_factory):
    """watched(threads, *arguments): the exit status, 66 for a race, and what Python prints."""
    compiler, setarch = shutil.which("g++"), shutil.which("setarch")
    if compiler is None or setarch is None:
        pytest.skip("g++ and setarch are not installed")
    sanitizer = subprocess.check_output([compiler, "-print-file-name=libtsan.so"], text=True)
    if not Path(sanitizer.strip()).is_absolute():
        pytest.skip("g++ has no ThreadSanitizer")
    threads = tmp_path_factory.mktemp("threads") / "threads.so"
    subprocess.run([compiler, *FLAGS, HERE / "threads.cpp", "-o", threads], check=True)

    def run(count, *arguments, cwd=ROOT, **variables):
        env = {"THREADS": str(count), "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        env |= {"LD_PRELOAD": f"{sanitizer.strip()} {threads}", "PYTHONPATH": str(cwd)}
        env |= variables
        # The other: its interceptor meets thread-local memory that is older than itself.
        env |= {"TSAN_OPTIONS": "exitcode=66 intercept_tls_get_addr=0"}
        command = [setarch, os.uname().machine, "-R", sys.executable, *map(str, arguments)]
        done = subprocess.run(
            command, cwd=cwd, env=os.environ | env, capture_output=True, text=True, timeout=3000
        )
        return done.returncode, done.stdout + done.stderr

    return run
