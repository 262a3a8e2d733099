"""`make gpu`: check the machine, run the parts, and gather what they found in one folder."""

import argparse
import json
import os
import re
import shutil
import signal
import sys
import tempfile
import traceback
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench import results
from bench.gpu import report
from bench.gpu.parts import ROOT, Part, Runner
from bench.gpu.plan import TOTAL, Files, Refused, check_part, plan, wheels_part
from bench.results import ResultFileError, Results

USAGE_ERROR = 2
_MOST_PICTURES = 4
_WRITTEN = (
    "report.md", "results.json", "logs.txt", "failures.txt", "roofline.png", "speedup.png",
)  # fmt: skip
_MOST_OF_A_LOG = 500_000  # bytes, from its end
_MOST_OF_A_LINE = 300  # characters; a compiler's command has thousands


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="make gpu",
        description="Build, test and time everything on this machine's GPU, within nine minutes.",
        epilog="Exit status: 0; 1 if a part failed; 2 if nothing could be run.",
    )
    p.add_argument("--out", type=Path, help="OUT=: default bench/results/<gpu>")
    p.add_argument(
        "--only", default="", help="ONLY=: of build, tests, the ops and update, with commas"
    )
    p.add_argument("--commit", default="", help="COMMIT=: the stamp (default: git's own)")
    p.add_argument("--wheels", type=Path, help="WHEELS=: a folder of packages to use beside these")
    p.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help=argparse.SUPPRESS)
    return p


def main(argv: list[str]) -> int:
    options = parser().parse_args(argv)
    signal.signal(signal.SIGTERM, _interrupt)
    # A background job is started deaf to SIGINT, and so would be all that it starts.
    signal.signal(signal.SIGINT, _interrupt)
    with tempfile.TemporaryDirectory(prefix="fastrl-gpu-") as folder:
        try:
            return _main(options, Files(Path(folder)))
        except Refused as error:
            print(error, file=sys.stderr)
            return USAGE_ERROR
        except KeyboardInterrupt:
            return 1


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def _main(options: argparse.Namespace, files: Files) -> int:
    wheels = _wheels(options.wheels)
    runner = Runner(files.folder, _environment(files, bool(wheels)), TOTAL)
    if wheels:
        runner.run(wheels_part(wheels, files))
    check = runner.run(check_part(options.device, files))
    if not files.machine.exists():
        raise Refused(f"gpu: expected the check to end, got: {check.status}\n{check.tail}")
    machine = json.loads(files.machine.read_text())
    if machine["lacking"]:
        raise Refused("\n".join(machine["lacking"]))
    parts = plan([name for name in options.only.split(",") if name], machine, files)
    environment = machine["environment"]
    environment["commit"] = options.commit or environment["commit"]
    out = options.out or ROOT / "bench" / "results" / _slug(environment["gpu"] or "cpu")
    return run(runner, parts, environment, files, out)


def run(
    runner: Runner, parts: list[Part], environment: dict[str, Any], files: Files, out: Path
) -> int:
    """The exit status. What is in `out` is complete after each part: nobody need wait for all."""

    def gather() -> None:
        nonlocal digest
        try:
            digest = _gather(runner, parts, environment, files, out)
        except Exception:  # the parts that come are worth more than the report of those before
            traceback.print_exc()
            digest = None

    digest: str | None = None
    out.mkdir(parents=True, exist_ok=True)
    # Of an earlier run nothing is left to be taken for this one's.
    for name in _WRITTEN:
        (out / name).unlink(missing_ok=True)
    try:
        runner.run_all(parts, gather)
    except KeyboardInterrupt:
        gather()
        print("Interrupted.")
    for outcome in runner.outcomes:
        if outcome.is_bad:
            tail = "\n".join(line[:_MOST_OF_A_LINE] for line in outcome.tail.splitlines())
            print(f"\n{outcome.name}: {outcome.status} {outcome.reason}\n{tail}")
    print(f"\n{digest or 'The report could not be written.'}")
    print(f"\nWrote {out / 'report.md'} and what belongs to it.")
    return 1 if digest is None or any(outcome.is_bad for outcome in runner.outcomes) else 0


def _gather(
    runner: Runner, parts: list[Part], environment: dict[str, Any], files: Files, out: Path
) -> str:
    """The digest of what now lies in `out`."""
    rows = [{k: v for k, v in asdict(o).items() if k != "tail"} for o in runner.outcomes]
    found = merge(environment, [files.results(part.name) for part in parts])
    found.environment |= {"commit": environment["commit"], "parts": rows}
    if files.update.exists():
        found.environment["update"] = json.loads(files.update.read_text())
    results.save(found, files.merged)
    results.save(found, out / "results.json")
    pictures = sorted(files.pictures.glob("*.png"))[:_MOST_PICTURES]
    for picture in pictures:
        shutil.copy(picture, out)
    tests = report.read_tests(files.tests)
    if tests is not None and tests.count("failed"):
        (out / "failures.txt").write_text(report.failures(tests))
    (out / "logs.txt").write_text(runner.logs(_MOST_OF_A_LOG))
    (out / "report.md").write_text(report.text(found, runner.outcomes, tests, pictures))
    return report.digest(found, runner.outcomes, tests)


def merge(environment: dict[str, Any], paths: list[Path]) -> Results:
    """The cases of all these files that are there, and the environment as the first one has it."""
    found = Results(dict(environment), quick=True)
    for path in paths:
        if not path.exists():
            continue
        try:
            one = results.load(path)
        except ResultFileError as error:
            print(error, file=sys.stderr)
            continue
        if not found.cases:
            found.environment |= one.environment
        found.quick &= one.quick
        found.cases += one.cases
    return found


def _wheels(folder: Path | None) -> list[Path]:
    if folder is None:
        return []
    wheels = sorted(folder.resolve().glob("*.whl"))
    if not wheels:
        raise Refused(
            f"gpu: expected wheels in WHEELS={folder}, got none. `pip download --only-binary=:all: "
            "-d FOLDER PACKAGE` makes such a folder."
        )
    return wheels


def _environment(files: Files, with_packages: bool) -> dict[str, str]:
    """The parts': with the packages of the wheels, and with what is installed beside the Python."""
    env = dict(os.environ) | {"PYTHONUNBUFFERED": "1"}
    programs = [str(Path(sys.executable).parent), *filter(None, [env.get("PATH")])]
    if with_packages:
        found = [str(files.packages), *filter(None, [env.get("PYTHONPATH")])]
        env["PYTHONPATH"] = os.pathsep.join(found)
        programs.insert(0, str(files.packages / "bin"))
    return env | {"PATH": os.pathsep.join(programs)}


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
