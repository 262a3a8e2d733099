"""What the parts found, as one report.md: the stamp, the parts, the tests, the tables, the logs."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree

from bench import table
from bench.gpu.parts import OK, Outcome
from bench.results import Results

_STAMP = (
    "commit", "date", "gpu", "driver", "nvcc", "python", "torch", "triton", "numpy", "cpu", "cores",
)  # fmt: skip
_MOST_LISTED = 40


@dataclass
class Tests:
    passed: int = 0
    failures: list[str] = field(default_factory=list)  # "name: first line of the message"
    skipped: dict[str, list[str]] = field(default_factory=dict)  # names by reason


def read_tests(junit: Path) -> Tests | None:
    """None: pytest wrote nothing, or only half of it."""
    try:
        cases = list(ElementTree.parse(junit).iter("testcase"))
    except (OSError, ElementTree.ParseError):
        return None
    tests = Tests()
    for case in cases:
        if case.get("name") is None:  # was running when pytest was interrupted
            continue
        name = f"{case.get('classname')}.{case.get('name')}".lstrip(".")
        bad = [child for child in case if child.tag in ("failure", "error")]
        skip = case.find("skipped")
        if bad:
            tests.failures.append(f"{name}: {_first_line(bad[0])}")
        elif skip is not None:
            tests.skipped.setdefault(_first_line(skip), []).append(name)
        else:
            tests.passed += 1
    return tests


def _first_line(element: ElementTree.Element) -> str:
    lines = (element.get("message") or "").strip().splitlines()
    return lines[0][:200] if lines else "no message"


def text(
    found: Results, outcomes: list[Outcome], tests: Tests | None, pictures: Iterable[Path]
) -> str:
    """found: its environment is what the report is stamped with."""
    blocks = [
        [f"# fastrl on {found.environment['gpu'] or found.environment['cpu']}"],
        _stamp(found),
        _parts(outcomes),
        _tests(tests),
        _results(found, outcomes),
        [f"![{path.stem}]({path.name})" for path in pictures],
        _logs(outcomes),
    ]
    return "\n\n".join("\n".join(lines) for lines in blocks if lines) + "\n"


def _stamp(found: Results) -> list[str]:
    rows = [(key, found.environment.get(key)) for key in _STAMP]
    return _grid(("", ""), [(key, str(value)) for key, value in rows if value])


def _grid(header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> list[str]:
    lines = [header, ("---",) * len(header), *rows]
    return [f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines]


def _parts(outcomes: list[Outcome]) -> list[str]:
    header = ("part", "status", "seconds", "limit", "reason")
    rows = [(o.name, o.status, f"{o.seconds:.0f}", f"{o.limit_s:.0f}", o.reason) for o in outcomes]
    lines = ["## Parts", "", *_grid(header, rows)]
    if any(o.name == "build" and o.status != OK for o in outcomes):
        lines += ["", "The build is not ok: what follows is of the binary that was there before."]
    return lines


def _tests(tests: Tests | None) -> list[str]:
    if tests is None:
        return []
    skipped = sum(map(len, tests.skipped.values()))
    lines = ["## Tests", ""]
    lines.append(f"{tests.passed} passed, {len(tests.failures)} failed, {skipped} skipped.")
    if tests.failures:
        lines += ["", "Failed:", "", *(f"- `{name}`" for name in tests.failures[:_MOST_LISTED])]
    if len(tests.failures) > _MOST_LISTED:
        lines.append(f"- and {len(tests.failures) - _MOST_LISTED} more")
    if tests.skipped:
        lines += ["", "Skipped:", ""]
    for reason, names in tests.skipped.items():
        lines.append(f"- {len(names)}: {reason} (`{names[0]}`{', ...' if len(names) > 1 else ''})")
    return lines


def _results(found: Results, outcomes: list[Outcome]) -> list[str]:
    if not found.cases:
        return []
    try:
        return _tables(found, outcomes)
    except Exception as error:  # the parts that come after this one are worth more than the tables
        return ["## Results", "", f"The tables could not be made: {error!r}. See results.json."]


def _tables(found: Results, outcomes: list[Outcome]) -> list[str]:
    lines = ["## Results", "", *(f"- {line}" for line in table.closing_lines(found))]
    cut_short = {o.name: o.status for o in outcomes if o.is_bad}
    for op in dict.fromkeys(case.op for case in found.cases):
        lines += ["", f"### {op}", ""]
        if op in cut_short:
            lines += [f"The bench is {cut_short[op]}: the cases that were done.", ""]
        lines += _fenced(_table(found, op))
    return lines


def _table(found: Results, op: str) -> list[str]:
    cases = [case for case in found.cases if case.op == op]
    sections = list(table.sections(Results(found.environment, found.quick, cases)))
    return table.plain_lines(table.HEADER, sections)


def _fenced(lines: Iterable[str]) -> list[str]:
    return ["```", *(line.replace("```", "'''") for line in lines), "```"]


def _logs(outcomes: list[Outcome]) -> list[str]:
    return [line for o in outcomes if o.tail for line in _log(o)]


def _log(outcome: Outcome) -> Iterator[str]:
    yield f"## The end of what `{outcome.name}` printed"
    yield ""
    yield from _fenced(outcome.tail.splitlines())
    yield ""
