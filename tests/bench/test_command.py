import copy
import importlib
import json
import os
import subprocess
import sys
import time

import pytest

import fastrl
from bench import command, environment, results, table
from bench.compare import compare
from bench.results import CaseResult, Entry, Results
from fastrl.cli.bench import main


def entry(name, ratio, version="1.0", **changes):
    figures = {
        "rounds": 5, "disturbed": 1, "launches": 1,
        "time_us": {"p20": 9.0, "p50": 10.0 * ratio, "p80": 12.0},
        "gb_s": 4.0, "tflop_s": None, "share_of_ceiling": 0.5 / ratio, "ratio": ratio,
        "error": 1e-7, "extra_memory_mib": 16.0,
    }  # fmt: skip
    return Entry(name=name, version=version, **(figures | changes))


@pytest.fixture
def found():
    ours = entry("fastrl", 1.0, targets=[{"text": ">= 50% of the ceiling", "reached": False}])
    case = CaseResult(
        "gae", "gae [8, 8] float32 forward", "small", [8, 8], "float32", "forward", 168,
        copy_gb_s=8.0, eager_error=2e-7,
        entries=[ours, entry("fastrl.reference", 30.0), entry("numba loop", 0.8)],
        missing=[{"name": "torchrl", "version": "not installed", "reason": "not installed: pip"}],
    )  # fmt: skip
    environment = {
        "device": "cpu", "cpu": "A processor", "gpu": None, "threads": 2, "cores": 2,
        "simd": "avx2",
        "torch": "2.13.0", "python": "3.11", "commit": "unknown", "date": "today",
        "peers": {"numba": "0.68.1"}, "load_1min": 0.0,
    }  # fmt: skip
    return Results(environment, True, [case])


def slower(found, factor):
    """As if our op alone took `factor` times as long."""
    slow = copy.deepcopy(found)
    for each in slow.cases[0].entries:
        if each.name == "fastrl":
            each.time_us["p50"] *= factor
            each.share_of_ceiling /= factor
        else:
            each.ratio /= factor
    return slow


@pytest.fixture
def saved(found, tmp_path):
    def save(name, what=found):
        results.save(what, tmp_path / name)
        return str(tmp_path / name)

    return save


def test_json_round_trip(found, saved, tmp_path):
    assert results.load(tmp_path / saved("a.json")) == found


def test_equal_files_pass_and_a_planted_slow_down_does_not(found, saved, capsys):
    old, slow = saved("old.json"), saved("slow.json", slower(found, 1.3))
    assert main(["--results", old, "--compare", old]) == 0
    assert main(["--results", slow, "--compare", old]) == 1
    assert "worse" in capsys.readouterr().out
    assert main(["--results", slow, "--compare", old, "--threshold", "0.5"]) == 0
    assert main(["--results", old, "--compare", slow]) == 0


def test_one_noisy_peer_is_no_slow_down(found):
    noisy = copy.deepcopy(found)
    noisy.cases[0].entries[2].ratio /= 2
    assert not any(change.is_worse for change in compare(found, noisy, 0.1))


def test_another_state_of_the_machine_is_named(found, saved, capsys):
    other = copy.deepcopy(found)
    other.cases[0].copy_gb_s *= 1.3
    assert main(["--results", saved("a.json", other), "--compare", saved("b.json")]) == 0
    assert "1 of the cases found the machine in another state" in capsys.readouterr().out
    assert main(["--results", saved("b.json"), "--compare", saved("b.json")]) == 0
    assert "another state" not in capsys.readouterr().out


@pytest.mark.parametrize(("figure", "value"), [("extra_memory_mib", 32.0), ("error", 1e-5)])
def test_more_memory_and_a_larger_error_are_worse(found, figure, value):
    new = copy.deepcopy(found)
    setattr(new.cases[0].entries[0], figure, value)
    assert [c.is_worse for c in compare(found, new, 0.1)].count(True) == 1


def test_a_wrong_result_fails_the_run_and_the_comparison(found, saved):
    wrong = copy.deepcopy(found)
    wrong.cases[0].entries, wrong.cases[0].wrong = [], "gae: expected output 0"
    assert main(["--results", saved("wrong.json", wrong)]) == 1
    assert any(change.is_worse for change in compare(found, wrong, 0.1))


@pytest.mark.parametrize(
    ("text", "message"),
    [(None, "expected a result file"), ("{", "expected JSON"), ("{}", "expected a result file of"),
     ('{"format": 1}', "expected a result file of format 2"),
     ('{"format": 2, "cases": [{}]}', "expected the fields")],
)  # fmt: skip
def test_bad_files_are_clear_errors(tmp_path, capsys, text, message):
    path = tmp_path / "bad.json"
    if text is not None:
        path.write_text(text)
    assert main(["--compare", str(path), "gae"]) == 2
    assert f"bench: {message}" in capsys.readouterr().err


def test_nothing_in_common_is_an_error(found, saved, capsys):
    other = copy.deepcopy(found)
    other.cases[0].name = "gae [9, 9] float32 forward"
    status = main(["--results", saved("a.json"), "--compare", saved("b.json", other)])
    assert status == 2 and "expected a case in both files" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["nonesuch"], "expected op in gae,"),
        (["--threshold", "0"], "expected threshold > 0, got 0"),
        (["--device", "teapot"], "expected device cpu or cuda, got teapot"),
        (["--seconds", "-1"], "expected --seconds > 0, got -1"),
        (["--seconds", "nan"], "expected --seconds > 0, got nan"),
        (["gae", "--results", "old.json"], "expected no ops with --results"),
        (["--results", "old.json", "--seconds", "9"], "expected no --seconds with --results"),
        (["--json", "/proc/none/here.json"], "expected to write the results"),
        (["--json", "/dev"], "expected a file for --json, got the folder /dev"),
    ],
)
def test_bad_arguments_are_clear_errors(capsys, argv, message):
    assert main(argv) == 2
    assert f"bench: {message}" in capsys.readouterr().err


