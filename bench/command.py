"""What `fastrl bench` does: run the cases, show, keep, draw and compare the results."""

import argparse
import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from bench import cases, memory, results, table
from bench.compare import compare
from bench.environment import describe, process_age
from bench.results import CaseResult, ResultFileError, Results
from bench.run import Bench
from bench.timing import budget_for

USAGE_ERROR = 2


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="fastrl bench",
        description="Time the ops beside other libraries, each correct before it is timed.",
        epilog="Exit status: 1 if a result is wrong or --compare finds a figure worse; 2 for bad "
        "input; 130 stopped by Ctrl-C; else 0.",
    )
    p.add_argument("op", nargs="*", help=f"of {', '.join(cases.CASES)} (default: all)")
    p.add_argument("--device", default="cpu", help="cpu, or cuda[:i]")
    p.add_argument("--quick", action="store_true", help="fewer cases, fewer rounds")
    p.add_argument(
        "--seconds", type=float, metavar="S",
        help="share so long among the cases; peers that have no time left are listed as missing",
    )  # fmt: skip
    p.add_argument("--json", type=Path, metavar="FILE", help="write the results")
    p.add_argument("--compare", type=Path, metavar="FILE", help="with the results of another run")
    p.add_argument(
        "--threshold", type=float, default=0.1, metavar="X",
        help="how much worse is too much for --compare: 0.1 is a tenth (default)",
    )  # fmt: skip
    p.add_argument("--plot", type=Path, metavar="FOLDER", help="write pictures (PNG)")
    p.add_argument(
        "--results", type=Path, metavar="FILE", help="show this file's results; measure nothing"
    )
    return p


def main(argv: list[str]) -> int:
    try:
        options = parser().parse_args(argv)
    except SystemExit as stop:
        return int(stop.code or 0)
    try:
        return _main(options)
    except (ValueError, ResultFileError) as error:
        print(error, file=sys.stderr)
        return USAGE_ERROR
    except BrokenPipeError:  # of standard output
        raise
    except OSError as error:
        print(f"bench: expected to write the results, got {error}.", file=sys.stderr)
        return USAGE_ERROR
    except KeyboardInterrupt:
        kept = "" if options.json is None else f" {options.json} holds the cases that are done."
        print(f"\nbench: stopped.{kept}", file=sys.stderr)
        return 130


def _check(options: argparse.Namespace) -> None:
    """Raise before the minutes of measuring."""
    if not options.threshold > 0:
        raise ValueError(
            f"bench: expected threshold > 0, got {options.threshold:g}. 0.1 is a tenth."
        )
    if options.seconds is not None and not options.seconds > 0:
        raise ValueError(
            f"bench: expected --seconds > 0, got {options.seconds:g}. Leave it out for the time "
            "that all cases need."
        )
    if options.results is not None:
        unread = {"ops": options.op, "--quick": options.quick, "--seconds": options.seconds}
        for name, is_given in unread.items():
            if is_given:
                raise ValueError(
                    f"bench: expected no {name} with --results, got some. It shows a whole file "
                    "and measures nothing."
                )
    if options.json is not None and options.json.is_dir():
        raise ValueError(
            f"bench: expected a file for --json, got the folder {options.json}. Name a file in it."
        )
    for path in filter(None, (options.json, options.plot)):
        path.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(path if path.exists() else path.parent, os.W_OK):
            raise ValueError(
                f"bench: expected a place that can be written to, got {path}. Choose another."
            )


def _main(options: argparse.Namespace) -> int:
    _check(options)
    # Both before the minutes of measuring: a file that cannot be read, a package that is missing.
    old = None if options.compare is None else results.load(options.compare)
    plot = None if options.plot is None else _import_plot()
    if options.results is None:
        found = measure(
            options.op, options.device, quick=options.quick, path=options.json,
            seconds=options.seconds,
        )  # fmt: skip
    else:
        found = results.load(options.results)
    table.show(found)
    if options.json is not None and options.results is not None:
        results.save(found, options.json)
    if plot is not None:
        for path in plot.draw(found, options.plot):
            print(f"Wrote {path}")
    status = 1 if found.wrong or "lost" in found.environment else 0
    if old is not None:
        status = max(status, _compare(old, found, options.threshold))
    return status


def measure(
    ops: list[str],
    device_name: str,
    *,
    quick: bool,
    path: Path | None = None,
    seconds: float | None = None,
) -> Results:
    """Run the cases; the file holds those that are done, whenever the run is stopped.

    Args:
        seconds: for all of them together, this process's start included.
    """
    end = None if seconds is None else time.monotonic() + seconds - process_age()
    device = _device(device_name)
    chosen = cases.select(ops, quick=quick, device=device.type)
    if not chosen:
        raise ValueError(
            f"bench: expected a case for {device.type}, got none of {', '.join(ops)}. Name other "
            "ops, or another device."
        )
    if device.type == "cuda":
        torch.cuda.set_device(device)
    found = Results(describe(device), quick)
    bench = Bench(device, budget_for(device, quick=quick))
    for i, case in enumerate(chosen, start=1):
        print(f"[{i}/{len(chosen)}] {case.name}", file=sys.stderr, flush=True)
        share = None
        if end is not None:
            share = max(0.0, end - time.monotonic()) / (len(chosen) - i + 1)
        keep = None
        if path is not None and (share is not None or device.type == "cuda"):
            keep = _keeper(found, path)  # there a peer can cost us the process
        found.cases.append(bench.run(case, seconds=share, keep=keep))
        if bench.lost is not None:
            found.environment["lost"] = bench.lost
        if path is not None:
            results.save(found, path)
        if bench.lost is not None:
            print(f"bench: {bench.lost}; the cases behind it are not run", file=sys.stderr)
            break
        memory.release(device)
    return found


def _keeper(found: Results, path: Path) -> Callable[[CaseResult], None]:
    return lambda case: results.save(replace(found, cases=[*found.cases, case]), path)


def _device(name: str) -> torch.device:
    remedy = "Leave --device out for the CPU."
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"bench: expected device cpu or cuda, got {name}. {remedy}") from error
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"bench: expected device cpu or cuda, got {name}. {remedy}")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"bench: expected a CUDA device that torch finds, got none. {remedy}")
    if device.type == "cuda" and device.index is None:  # torch.cuda.set_device wants a number
        device = torch.device("cuda", torch.cuda.current_device())
    if device.type == "cuda" and device.index >= torch.cuda.device_count():
        raise ValueError(
            f"bench: expected a CUDA device below {torch.cuda.device_count()}, got {name}. {remedy}"
        )
    return device


def _import_plot():
    try:
        from bench import plot
    except ImportError as error:
        raise ValueError(
            f"bench: expected matplotlib for --plot, got {error}. pip install matplotlib"
        ) from error
    return plot


def _compare(old: Results, new: Results, threshold: float) -> int:
    changes = compare(old, new, threshold)
    if not changes:
        raise ValueError(
            "bench: expected a case in both files of --compare, got none. "
            "Run the same ops, both with --quick or both without."
        )
    for what in ("device", "gpu"):
        if (was := old.environment.get(what)) != (now := new.environment.get(what)):
            raise ValueError(
                f"bench: expected two files of one {what} for --compare, got {was} and {now}. "
                "Compare runs of one machine."
            )
    if old.environment.get("cpu") != new.environment.get("cpu"):
        print(f"The old file is from another processor: {old.environment.get('cpu')}")
    table.show_changes(changes, threshold)
    return 1 if any(change.is_worse for change in changes) else 0
