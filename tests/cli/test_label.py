import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("rich")

import fastrl  # noqa: E402
from fastrl.cli import label  # noqa: E402
from fastrl.rewards._record_file import RecordFile  # noqa: E402
from fastrl.rewards.human import HumanReward  # noqa: E402

PAIRS = [
    {"id": f"{i:03d}", "prompt": f"say {i}", "a": f"one {i}", "b": f"two {i}"} for i in range(6)
]
PACKAGE = str(Path(fastrl.__file__).parents[1])


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def run(monkeypatch, tmp_path):
    """run(typed, *arguments): the exit status with that on standard input."""

    def run(typed, *arguments):
        (tmp_path / "typed").write_text(typed)
        with open(tmp_path / "typed") as file:
            monkeypatch.setattr(sys, "stdin", file)
            return label.main(list(map(str, arguments)))

    return run


def judgements(path):
    """By id the choice that stands, as a reader who knows the format has it."""
    standing = {}
    for row in lines(path):
        standing.pop(row["id"], None)
        if not row.get("retracted"):
            standing[row["id"]] = row["choice"]
    return standing


def shown_left(text):
    """By number of the item, the word that stood under A."""
    return dict(re.findall(r"say (\d+)\nA:\n  (\w+)", text))


def test_choices_are_in_terms_of_the_file_whatever_side_was_shown(run, tmp_path, capsys):
    rows = [{"prompt": f"say {i}", "a": f"one {i}", "b": f"two {i}"} for i in range(200)]
    pairs = write(tmp_path / "pairs.jsonl", rows)
    swapped = {}
    for name in ("ann", "bob"):
        output = tmp_path / f"{name}.jsonl"
        assert run("a\n" * 200, pairs, "--output", output, "--annotator", name) == 0
        left = shown_left(capsys.readouterr().out)
        assert len(left) == 200
        found = [row["choice"] for row in lines(output)]
        assert found == [{"one": "a", "two": "b"}[left[str(i)]] for i in range(200)]
        assert 70 < found.count("a") < 130  # 4 standard deviations
        assert len({row["id"] for row in lines(output)}) == 200
        assert {row["annotator"] for row in lines(output)} == {name}
        swapped[name] = found
    assert 70 < sum(x == y for x, y in zip(*swapped.values(), strict=True)) < 130


def test_undo_skip_and_going_on(run, tmp_path, capsys):
    pairs, output = write(tmp_path / "pairs.jsonl", PAIRS), tmp_path / "judgements.jsonl"
    arguments = pairs, "--output", output, "--annotator", "ann"
    # The first undo has nothing to take back; x is no answer.
    assert run("u\nt\nx\ns\nu\nu\nS\ntie\nq\n", *arguments) == 0
    out = capsys.readouterr().out
    assert "There is nothing to undo." in out
    assert "Expected a, b, t(ie), s, u or q, got 'x'." in out
    assert "2 of 6 judged. The same command goes on here." in out
    assert judgements(output) == {"000": "skip", "001": "tie"}
    before = output.read_bytes()
    assert run("", *arguments) == 0  # the end of standard input leaves too
    assert "[3/6]" in capsys.readouterr().out and output.read_bytes() == before
    # A line that a kill cut short, and an undo of what was said in another session.
    output.write_bytes(before + b'{"id": "002", "annot')
    assert run("u\n" + "t\n" * 5, *arguments) == 0
    assert "6 of 6 judged.\n" in capsys.readouterr().out
    assert output.read_bytes().startswith(before)
    assert judgements(output) == {"000": "skip", **{row["id"]: "tie" for row in PAIRS[1:]}}
    assert run("", *arguments) == 0
    assert capsys.readouterr().out == "6 of 6 judged.\n"


