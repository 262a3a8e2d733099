"""Which parts `make gpu` has, and the limits that keep all of them within nine minutes."""

import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.gpu.parts import FAILED, ROOT, SECONDS, SKIPPED, Part

# Seconds. The benches share what the others leave of TOTAL: at least 80, and as a rule over 270.
TOTAL = 520.0
# The first import of torch, from a disk that nobody has read, is part of the check.
WHEELS, CHECK, BUILD, TESTS, PICTURES = 30.0, 80.0, 150.0, 150.0, 30.0
TEST = 75  # of one test, its kernels' compilation included; a hang costs its worker no more

# Seconds before the first case: Python, torch, its compiler, the GPU's context.
_START = 8.0
_UPDATE, _UPDATE_START = "update", 20.0  # transformers, and two models of a billion weights
# A case is the unit. The four ways of an update take some 6 s a round.
_UPDATE_WEIGHT = 7.0
_HEAVY = {"attention": 3.0}  # FlexAttention, forward and backward, is compiled for each case
# Each has a context of half a GB on the GPU, and compiles on a core of its own. What the tests want
# compiled, 1300 kernels with their launchers, takes 16 minutes of one core.
_MOST_WORKERS = 16
_PYTEST_FOUND_NONE = 5
_DRAW = (
    "import sys; from pathlib import Path; from bench import plot, results; "
    "plot.draw(results.load(Path(sys.argv[1])), Path(sys.argv[2]))"
)


class Refused(Exception):
    """Nothing can be run; the message says what is wrong."""


@dataclass(frozen=True)
class Files:
    """Where the parts leave what they find, until it is gathered."""

    folder: Path

    @property
    def machine(self) -> Path:
        return self.folder / "machine.json"

    @property
    def tests(self) -> Path:
        return self.folder / "tests.jsonl"

    @property
    def merged(self) -> Path:
        return self.folder / "results.json"

    @property
    def pictures(self) -> Path:
        return self.folder / "pictures"

    @property
    def packages(self) -> Path:
        return self.folder / "packages"

    @property
    def update(self) -> Path:
        return self.folder / "update.json"

    def results(self, op: str) -> Path:
        return self.folder / f"bench-{op}.json"


def wheels_part(wheels: list[Path], files: Files) -> Part:
    pip = [sys.executable, "-m", "pip", "install", "--no-index", "--no-deps", "--no-compile"]
    return Part("wheels", [*pip, "--target", str(files.packages), *map(str, wheels)], WHEELS)


def check_part(device: str, files: Files) -> Part:
    module = [sys.executable, "-m", "bench.gpu.machine"]
    return Part("check", [*module, device, str(files.machine)], CHECK)


def plan(only: list[str], machine: dict[str, Any], files: Files) -> list[Part]:
    """Build, tests, a bench for each op, a model's update, pictures; of them what `only` names.

    Raises:
        Refused: `only` names something else.
    """
    ops = machine["ops"]
    known = ["build", "tests", *ops, _UPDATE]
    unknown = [name for name in only if name not in known]
    if unknown:
        raise Refused(
            f"gpu: expected ONLY in {', '.join(known)}, got {unknown[0]}. Name some of these with "
            "commas between them, or none for all."
        )
    python = [sys.executable, "-m"]
    chosen = [op for op in ops if not only or op in only]
    parts = [Part("build", [*python, "bench.gpu.build", machine["capability"]], BUILD)]
    if not only or "tests" in only:
        parts.append(_tests_part([], machine, files))
    elif chosen:
        parts.append(_tests_part(chosen, machine, files))
    for op in chosen:
        bench = [*python, "fastrl", "bench", op, "--device", machine["environment"]["device"]]
        command = [*bench, *([] if only else ["--quick"]), "--seconds", SECONDS]
        command += ["--json", str(files.results(op))]
        parts.append(Part(op, command, start_s=_START, weight=ops[op] * _HEAVY.get(op, 1.0)))
    if not only or _UPDATE in only:
        parts.append(_update_part(machine, files))
    if chosen:
        parts.append(_pictures_part(machine, files))
    return parts


def _tests_part(ops: list[str], machine: dict[str, Any], files: Files) -> Part:
    """The GPU tests, or those whose file or name has one of the ops in it."""
    if not machine["packages"]["pytest"]:
        reason = "pytest is not installed; put its wheel into WHEELS=folder"
        return Part("tests", [], verdict=(FAILED, reason))
    command = ["env", "OMP_NUM_THREADS=1", "TORCHINDUCTOR_COMPILE_THREADS=1"]
    command += [sys.executable, "-m", "pytest", "-m", "gpu", "-p", "bench.gpu.first_look"]
    command += [f"--found={files.tests}", "--tb=short", "--continue-on-collection-errors"]
    command += ["-p", "no:cacheprovider", *(["-k", " or ".join(ops)] if ops else [])]
    command += _side_by_side(machine)
    # For an op by itself: one that runs on no GPU yet has no tests there, but its peers are timed.
    nothing = (SKIPPED if ops else FAILED, "no GPU test has this name" if ops else "no GPU tests")
    return Part(
        "tests", [*command, *map(str, gpu_test_files())], TESTS,
        meanings={_PYTEST_FOUND_NONE: nothing},
    )  # fmt: skip


def _side_by_side(machine: dict[str, Any]) -> list[str]:
    """Most of the tests' time is Triton's, on one core each. A test that hangs ends its worker: a
    thread can do that while Python waits for the GPU, a signal's handler cannot."""
    packages = machine["packages"]
    workers = min(_MOST_WORKERS, machine["environment"]["cores"] - 1)
    with_workers = packages["pytest-xdist"] and machine["gpu_is_shared"] and workers > 1
    options = []
    if with_workers:
        options += ["-n", str(workers), "--maxschedchunk=1", "--max-worker-restart=40"]
    if packages["pytest-timeout"]:
        method = "thread" if with_workers else "signal"
        options += [f"--timeout={TEST}", f"--timeout-method={method}"]
    return options


def gpu_test_files(folder: Path = ROOT / "tests") -> list[Path]:
    """Those that name the marker, or have a conftest.py beside them that does: the others may
    import what this machine lacks."""

    def names_it(path: Path) -> bool:
        return path.exists() and re.search(r"mark\.gpu", path.read_text()) is not None

    files = sorted(folder.rglob("test_*.py"))
    return [p for p in files if names_it(p) or names_it(p.with_name("conftest.py"))]


def _update_part(machine: dict[str, Any], files: Files) -> Part:
    if not machine["packages"]["transformers"]:
        return Part(_UPDATE, [], verdict=(SKIPPED, "transformers is not installed"))
    device = machine["environment"]["device"]
    command = [sys.executable, "-m", "bench.grpo_update", "--device", device]
    command += ["--one-billion", "--dtype", "bfloat16"] if device == "cuda" else []
    command += ["--seconds", SECONDS, "--json", str(files.update)]
    return Part(_UPDATE, command, start_s=_UPDATE_START, weight=_UPDATE_WEIGHT)


def _pictures_part(machine: dict[str, Any], files: Files) -> Part:
    if not machine["packages"]["matplotlib"]:
        return Part("pictures", [], verdict=(SKIPPED, "matplotlib is not installed"))
    draw = [sys.executable, "-c", _DRAW, str(files.merged), str(files.pictures)]
    return Part("pictures", draw, PICTURES)
