"""Which parts `make gpu` has, and the limits that keep all of them within nine minutes."""

import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.gpu.parts import FAILED, ROOT, SKIPPED, Part

# Seconds. The benches share what the others leave of TOTAL: at least 160, and as a rule over 300.
TOTAL = 520.0
WHEELS, CHECK, BUILD, TESTS, PICTURES = 30.0, 60.0, 120.0, 120.0, 30.0

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
    def junit(self) -> Path:
        return self.folder / "tests.xml"

    @property
    def merged(self) -> Path:
        return self.folder / "results.json"

    @property
    def pictures(self) -> Path:
        return self.folder / "pictures"

    @property
    def packages(self) -> Path:
        return self.folder / "packages"

    def results(self, op: str) -> Path:
        return self.folder / f"bench-{op}.json"


def wheels_part(wheels: list[Path], files: Files) -> Part:
    pip = [sys.executable, "-m", "pip", "install", "--no-index", "--no-deps", "--no-compile"]
    return Part("wheels", [*pip, "--target", str(files.packages), *map(str, wheels)], WHEELS)


def check_part(device: str, files: Files) -> Part:
    module = [sys.executable, "-m", "bench.gpu.machine"]
    return Part("check", [*module, device, str(files.machine)], CHECK)


def plan(only: list[str], machine: dict[str, Any], files: Files) -> list[Part]:
    """Build, tests, a bench for each op, pictures; of them what `only` names.

    Raises:
        Refused: `only` names something else.
    """
    ops = machine["ops"]
    known = ["build", "tests", *ops]
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
        command = [*bench, "--quick", "--json", str(files.results(op))]
        parts.append(Part(op, command, weight=ops[op]))
    if chosen:
        parts.append(_pictures_part(machine, files))
    return parts


def _tests_part(ops: list[str], machine: dict[str, Any], files: Files) -> Part:
    """The GPU tests, or those whose file or name has one of the ops in it."""
    if not machine["packages"]["pytest"]:
        reason = "pytest is not installed; put its wheel into WHEELS=folder"
        return Part("tests", [], verdict=(FAILED, reason))
    command = [sys.executable, "-m", "pytest", "-m", "gpu", f"--junitxml={files.junit}"]
    command += ["-p", "no:cacheprovider", *(["-k", " or ".join(ops)] if ops else [])]
    # For an op by itself: one that runs on no GPU yet has no tests there, but its peers are timed.
    nothing = (SKIPPED if ops else FAILED, "no GPU test has this name" if ops else "no GPU tests")
    return Part(
        "tests", [*command, *map(str, gpu_test_files())], TESTS,
        meanings={_PYTEST_FOUND_NONE: nothing},
    )  # fmt: skip


def gpu_test_files(folder: Path = ROOT / "tests") -> list[Path]:
    """Those that name the marker, or have a conftest.py beside them that does: the others may
    import what this machine lacks."""

    def names_it(path: Path) -> bool:
        return path.exists() and re.search(r"mark\.gpu", path.read_text()) is not None

    files = sorted(folder.rglob("test_*.py"))
    return [p for p in files if names_it(p) or names_it(p.with_name("conftest.py"))]


def _pictures_part(machine: dict[str, Any], files: Files) -> Part:
    if not machine["packages"]["matplotlib"]:
        return Part("pictures", [], verdict=(SKIPPED, "matplotlib is not installed"))
    draw = [sys.executable, "-c", _DRAW, str(files.merged), str(files.pictures)]
    return Part("pictures", draw, PICTURES)
