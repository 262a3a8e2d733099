"""`make gpu` with other commands in the place of its parts: what it keeps when they go wrong."""

import json
import math
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from gpu_machine import MACHINE, RECORD

from bench import results
from bench.gpu import build, command, parts, plan, report
from bench.gpu.parts import Outcome, Part, Runner
from bench.results import CaseResult, Entry, Results


def shell(script, **options):
    return Part(options.pop("name", "part"), ["sh", "-c", script], options.pop("limit_s", 20.0))


def results_of(op, peer_ratio=2.0):
    def entry(name, ratio):
        return Entry(
            name=name, version="1.0", rounds=5, disturbed=0, launches=1, gb_s=4.0, tflop_s=None,
            ratio=ratio, time_us={"p20": 9.0, "p50": 10.0, "p80": 12.0}, share_of_ceiling=0.5,
            error=1e-7, extra_memory_mib=1.0,
        )  # fmt: skip

    case = CaseResult(op, f"{op} [8, 8] float32 forward", "small", [8, 8], "float32", "forward", 8)
    case.entries = [entry("fastrl", 1.0), entry("a peer", peer_ratio)]
    case.missing = [{"name": "torchrl", "version": "", "reason": "not installed: pip"}]
    return Results(MACHINE["environment"] | {"commit": "unknown"}, True, [case])


def bench(op, files, then, tmp_path, **options):
    """As a bench does: it writes the cases that are done, and goes on."""
    path = tmp_path / f"{op}.json"
    results.save(results_of(op, options.pop("peer_ratio", 2.0)), path)
    copy = f"cp {shlex.quote(str(path))} {shlex.quote(str(files.results(op)))}"
    return shell(f"{copy}; {then}", name=op, **options)


@pytest.fixture
def files(tmp_path):
    folder = tmp_path / "parts"
    folder.mkdir()
    return plan.Files(folder)


def runner(files, seconds=60.0):
    return Runner(files.folder, os.environ, seconds, grace_s=0.2)


def statuses(done):
    return {outcome.name: outcome.status for outcome in done.outcomes}


def test_each_part_gives_what_it_has(files, tmp_path, capsys):
    """One is killed, one fails, one is too long in pictures: the others are complete."""
    out, done = tmp_path / "out", runner(files)
    pictures = (
        f"mkdir {files.pictures}; for i in 1 2 3 4 5 6 7 8; do echo > {files.pictures}/$i.png"
    )
    parts = [
        shell("echo one; echo 'no such header' >&2; exit 3", name="build"),
        bench("gae", files, "sleep 60", tmp_path, limit_s=1.0),
        bench("token_logprobs", files, "true", tmp_path, peer_ratio=0.5),
        shell(f"{pictures}; done", name="pictures"),
    ]
    environment = MACHINE["environment"] | {"commit": "abc"}
    assert command.run(done, parts, environment, files, out) == 1
    assert statuses(done) == {
        "build": "failed", "gae": "over its limit", "token_logprobs": "ok", "pictures": "ok",
    }  # fmt: skip
    found = results.load(out / "results.json")
    assert [case.op for case in found.cases] == ["gae", "token_logprobs"]
    assert found.environment["commit"] == "abc"
    assert [part["status"] for part in found.environment["parts"]] == [
        "failed",
        "over its limit",
        "ok",
        "ok",
    ]
    assert sorted(p.name for p in out.iterdir()) == [
        *(f"{i}.png" for i in range(1, 5)), "logs.txt", "report.md", "results.json",
    ]  # fmt: skip
    assert (out / "logs.txt").read_text().startswith("==== 1-build\none\nno such header\n")
    text = (out / "report.md").read_text()
    for line in (
        "# fastrl on NVIDIA H100 80GB HBM3", "| commit | abc |", "| driver | 580.1 |",
        "| build | failed | 0 | 20 | exit status 3 |", "no such header", "### gae",
        "The bench is over its limit", "not installed: pip", "0.50x (faster)",
        "![4](4.png)",
        "of what its log says was built",
    ):  # fmt: skip
        assert line in text
    assert "5.png" not in text
    said = capsys.readouterr().out
    name = "gae [8, 8] float32 forward"
    assert f"\n{name}: 10.0 us, 50% of copy, 2.00x a peer\n" in said
    assert said.index("no such header") < said.index(name) < said.index("| build | failed |")


