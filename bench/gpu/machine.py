"""What a machine has of what `make gpu` needs: `python -m bench.gpu.machine DEVICE FILE`.

A process of its own: torch may be missing or break, and whoever asks for the GPU holds some of it.
"""

import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

_WHEEL = "Install it, or put its wheel into a folder and pass WHEELS=folder."
_LEAST_SETUPTOOLS = 77  # reads the licence line of pyproject.toml


def main(argv: list[str]) -> int:
    device, path = argv
    found: dict[str, Any] = {"lacking": lacking(device)}
    if not found["lacking"]:
        found |= facts(device)
    Path(path).write_text(json.dumps(found))
    return 1 if found["lacking"] else 0


def lacking(device: str) -> list[str]:
    """A line for each thing without which nothing can run."""
    lines = []

    def need(there: bool, expected: str, got: str = "none", remedy: str = _WHEEL) -> None:
        if not there:
            lines.append(f"gpu: expected {expected}, got {got}. {remedy}")

    python = ".".join(map(str, sys.version_info[:3]))
    need(sys.version_info >= (3, 10), "Python 3.10 or newer", python, "Set PYTHON=.")
    for name in ("numpy", "triton") if device == "cuda" else ("numpy",):
        need(importlib.util.find_spec(name) is not None, name)
    need(shutil.which("ninja") is not None, "ninja")
    setuptools = _version("setuptools")
    fits = setuptools is not None and int(setuptools.split(".")[0]) >= _LEAST_SETUPTOOLS
    need(fits, f"setuptools {_LEAST_SETUPTOOLS} or newer", setuptools or "none")
    cxx = os.environ.get("CXX", "c++").split()[0]
    need(shutil.which(cxx) is not None, "a C++ compiler", f"no {cxx}", "Install g++, or set CXX.")
    if device == "cuda":
        need(_nvcc() is not None, "nvcc", remedy="Install a CUDA toolkit, or set CUDA_HOME.")
    try:
        import torch
    except ImportError as error:
        need(False, "torch with CUDA", str(error), "Use a Python that has it: PYTHON=.")
        return lines
    if device == "cuda":
        has_cuda = torch.version.cuda is not None
        need(has_cuda, "torch with CUDA", torch.__version__, "Use a Python that has it: PYTHON=.")
        there = torch.cuda.is_available()
        need(there, "an NVIDIA GPU that torch finds", remedy="Run it on a machine with one.")
    return lines


def facts(device: str) -> dict[str, Any]:
    """capability ("9.0"; "" on a CPU), which packages are there, how many cases of each op there
    are to time, whether several processes may use the GPU, and the environment that results are
    stamped with."""
    import torch

    from bench.cases import select
    from bench.environment import describe

    environment = describe(torch.device(device))
    capability = ""
    if device == "cuda":
        capability = ".".join(map(str, torch.cuda.get_device_capability()))
        environment |= {"driver": _driver(), "nvcc": _nvcc_release(), "triton": _version("triton")}
    wanted = ("pytest", "pytest-xdist", "pytest-timeout", "matplotlib", "transformers")
    packages = {name: _version(name) is not None for name in wanted}
    ops = Counter(case.op for case in select([], quick=True, device=device))
    return {
        "environment": environment, "capability": capability, "packages": packages, "ops": ops,
        "gpu_is_shared": device == "cuda" and _compute_mode() in ("Default", "unknown"),
    }  # fmt: skip


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _nvcc() -> str | None:
    """As torch's own search does: CUDA_HOME, the path, /usr/local/cuda."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if home:
        return shutil.which("nvcc", path=f"{home}/bin")
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def _first_line(pattern: str, *command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    found = re.search(pattern, done.stdout)
    return found.group(1) if found else "unknown"


def _nvcc_release() -> str:
    return _first_line(r"release [\d.]+, V([\d.]+)", str(_nvcc()), "--version")


def _driver() -> str:
    return _first_line(
        r"([\d.]+)", "nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"
    )


def _compute_mode() -> str:
    return _first_line(r"(\w+)", "nvidia-smi", "--query-gpu=compute_mode", "--format=csv,noheader")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
