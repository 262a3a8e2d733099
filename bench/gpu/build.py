"""Builds fastrl._C in place for one GPU: `python -m bench.gpu.build 9.0`; "" builds for a CPU.

Where the build for a GPU fails, one for the CPU follows: the ops in Triton need no more than that,
and are then tested and timed. The exit status stays that of the failure.
"""

import os
import signal
import subprocess
import sys

_MOST_SECONDS = 110.0  # of the build for a GPU; the one for a CPU has to fit in behind it


def main(argv: list[str]) -> int:
    capability = argv[0]
    without = {"FASTRL_BUILD": "cpu"}
    if not capability:
        return build(without, "")
    if build({"TORCH_CUDA_ARCH_LIST": capability}, f"sm_{capability.replace('.', '')}") == 0:
        return 0
    print("build: failed for the GPU; what follows is without the CUDA C++, that is the returns.")
    build(without, "")
    return 1


def build(settings: dict[str, str], architecture: str) -> int:
    """The exit status; 1 as well where what was built does not load."""
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    status = _run(command, os.environ | settings, _MOST_SECONDS if architecture else None)
    if status != 0:
        return status
    # In a process of its own: this one may have to look at a second binary.
    return subprocess.run([sys.executable, "-m", __spec__.name, "--check", architecture]).returncode


def _run(command: list[str], env: dict[str, str], seconds: float | None) -> int:
    """The exit status; 1 where it took longer. Compilers that it has started end with it."""
    process = subprocess.Popen(command, env=env, start_new_session=True)
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        print(f"build: stopped after {seconds:.0f} s.", flush=True)
        return 1
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def check(architecture: str) -> int:
    from fastrl.ops import _binary

    if _binary.module is None:
        print(f"build: expected the new fastrl._C to load, got: {_binary.missing}")
        return 1
    facts = _binary.module.build_facts()
    print(f"{_binary.module.__file__}: {facts}")
    built = facts["cuda_architectures"].split(", ")
    if architecture and architecture not in built:
        print(f"build: expected code for {architecture}, got {', '.join(built) or 'none'}.")
        return 1
    return 0


if __name__ == "__main__":
    arguments = sys.argv[1:]
    sys.exit(check(arguments[1]) if arguments[0] == "--check" else main(arguments))
