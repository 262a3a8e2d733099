"""No kernel on the CPU reads a byte beside a tensor."""

import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parent.parent


def test_no_kernel_reads_beside_a_tensor():
    command = [sys.executable, str(TESTS / "guarded_calls.py")]
    root = {"PYTHONPATH": str(TESTS.parent)}
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | root)
    assert done.stdout == "all calls made\n", (done.returncode, done.stderr)