def test_a_part_is_killed_with_all_that_it_started(files, tmp_path):
    beat = tmp_path / "beat"
    child = f"trap '' INT; while :; do date +%N > {beat}; sleep 0.02; done"
    done = runner(files)
    done.run(shell(f"({child}) & echo $! ; wait", limit_s=2.0))
    assert statuses(done) == {"part": "over its limit"} and done.outcomes[0].tail.strip().isdigit()
    assert _is_still(beat)
    # One that ends in time may leave something behind, too.
    assert done.run(shell(f"({child}) & sleep 0.2")).status == "ok"
    assert _is_still(beat)


def _is_still(beat):
    before = beat.read_text()
    time.sleep(0.2)
    return beat.read_text() == before


def test_a_part_that_no_signal_ends_is_not_waited_for(files, monkeypatch):
    monkeypatch.setattr(parts, "_DEATH_S", 0.2)
    kill, spared = os.killpg, []
    monkeypatch.setattr(os, "killpg", lambda group, _: spared.append(group))
    done = runner(files)
    try:
        assert done.run(shell("sleep 60", limit_s=1.0)).reason == "it was killed, and does not end"
    finally:
        kill(spared[0], signal.SIGKILL)
    assert statuses(done) == {"part": "over its limit"} and done.outcomes[0].seconds < 20


def test_a_part_over_its_limit_may_write_down_what_it_knows(files, tmp_path):
    note = tmp_path / "note"
    script = f"trap 'echo kept > {note}; exit' INT; sleep 60 & wait"
    assert runner(files).run(shell(script, limit_s=1.0)).status == "over its limit"
    assert note.read_text() == "kept\n"


def test_shares_of_the_time_and_the_deadline(files):
    done = runner(files, seconds=100.2)
    parts = [
        Part("a", ["true"]), Part("b", ["true"], weight=3), Part("pictures", ["true"], 10.0),
    ]  # fmt: skip
    done.run_all(parts, lambda: None)
    limits = [outcome.limit_s for outcome in done.outcomes]
    assert limits == pytest.approx([22.5, 90, 10], abs=1)  # what the first one leaves goes on
    late = runner(files, seconds=1.0)
    late.run_all(parts, lambda: None)
    assert set(statuses(late).values()) == {"not reached"} and all(o.is_bad for o in late.outcomes)


def test_starts_have_their_time_before_shares_and_a_command_is_told_less_than_its_limit(files):
    done = runner(files, seconds=100.2)
    told = ["sh", "-c", 'echo "told $0"', parts.SECONDS]
    shared = [
        Part("a", told, start_s=10.0, weight=1), Part("b", ["true"], start_s=10.0, weight=3),
        Part("pictures", ["true"], 20.0),
    ]  # fmt: skip
    done.run_all(shared, lambda: None)
    limits = [outcome.limit_s for outcome in done.outcomes]
    assert limits == pytest.approx([10 + 60 / 4, 80, 20], abs=1)
    assert "told 22" in done.logs(1000)  # of the 15 beside its start four fifths
    hurried = runner(files, seconds=35.2)
    hurried.run_all(shared, lambda: None)
    assert hurried.outcomes[0].limit_s == pytest.approx(7.5, abs=0.5)