def test_the_order_is_the_files_or_a_seeds(run, tmp_path, capsys):
    pairs = write(tmp_path / "pairs.jsonl", PAIRS)
    orders = []
    for number, options in enumerate(
        [(), ("--shuffle",), ("--shuffle",), ("--shuffle", "--seed", 5)]
    ):
        output = tmp_path / f"{number}.jsonl"
        run("t\n" * 3, pairs, "--output", output, *options)  # resumed in between
        run("t\n" * 3, pairs, "--output", output, *options)
        orders.append([row["id"] for row in lines(output)])
    assert orders[0] == [row["id"] for row in PAIRS]
    assert orders[1] == orders[2] != orders[0] and orders[3] not in orders[:3]
    assert all(sorted(order) == orders[0] for order in orders)


def test_ratings_of_completions(run, tmp_path, capsys):
    rows = [{"prompt": [{"role": "user", "content": "hi"}], "completion": text} for text in "xyz"]
    completions, output = write(tmp_path / "c.jsonl", rows), tmp_path / "ratings.jsonl"
    arguments = completions, "--rate", "--output", output, "--annotator", "ann", "--scale", "0-10"
    assert run("10\n11\n0\nskip\n", *arguments) == 0
    assert [row["rating"] for row in lines(output)] == [10, 0, None]
    assert "Expected 0 to 10, s, u or q, got '11'." in capsys.readouterr().out


def test_ratings_are_not_written_among_choices(run, tmp_path, capsys):
    rows = [{"prompt": "p", "completion": "c"}, {"prompt": "p", "a": "c", "b": "d"}]
    completions, pairs = [
        write(tmp_path / f"{number}.jsonl", rows[number : number + 1]) for number in (0, 1)
    ]
    for typed, first, second in (
        ("a\n5\n", [pairs], [completions, "--rate"]),
        ("5\na\n", [completions, "--rate"], [pairs]),
    ):
        output = tmp_path / f"of_{first[0].name}"
        assert run(typed, *first, "--output", output) == 0
        before = output.read_bytes()
        capsys.readouterr()
        assert run(typed[2:], *second, "--output", output) == 2
        captured = capsys.readouterr()
        assert "expected either choices or ratings, got both" in captured.err
        assert "q(uit)?" not in captured.out and output.read_bytes() == before


def test_a_last_line_without_a_newline_is_an_item(run, tmp_path):
    pairs = write(tmp_path / "pairs.jsonl", PAIRS[:2])
    pairs.write_bytes(pairs.read_bytes()[:-1])
    output = tmp_path / "judgements.jsonl"
    assert run("a\nb\n", pairs, "--output", output) == 0
    assert judgements(output).keys() == {"000", "001"}
    output.write_bytes(output.read_bytes()[:-1])
    exported = tmp_path / "preferences.jsonl"
    assert label.main(["--export", str(exported), str(pairs), str(output)]) == 0
    assert len(lines(exported)) == 2


