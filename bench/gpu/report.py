"""What the parts found, as one report.md: the stamp, the parts, the tests, the tables, the logs."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from bench import table, update_table
from bench.gpu.parts import OK, Outcome
from bench.results import CaseResult, Results

_STAMP = (
    "commit", "date", "gpu", "driver", "nvcc", "python", "torch", "triton", "numpy", "cpu", "cores",
)  # fmt: skip
_MOST_LISTED = 40
_MOST_OF_A_MESSAGE = 200


@dataclass
class Tests:
    """By test its outcome: "passed", "failed" or "skipped"; of the latter two what they say."""

    outcomes: dict[str, str] = field(default_factory=dict)
    messages: dict[str, str] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)
    collected: int = 0

    def count(self, outcome: str) -> int:
        return list(self.outcomes.values()).count(outcome)

    def by_message(self, outcome: str) -> list[tuple[str, list[str]]]:
        """Tests that say the same together, the most first."""
        found: dict[str, list[str]] = {}
        for name, own in self.outcomes.items():
            if own == outcome:
                found.setdefault(self.messages[name], []).append(name)
        return sorted(found.items(), key=lambda group: -len(group[1]))


def read_tests(path: Path) -> Tests | None:
    """What bench.gpu.first_look wrote, up to where it was stopped. None: nothing."""
    if not path.exists():
        return None
    tests = Tests()
    for text in path.read_text().splitlines():
        try:
            line = json.loads(text)
        except ValueError:  # the last one, half written
            continue
        if "collected" in line:
            tests.collected = line["collected"]
            continue
        name, outcome = line["name"], line["outcome"]
        known = tests.outcomes.get(name)
        # A test has a line for each phase. The first failure tells most: a worker that ended with
        # the test is reported behind it.
        if known == "failed" or (outcome == "passed" and (known or line["when"] != "call")):
            continue
        tests.outcomes[name] = outcome
        tests.messages[name] = line["message"][:_MOST_OF_A_MESSAGE] or "no message"
        tests.texts[name] = line["text"]
    return tests


def failures(tests: Tests) -> str:
    """Of each message one test with all that it printed, and the names of the others."""
    blocks = []
    for message, names in tests.by_message("failed"):
        blocks.append(f"==== {len(names)}: {message}\n\n{tests.texts[names[0]]}")
        blocks[-1] += "\n\n" + "\n".join(names)
    return "\n\n\n".join(blocks) + "\n"


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
        _update(found),
        [f"![{path.stem}]({path.name})" for path in pictures],
        _logs(outcomes),
    ]
    return "\n\n".join("\n".join(lines) for lines in blocks if lines) + "\n"


def digest(found: Results, outcomes: list[Outcome], tests: Tests | None) -> str:
    """What to read first: for a terminal of which only the end may be seen."""
    cases = list(map(_one_line, found.cases))
    blocks = [_tests(tests)[:_MOST_LISTED], cases, _update(found), _parts(outcomes)]
    return "\n\n".join("\n".join(line[:_MOST_OF_A_MESSAGE] for line in b) for b in blocks if b)


def _one_line(case: CaseResult) -> str:
    if case.ours is None:
        reason = case.wrong or "; ".join(m["reason"] for m in case.missing if m["name"] == "fastrl")
        return f"{case.name}: {'WRONG: ' if case.wrong else ''}{reason}"
    others = [e for e in case.entries if e.ratio is not None and not e.name.startswith("fastrl")]
    fastest = min(others, key=lambda e: e.ratio or 0.0, default=None)
    found = f"{case.ours.time_us['p50']:.1f} us, {case.ours.share_of_ceiling:.0%} of {case.ceiling}"
    if fastest is not None:
        found += f", {fastest.ratio:.2f}x {fastest.name}"
    return f"{case.name}: {found}"


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
        lines += ["", "The build is not ok: what follows is of what its log says was built."]
    return lines


def _tests(tests: Tests | None) -> list[str]:
    if tests is None:
        return []
    counts = [f"{tests.count(outcome)} {outcome}" for outcome in ("passed", "failed", "skipped")]
    lines = ["## Tests", "", f"{', '.join(counts)}, of {tests.collected or 'an unknown number'}."]
    for outcome in ("failed", "skipped"):
        groups = tests.by_message(outcome)
        if groups:
            lines += ["", f"{outcome.capitalize()}:", ""]
        for message, names in groups[:_MOST_LISTED]:
            others = ", ..." if len(names) > 1 else ""
            lines.append(f"- {len(names)}: {message.replace('`', chr(39))} (`{names[0]}`{others})")
        if len(groups) > _MOST_LISTED:
            lines.append(f"- and {len(groups) - _MOST_LISTED} more messages")
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


def _update(found: Results) -> list[str]:
    record = found.environment.get("update")
    if record is None:
        return []
    try:
        lines = _fenced(update_table.lines(record))
    except Exception as error:  # as with the tables
        lines = [f"Its table could not be made: {error!r}. See results.json."]
    return ["## An update of a model", "", *lines]


def _fenced(lines: Iterable[str]) -> list[str]:
    return ["```", *(line.replace("```", "'''") for line in lines), "```"]


def _logs(outcomes: list[Outcome]) -> list[str]:
    return [line for o in outcomes if o.tail for line in _log(o)]


def _log(outcome: Outcome) -> Iterator[str]:
    yield f"## The end of what `{outcome.name}` printed"
    yield ""
    yield from _fenced(outcome.tail.splitlines())
    yield ""
