"""The figures of a run: what is recorded, in which units, and its JSON form."""

import json
import math
import statistics
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

FORMAT = 2


class ResultFileError(Exception):
    """The file is missing or holds no results."""


@dataclass
class Entry:
    """One implementation on one case. `ratio`: its p50 over ours; None where we have none."""

    name: str
    version: str
    rounds: int  # turns that count
    disturbed: int  # turns left out, since the machine was not quiet
    launches: int
    time_us: dict[str, float]  # "p20", "p50", "p80"
    gb_s: float
    tflop_s: float | None  # None: the case counts no matrix products
    share_of_ceiling: float  # time that the ceiling of the case needs / p50
    ratio: float | None
    error: float
    extra_memory_mib: float | None  # None: cannot be measured here
    targets: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class CaseResult:
    """`wrong` says why our op failed the gate; then nothing was timed."""

    op: str
    name: str
    reason: str
    shape: list[int]
    dtype: str
    mode: str
    counted_bytes: int
    counted_flops: int = 0
    copy_gb_s: float | None = None
    product_tflop_s: float | None = None
    ceiling: str = "copy"  # or "product": the one that needs longer for what is counted
    eager_error: float | None = None
    entries: list[Entry] = field(default_factory=list)
    missing: list[dict[str, str]] = field(default_factory=list)  # "name", "version", "reason"
    wrong: str | None = None

    @property
    def ours(self) -> Entry | None:
        return next((e for e in self.entries if e.name == "fastrl"), None)


@dataclass
class Results:
    environment: dict[str, Any]
    quick: bool
    cases: list[CaseResult] = field(default_factory=list)

    @property
    def copy_gb_s(self) -> float | None:
        known = [c.copy_gb_s for c in self.cases if c.copy_gb_s is not None]
        return statistics.median(known) if known else None

    @property
    def product_tflop_s(self) -> dict[str, float]:
        """By dtype."""
        rates: dict[str, list[float]] = {}
        for case in self.cases:
            if case.product_tflop_s is not None:
                rates.setdefault(case.dtype, []).append(case.product_tflop_s)
        return {dtype: statistics.median(found) for dtype, found in rates.items()}

    @property
    def wrong(self) -> list[CaseResult]:
        return [c for c in self.cases if c.wrong is not None]


def save(results: Results, path: Path) -> None:
    """As strict JSON: what is no number is null."""
    text = json.dumps({"format": FORMAT, **_strict(asdict(results))}, indent=1, allow_nan=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and not path.is_file():  # a pipe or a device is written to, not replaced
        path.write_text(text + "\n")
        return
    path = path.resolve()  # what a link leads to, not the link
    half = path.with_name(path.name + ".part")
    half.write_text(text + "\n")
    half.replace(path)  # at once: a run that is stopped leaves the cases before, or these


def _strict(x: Any) -> Any:
    if isinstance(x, dict):
        return {k: _strict(v) for k, v in x.items()}
    if isinstance(x, (list, tuple)):
        return [_strict(v) for v in x]
    return None if isinstance(x, float) and not math.isfinite(x) else x


def load(path: Path) -> Results:
    """Raises ResultFileError."""
    remedy = "Write one with `fastrl bench --json FILE`."
    try:
        data = json.loads(path.read_text())
    except OSError as error:
        raise ResultFileError(
            f"bench: expected a result file, got {path} ({error.strerror}). {remedy}"
        ) from error
    except ValueError as error:
        raise ResultFileError(f"bench: expected JSON in {path}, got {error}. {remedy}") from error
    found = data.pop("format", None) if isinstance(data, dict) else None
    if found != FORMAT:
        raise ResultFileError(
            f"bench: expected a result file of format {FORMAT}, got format {found} in {path}. "
            f"{remedy}"
        )
    try:
        cases = [_case(case) for case in data.pop("cases")]
        return Results(**data, cases=cases)
    except (TypeError, KeyError) as error:
        raise ResultFileError(
            f"bench: expected the fields of a result file in {path}, got {error}. {remedy}"
        ) from error


def _case(data: dict[str, Any]) -> CaseResult:
    entries = [Entry(**entry) for entry in data.pop("entries")]
    return CaseResult(**data, entries=entries)