def test_a_kill_at_any_moment_loses_no_judgement(tmp_path):
    script = Path(__file__).with_name("killed_labels.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": PACKAGE}
    command = [sys.executable, str(script), str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["kills"] == 45 and report["events"] > 100 and report["retracted"] > 5
    assert report["torn"] > 5 and report["before_any"] > 5 and report["kept"] + report["lost"] > 5
    # q, Ctrl-C and Ctrl-D leave with the terminal as it was.
    assert (report["status"], report["interrupted"], report["ended"]) == (0, 130, 0)


def test_one_file_has_one_writer(run, tmp_path, capsys):
    pairs, output = write(tmp_path / "pairs.jsonl", PAIRS), tmp_path / "judgements.jsonl"
    with RecordFile(output, exclusive=True):
        assert run("t\n", pairs, "--output", output) == 2
    message = f"label: expected {output} not to be in use, got another `fastrl label`"
    assert message in capsys.readouterr().err
    assert run("t\n", pairs, "--output", output) == 0
    assert len(lines(output)) == 1


def test_live_ratings_reach_the_training_that_waits(tmp_path, monkeypatch, capsys):
    read, typed = os.pipe()
    reward = HumanReward(tmp_path, poll_seconds=0.01, timeout=20)
    with open(read) as keys:
        monkeypatch.setattr(sys, "stdin", keys)
        found = []
        arguments = ["--live", str(tmp_path), "--annotator", "ann"]
        person = threading.Thread(target=lambda: found.append(label.main(arguments)))
        person.start()
        for step, answers, expected in [(0, "1\n5\n", [-1, 1]), (1, "s\n2\n", [None, -0.5])]:
            os.write(typed, answers.encode())
            state = SimpleNamespace(global_step=step)
            texts = [f"{step} x", f"{step} y"]
            assert reward(["p", "p"], texts, trainer_state=state) == expected
        assert label.main(arguments) == 2  # the same person cannot sit in two places
        # The last rating is taken back while nothing waits; what timed out is not shown.
        reward.timeout = 0.01
        with RecordFile(tmp_path / "requests.jsonl") as file:
            file.append(*_request_that_closed())
        os.write(typed, b"u\n4\nq\n")
        person.join(10)
        assert not person.is_alive() and found == [0]
    os.close(typed)
    rows = lines(tmp_path / "ratings.jsonl")
    assert [r.get("rating", "retracted") for r in rows] == [1, 5, None, 2, "retracted", 4]
    assert rows[-1]["id"] == rows[-2]["id"] == rows[-3]["id"]
    out, err = capsys.readouterr()
    assert "Waiting for completions" in out and "1 waiting" in out and "given up" not in out
    assert "got another `fastrl label`" in err


def _request_that_closed():
    how = {"scale": [1, 5], "annotators": 1}
    return {"id": "x", "prompt": "p", "completion": "given up", **how}, {"id": "x", "closed": True}


def test_agreement_of_three(tmp_path, capsys):
    """Krippendorff 2011, example C, whose alpha is 0.743 for choices and 0.849 for ratings."""
    rows = ["123321412...", "1233224125.3", ".3332342251.", "12332441251."]
    given = [
        {"id": item, "annotator": name, "rating": int(x)}
        for name, row in zip("abcd", rows, strict=True)
        for item, x in enumerate(row)
        if x != "."
    ]
    skip = {"id": 10, "annotator": "a", "rating": None}
    twice = [{"id": 0, "annotator": "a", "rating": 5}, *given]  # the later one stands
    path = write(tmp_path / "ratings.jsonl", [*twice, skip])
    assert label.main(["--agreement", str(path)]) == 0
    out = capsys.readouterr().out
    assert "12 items, 4 annotators, 41 judgements; 1 skipped ones are left out." in out
    assert re.search(r"Krippendorff's alpha +0\.849 \[0\.\d+, (0\.\d+|1\.000)\] +interval", out)
    # a and b differ at one of the nine items that both rated.
    assert "a, b: 9 items, agreement 0.889 [" in out and out.count("Cohen's kappa") == 6

    choices = [
        {
            "id": row["id"],
            "annotator": row["annotator"],
            "choice": ["a", "b", "tie"][row["rating"] % 3],
        }
        for row in given
    ]
    first = write(tmp_path / "1.jsonl", [row for row in choices if row["annotator"] in "ab"])
    second = write(tmp_path / "2.jsonl", [row for row in choices if row["annotator"] in "cd"])
    assert label.main(["--agreement", str(first), str(second)]) == 0
    assert "nominal" in capsys.readouterr().out
    for files, message in [
        ([first, path], "either choices or ratings, got both"),
        ([write(tmp_path / "3.jsonl", [choices[0]])], "those of a with no item in common"),
        ([], "expected at least one FILE of judgements, got none"),
        ([tmp_path / "none"], "none to be a file, got none"),
    ]:
        assert label.main(["--agreement", *map(str, files)]) == 2
        assert message in capsys.readouterr().err


def test_the_majority_is_exported(tmp_path, capsys):
    pairs = write(tmp_path / "pairs.jsonl", PAIRS)
    votes = {"000": "aab", "001": "bb", "002": "ab", "003": "ttb", "004": "s", "005": "bsb"}
    names = {"a": "a", "b": "b", "t": "tie", "s": "skip"}
    files = [
        write(
            tmp_path / f"{person}.jsonl",
            [
                {"id": item, "annotator": str(person), "choice": names[given[person]]}
                for item, given in votes.items()
                if person < len(given)
            ],
        )
        for person in range(3)
    ]
    output = tmp_path / "preferences.jsonl"
    assert label.main(["--export", *map(str, [output, pairs, *files])]) == 0
    assert lines(output) == [
        {"prompt": "say 0", "chosen": "one 0", "rejected": "two 0",
         "votes": {"chosen": 2, "rejected": 1, "tie": 0}},
        {"prompt": "say 1", "chosen": "two 1", "rejected": "one 1",
         "votes": {"chosen": 2, "rejected": 0, "tie": 0}},
        {"prompt": "say 2", "chosen": "one 2", "rejected": "two 2", "tie": True,
         "votes": {"chosen": 1, "rejected": 1, "tie": 0}},
        {"prompt": "say 3", "chosen": "one 3", "rejected": "two 3", "tie": True,
         "votes": {"chosen": 0, "rejected": 1, "tie": 2}},
        {"prompt": "say 5", "chosen": "two 5", "rejected": "one 5",
         "votes": {"chosen": 2, "rejected": 0, "tie": 0}},
    ]  # fmt: skip
    out = capsys.readouterr().out
    assert (
        "5 of 6 pairs written" in out
        and "3 with a preference, 2 ties; 2 unanimous. 1 without" in out
    )
    before = pairs.read_bytes()
    assert label.main(["--export", *map(str, [pairs, pairs, *files])]) == 2
    assert pairs.read_bytes() == before
    stranger = write(tmp_path / "s.jsonl", [{"id": "9", "annotator": "x", "choice": "a"}])
    assert label.main(["--export", *map(str, [output, pairs, stranger])]) == 2
    assert "got one of 9" in capsys.readouterr().err


def test_mistakes_are_said_and_nothing_is_written(run, tmp_path, capsys):
    pairs, output = write(tmp_path / "pairs.jsonl", PAIRS), tmp_path / "new.jsonl"
    other = [{**PAIRS[0], "a": "else"}, *PAIRS]
    for arguments, message in [
        ([pairs], "expected --output FILE for the judgements, got none"),
        (["--output", output], "expected one FILE to judge, got none"),
        ([tmp_path / "none", "--output", output], "none to be a file, got none"),
        ([pairs, "--rate", "--output", output], 'expected "prompt", "completion" in record 1 of'),
        ([pairs, "--rate", "--scale", "5-1", "--output", output], "two whole numbers that rise"),
        ([pairs, "--scale", "1-9", "--output", output], "expected no --scale with pairs, got one"),
        (["--agreement", pairs, "--output", output], "expected no --output with --agreement"),
        (["--live", tmp_path, "--shuffle"], "expected no --shuffle with --live"),
        ([pairs, "--rate", "--scale", "5", "--output", output], "LOW-HIGH as in 1-5, got 5"),
        ([write(tmp_path / "o.jsonl", other), "--output", output], "got 000 again in record 2"),
        ([pairs, "--live", tmp_path], "expected --live without a FILE"),
        (["--live", tmp_path / "none"], "the folder of a HumanReward, got"),
    ]:
        assert run("t\n", *arguments) == 2
        assert message in capsys.readouterr().err, arguments
    assert not output.exists()
    assert run("t\n", pairs, "--output", pairs) == 2  # no file of judgements
    assert lines(pairs) == PAIRS
    output.write_text("prose")
    assert run("t\n", pairs, "--output", output) == 2
    assert output.read_text() == "prose"
