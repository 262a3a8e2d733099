"""Where a run took place: what a reader must know before comparing it with another."""

import os
import platform
import shutil
import subprocess
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy
import torch

import fastrl
from bench.ceiling import last_level_cache_bytes
from bench.peers import pinned, version_of
from fastrl.ops import _binary

ROOT = Path(__file__).parents[1]
_TYPICAL_AGE, _MOST_AGE = 8.0, 600.0  # seconds
PACKAGES = (
    "triton", "numba", "torchrl", "tensordict", "trl", "transformers", "liger-kernel",
    "cut-cross-entropy",
)  # fmt: skip


def describe(device: torch.device) -> dict[str, Any]:
    """JSON of processor, versions, threads, commit and date."""
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "device": str(device),
        "cpu": cpu_name(),
        "gpu": gpu,
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "simd": None if _binary.module is None else _binary.module.simd_level(),
        "last_level_cache_bytes": last_level_cache_bytes(),
        "load_1min": os.getloadavg()[0],
        "system": platform.platform(),
        "python": platform.python_version(),
        "fastrl": fastrl.__version__,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "numpy": numpy.__version__,
        "peers": {name: _peer_version(name) for name in PACKAGES},
        "commit": commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def _peer_version(name: str) -> str:
    found, pin = version_of(name), pinned(name)
    if found is None:
        return "not installed"
    return found if not pin or found == pin else f"{found} (pinned: {pin})"


def cpu_name() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def process_age() -> float:
    """Seconds since this process was started: what the imports took is gone of its time. Where the
    system does not tell, a typical figure."""
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError, AttributeError):
        return _TYPICAL_AGE
    return age if 0 <= age <= _MOST_AGE else _TYPICAL_AGE


def commit() -> str:
    """Hash of the checkout, with "+changes" where it has any beside results; "unknown" without
    git."""
    if shutil.which("git") is None:
        return "unknown"

    def git(*args: str) -> str | None:
        done = subprocess.run(
            ["git", "-C", str(ROOT), *args], capture_output=True, text=True, check=False
        )
        return done.stdout.strip() if done.returncode == 0 else None

    head = git("rev-parse", "--short=12", "HEAD")
    changes = git("status", "--porcelain", "--", ".", ":(exclude)bench/results")
    if head is None:
        return "unknown"
    return head + ("+changes" if changes else "")
