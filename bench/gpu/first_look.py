"""How `make gpu` runs the GPU tests: `pytest -p bench.gpu.first_look --found FILE`.

Nobody knows how many of them fit into the time. So one of each test function comes first, then a
second one of each, far from the first in its list of parameters: whenever the time ends, every
function has been asked about as often. What each test gave is in the file as soon as it is known. A
test that leaves the GPU's context broken, or fails while it captures a graph, takes its worker of
pytest-xdist with it, and the tests behind it go on in a new one.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

_MOST_TEXT = 8000  # characters of a failure, from its end
_LARGE = 2 * 2**30  # bytes that a worker may keep from the others


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--found", help="file for a line of JSON a test")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items[:] = spread(items)


def spread(items: list[Any]) -> list[Any]:
    """Round after round, of each test function the next of its parameters."""
    functions: dict[str, list[int]] = {}
    for i, item in enumerate(items):
        functions.setdefault(item.nodeid.partition("[")[0], []).append(i)
    place = {}
    for own in functions.values():
        for turn, i in enumerate(far_apart(len(own))):
            place[own[i]] = turn
    return [items[i] for i in sorted(range(len(items)), key=lambda i: (place[i], i))]


def far_apart(count: int) -> list[int]:
    """range(count), neighbours of the list being far from each other, in every product of axes."""
    step = next(s for s in range(max(1, round(0.618 * count)), count + 2) if _coprime(s, count))
    return [i * step % count for i in range(count)]


def _coprime(a: int, b: int) -> bool:
    while b:
        a, b = b, a % b
    return a == 1


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Iterator[pytest.TestReport]:
    report = yield
    if call.when != "setup" and torch.cuda.is_initialized():
        fault = _fault()
        if fault:
            report.outcome = "failed"
            report.longrepr = "\n".join([fault.splitlines()[0], report.longreprtext, fault])
        # What was being captured when a test failed may leave torch's own state half open.
        if fault or (report.failed and "captur" in report.longreprtext):
            _note(item.config, report)
            if os.environ.get("PYTEST_XDIST_WORKER"):
                os._exit(1)
        if fault:
            item.session.shouldstop = "the GPU's context is broken, and pytest-xdist is missing"
    return report


def _fault() -> str:
    """Of the kernels so far, or it would be the next test's."""
    try:
        torch.cuda.synchronize()
        if torch.cuda.memory_reserved() > _LARGE:
            torch.cuda.empty_cache()
    except Exception as error:  # whatever its class: in this process CUDA is at an end
        return f"{type(error).__name__}: {error}".strip()
    return ""


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    # With xdist workers log as well as the process that starts them.
    if _CONFIG and not os.environ.get("PYTEST_XDIST_WORKER"):
        _note(_CONFIG[0], report)


def pytest_collectreport(report: pytest.CollectReport) -> None:
    if report.failed:
        pytest_runtest_logreport(report)  # type: ignore[arg-type]


def pytest_collection_finish(session: pytest.Session) -> None:
    if session.items and os.environ.get("PYTEST_XDIST_WORKER", "gw0") == "gw0":
        _write(session.config, {"collected": len(session.items)})


_CONFIG: list[pytest.Config] = []


def pytest_configure(config: pytest.Config) -> None:
    _CONFIG[:] = [config]


def _note(config: pytest.Config, report: Any) -> None:
    line = {
        "name": report.nodeid, "when": getattr(report, "when", "collect"),
        "outcome": report.outcome, "seconds": round(getattr(report, "duration", 0.0), 2),
        "message": _message(report), "text": report.longreprtext[-_MOST_TEXT:],
    }  # fmt: skip
    _write(config, line)


def _write(config: pytest.Config, line: dict[str, Any]) -> None:
    if path := config.getoption("--found"):
        with Path(path).open("a") as file:
            file.write(json.dumps(line) + "\n")


def _message(report: Any) -> str:
    """Of a failure its first line; of a test that is skipped the reason."""
    if isinstance(report.longrepr, tuple):
        return str(report.longrepr[2]).removeprefix("Skipped: ")
    crash = getattr(report.longrepr, "reprcrash", None)
    lines = (crash.message if crash else report.longreprtext).strip().splitlines()
    return next((line for line in lines if not line.startswith("[gw")), "")  # a worker's name