def test_a_second_run_leaves_nothing_of_the_first(files, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    for name in ("failures.txt", "roofline.png", "results.json", "mine.txt"):
        (out / name).write_text("old")
    command.run(runner(files), [shell("true")], MACHINE["environment"], files, out)
    assert sorted(p.name for p in out.iterdir()) == [
        "logs.txt", "mine.txt", "report.md", "results.json",
    ]  # fmt: skip


def test_an_update_that_cannot_be_shown_costs_its_table_alone(files, tmp_path):
    files.update.write_text(json.dumps({"options": {}, "runs": {}, "loss": math.nan}))
    out = tmp_path / "out"
    one = [bench("gae", files, "true", tmp_path)]
    assert command.run(runner(files), one, MACHINE["environment"], files, out) == 0
    text = (out / "report.md").read_text()
    assert "Its table could not be made: KeyError('ragged')" in text and "### gae" in text
    found = json.loads((out / "results.json").read_text(), parse_constant=pytest.fail)
    assert found["environment"]["update"]["loss"] is None


def test_a_build_that_takes_too_long_ends_with_its_compilers(tmp_path, capfd):
    script = f"sleep 60 & echo $! > {tmp_path / 'pid'}; wait"
    assert build._run(["sh", "-c", script], os.environ, 1.0) == 1
    assert "stopped after 1 s" in capfd.readouterr().out
    pid = int((tmp_path / "pid").read_text())
    deadline = time.monotonic() + 10
    while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
        if "\nState:\tZ" in Path(f"/proc/{pid}/status").read_text():
            break  # dead, and not waited for by whoever has it now
        time.sleep(0.05)
    assert time.monotonic() < deadline
    assert build._run(["sh", "-c", "exit 3"], os.environ, 5.0) == 3


def test_the_limits_leave_the_benches_their_time():
    fixed = plan.WHEELS + plan.CHECK + plan.BUILD + plan.TESTS + plan.PICTURES
    assert fixed + 80 <= plan.TOTAL <= 540 - 20


def test_a_report_that_cannot_be_written_stops_nothing(files, tmp_path, monkeypatch, capsys):
    def broken(*_):
        raise KeyError("outcome")

    monkeypatch.setattr(report, "text", broken)
    parts = [bench("gae", files, "true", tmp_path), shell("true", name="pictures")]
    done, out = runner(files), tmp_path / "out"
    assert command.run(done, parts, MACHINE["environment"], files, out) == 1
    assert statuses(done) == {"gae": "ok", "pictures": "ok"}
    assert len(results.load(out / "results.json").cases) == 1
    assert "KeyError: 'outcome'" in capsys.readouterr().err


def test_an_interrupt_loses_nothing_either(files, tmp_path):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    parts = [
        bench("gae", files, "kill -INT $PPID; sleep 60", tmp_path), shell("true", name="pictures"),
    ]  # fmt: skip
    done = runner(files)
    files.update.write_text(json.dumps(RECORD))
    try:
        assert command.run(done, parts, MACHINE["environment"], files, tmp_path / "out") == 1
    finally:
        signal.signal(signal.SIGINT, before)
    assert statuses(done) == {"gae": "interrupted", "pictures": "not reached"}
    found = results.load(tmp_path / "out" / "results.json")
    assert len(found.cases) == 1 and found.environment["update"] == RECORD
    text = (tmp_path / "out" / "report.md").read_text()
    assert "padded copies, all logits         out of memory" in text and "0.250     1.00x" in text


def planned(only, files, **changes):
    return plan.plan(only, MACHINE | changes, files)


def test_only(files):
    assert [p.name for p in planned([], files)] == [
        "build", "tests", "gae", "token_logprobs", "update", "pictures",
    ]  # fmt: skip
    assert [p.name for p in planned(["update"], files)] == ["build", "update"]
    assert [(p.start_s, p.weight) for p in planned([], files)[2:4]] == [(8, 1), (8, 3)]
    assert [p.name for p in planned(["build"], files)] == ["build"]
    assert [p.name for p in planned(["tests"], files)] == ["build", "tests"]
    parts = planned(["gae"], files)
    assert [p.name for p in parts] == ["build", "tests", "gae", "pictures"]
    assert parts[1].command[parts[1].command.index("-k") + 1] == "gae"
    assert "--quick" in planned([], files)[2].command and "--quick" not in parts[2].command
    assert "-k" not in planned(["gae", "tests"], files)[1].command
    with pytest.raises(plan.Refused, match="expected ONLY in build, tests, gae, .*, got gea. Name"):
        planned(["build", "gea"], files)


def test_a_machine_without_pytest_matplotlib_or_transformers(files, tmp_path):
    parts = planned([], files, packages=dict.fromkeys(MACHINE["packages"], False))
    done = runner(files)
    for part in (parts[1], *parts[-2:]):
        done.run(part)
    assert statuses(done) == {"tests": "failed", "update": "skipped", "pictures": "skipped"}
    text = report.text(results_of("gae"), done.outcomes, None, [])
    assert "pytest is not installed; put its wheel into WHEELS=folder" in text
    assert "| pictures | skipped | 0 | 0 | matplotlib is not installed |" in text


def test_every_gpu_test_is_in_a_file_that_is_run(request):
    marked = {item.path for item in request.session.items if "gpu" in item.keywords}
    assert marked <= set(plan.gpu_test_files())


def test_a_table_that_cannot_be_made_costs_the_tables_alone(monkeypatch):
    def broken(results):
        raise KeyError("cores")

    monkeypatch.setattr(report.table, "closing_lines", broken)
    outcomes = [Outcome("build", "failed", tail="no such header")]
    text = report.text(results_of("gae"), outcomes, None, [])
    assert "could not be made: KeyError('cores')" in text and "no such header" in text


def line(name, outcome, when="call", message="", text=""):
    fields = {"name": name, "outcome": outcome, "when": when, "message": message, "text": text}
    return json.dumps(fields | {"seconds": 0.1}) + "\n"


def test_tests_are_counted_and_failures_named(files):
    assert report.read_tests(files.tests) is None
    found = [line("a::x", "passed", when) for when in ("setup", "call", "teardown")]
    found += [line("a::y", "skipped", "setup", "needs 2 GPUs")]
    for name in ("a::z", "a::w"):
        found += [line(name, "failed", message="assert 1 == 2", text="its traceback")]
        found += [line(name, "passed", "teardown")]
    found += [line("a::v", "passed"), line("a::v", "failed", "teardown", "illegal access", "long")]
    found += [line("a::v", "failed", "???", "worker 'gw0' crashed")]
    files.tests.write_text('{"collected": 9}\n' + "".join(found) + '{"name": "half')
    tests = report.read_tests(files.tests)
    text = report.text(results_of("gae"), [], tests, [])
    assert "1 passed, 3 failed, 1 skipped, of 9." in text
    assert "- 2: assert 1 == 2 (`a::z`, ...)\n- 1: illegal access (`a::v`)" in text
    assert "- 1: needs 2 GPUs (`a::y`)" in text
    assert "==== 2: assert 1 == 2\n\nits traceback\n\na::z\na::w\n" in report.failures(tests)


def test_tests_run_side_by_side_where_they_can(files):
    def options(workers, **changes):
        packages = MACHINE["packages"] | {k: v for k, v in changes.items() if "-" in k}
        machine = {"packages": packages, "gpu_is_shared": changes.get("shared", True)}
        machine["environment"] = MACHINE["environment"] | {"cores": workers}
        return planned(["tests"], files, **machine)[1].command

    assert "-n 15 --maxschedchunk=1" in " ".join(options(16))
    assert "--timeout-method=thread" in options(16)
    for alone in (options(2), options(16, shared=False), options(16, **{"pytest-xdist": False})):
        assert "-n" not in alone and "--timeout-method=signal" in alone
    assert not [x for x in options(16, **{"pytest-timeout": False}) if "--timeout" in x]


def test_a_bench_knows_its_time(files, tmp_path):
    gae = planned(["gae"], files)[2]
    at = gae.command.index("--seconds") + 1
    note = tmp_path / "note"
    script = ["sh", "-c", f"echo $1 > {note}", "sh", gae.command[at]]
    runner(files).run(Part("gae", script, 17.0))
    assert note.read_text() == "14\n"  # four fifths of its limit


@pytest.fixture
def main(monkeypatch, tmp_path):
    """The command on a machine that has it all, with a single part that prints its environment."""
    machine = tmp_path / "machine.json"
    machine.write_text(json.dumps(MACHINE))
    monkeypatch.setattr(
        command, "check_part",
        lambda device, files: shell(f"cp {machine} {files.machine}", name="check"),
    )  # fmt: skip

    def only_build(only, machine, files):
        planned(only, files)
        return [shell("echo PATH is $PATH; exit 1", name="build")]

    monkeypatch.setattr(command, "plan", only_build)
    before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    yield command.main
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("argv, stamp", [(["--commit", "abc"], "abc"), ([], "git's own")])
def test_the_stamp(main, tmp_path, argv, stamp):
    out = tmp_path / "out"
    assert main([*argv, "--out", str(out)]) == 1
    assert results.load(out / "results.json").environment["commit"] == stamp
    text = (out / "report.md").read_text()
    assert f"| commit | {stamp} |" in text and "| check | ok |" in text
    assert f"PATH is {Path(sys.executable).parent}" in text


def test_bad_arguments_are_clear_errors_and_write_nothing(main, tmp_path, capsys):
    for argv, message in (
        (["--only", "gea"], "gpu: expected ONLY in build,"),
        (["--wheels", str(tmp_path / "none")], "gpu: expected wheels in WHEELS="),
    ):
        assert main([*argv, "--out", str(tmp_path / "out")]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_wheels_stand_before_what_is_installed(files, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "mine")
    env = command._environment(files, with_packages=True)
    assert env["PYTHONPATH"] == f"{files.packages}:mine"
    assert env["PATH"].startswith(f"{files.packages}/bin:{Path(sys.executable).parent}:")
    assert command._environment(files, with_packages=False)["PYTHONPATH"] == "mine"


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_it_says_so_and_writes_nothing(tmp_path):
    out = tmp_path / "out"
    done = subprocess.run(
        [sys.executable, "-m", "bench.gpu", "--out", str(out)],
        cwd=plan.ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "gpu: expected an NVIDIA GPU that torch finds, got none" in done.stderr
    assert not out.exists()