def shown(found, capsys):
    table.show(found)
    return capsys.readouterr().out


def test_the_same_table_with_rich_and_without(found, capsys, monkeypatch):
    with_rich = shown(found, capsys)
    monkeypatch.setitem(sys.modules, "rich.console", None)
    plain = shown(found, capsys)
    assert with_rich.split() == plain.split()
    for text in (
        "numba loop 1.0", "0.80x (faster)", "30.00x", ">= 50% of the ceiling: MISSED",
        "torchrl not installed: not run, not installed: pip", "Faster than we: numba loop",
        "Targets reached: 0 of 1",
    ):  # fmt: skip
        assert text in plain
    assert max(map(len, plain.splitlines())) <= 180


def test_plots_are_written(found, saved, tmp_path):
    pytest.importorskip("matplotlib")
    assert main(["--results", saved("a.json"), "--plot", str(tmp_path / "plots")]) == 0
    for name in ("roofline.png", "speedup.png"):
        assert (tmp_path / "plots" / name).read_bytes().startswith(b"\x89PNG")


def test_a_run_writes_json_with_its_environment(tmp_path, monkeypatch, capsys):
    from bench import cases
    from bench.case import Case

    small = Case("gae", (2, 8), "small", options={"gamma": 0.9, "gae_lambda": 1.0}, quick=True)
    monkeypatch.setitem(cases.CASES, "gae", [small])
    monkeypatch.setattr(command, "Bench", _quick_bench)
    assert main(["gae", "--quick", "--json", str(tmp_path / "r.json")]) == 0
    data = json.loads((tmp_path / "r.json").read_text())
    assert data["environment"]["torch"] and data["environment"]["commit"]
    names = [each["name"] for each in data["cases"][0]["entries"]]
    assert names == ["fastrl", "fastrl.reference"]


def test_ctrl_c_says_what_is_kept(monkeypatch, capsys):
    def stopped(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "measure", stopped)
    assert main(["gae", "--json", "/dev/null"]) == 130
    assert "bench: stopped. /dev/null holds the cases" in capsys.readouterr().err


def test_results_go_to_a_pipe_or_through_a_link(found, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    results.save(found, tmp_path / "pipe")
    assert json.loads(os.read(reader, 1 << 16))["cases"]
    os.close(reader)
    (tmp_path / "link").symlink_to(tmp_path / "file")
    results.save(found, tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and results.load(tmp_path / "file") == found


def test_peers_without_time_are_listed_and_we_are_measured(tmp_path, monkeypatch):
    from bench import cases
    from bench.case import Case

    options = {"gamma": 0.9, "gae_lambda": 1.0}
    small = [Case("gae", (2, 8 + i), "small", options=options, quick=True) for i in range(2)]
    monkeypatch.setitem(cases.CASES, "gae", small)
    monkeypatch.setattr(command, "Bench", _quick_bench)
    for seconds, names, missing in (
        ("1", ["fastrl"], 1),
        ("60", ["fastrl", "fastrl.reference"], 0),
    ):
        path = tmp_path / f"{seconds}.json"
        assert main(["gae", "--quick", "--seconds", seconds, "--json", str(path)]) == 0
        for case in json.loads(path.read_text())["cases"]:
            assert [each["name"] for each in case["entries"]] == names
            assert [each["reason"] for each in case["missing"]] == missing * [
                "the time was used up before it had its turn"
            ]


def test_a_process_knows_how_old_it_is():
    ages = []
    for _ in range(2):
        ages.append(environment.process_age())
        time.sleep(0.1)
    assert 0 < ages[0] < 600 and 0.08 < ages[1] - ages[0] < 10
    code = "from bench.environment import process_age; print(process_age())"
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=environment.ROOT, capture_output=True, check=True
    )
    assert 0 < float(done.stdout) <= time.monotonic() - start + 0.1  # the import of torch is in it


def test_results_do_not_change_the_stamp(tmp_path, monkeypatch):
    def git(*args):
        names = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
        subprocess.run(["git", "-C", tmp_path, *names, *args], check=True, capture_output=True)

    git("init")
    git("commit", "--allow-empty", "-m", "one")
    monkeypatch.setattr(environment, "ROOT", tmp_path)
    head = environment.commit()
    assert len(head) == 12
    (tmp_path / "bench" / "results" / "gpu").mkdir(parents=True)
    (tmp_path / "bench" / "results" / "gpu" / "report.md").write_text("new")
    assert environment.commit() == head
    (tmp_path / "bench" / "run.py").write_text("new")
    assert environment.commit() == f"{head}+changes"


def _quick_bench(device, budget):
    from bench.peers import REFERENCE
    from bench.run import Bench
    from bench.timing import Budget

    class NoCopy:
        bytes = 8

        def __call__(self):
            pass

    tiny = Budget(seconds=0.001, least_rounds=2, most_rounds=2)
    return Bench(device, tiny, peers_of=lambda op: [REFERENCE], copy=NoCopy())


def test_without_a_checkout_it_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(fastrl, "__file__", str(tmp_path / "fastrl" / "__init__.py"))
    assert importlib.import_module("fastrl.cli.bench").main([]) == 2
    assert "need a checkout" in capsys.readouterr().err
