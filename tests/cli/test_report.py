import json
import math
import re
import statistics
import subprocess

import pytest

for package in ("rich", "safetensors", "tokenizers"):
    pytest.importorskip(package)

from reported_runs import (  # noqa: E402
    AFTER,
    BEFORE,
    EARLY,
    LATE,
    PROMPTS,
    RECIPE,
    REFERENCES,
    Page,
    write_lines,
    written_run,
)

from fastrl.cli import main as cli  # noqa: E402
from fastrl.cli import report  # noqa: E402
from fastrl.cli.recipes.versions import commit_of  # noqa: E402
from fastrl.cli.reporting.axes import limits, tick_labels, ticks  # noqa: E402
from fastrl.cli.reporting.evaluations import pair_samples  # noqa: E402
from fastrl.cli.reporting.run_data import read_runs  # noqa: E402
from fastrl.cli.reporting.series import running_mean, thinned  # noqa: E402


def reported(*arguments):
    """The page of a report that succeeded, checked as every page has to be."""
    assert report.main([*map(str, arguments)]) == 0
    arguments = list(arguments)
    if "--output" in arguments:
        path = arguments[arguments.index("--output") + 1]
    else:
        path = arguments[0] / "report.html"
    text = path.read_text(encoding="utf-8")
    found = Page(text)
    assert len(found.ids) == len(set(found.ids))
    assert set(found.references) <= set(found.ids)
    assert found.loads == [] and "url(" not in text and "@import" not in text
    assert not re.search(r"https?://", text)
    assert not any(name.startswith("on") for name in found.attributes)
    assert found.tags.count("script") == 1
    return found


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return written_run(tmp_path_factory.mktemp("report") / "full")


@pytest.fixture(scope="module")
def full(run):
    return reported(run)


def test_the_command_is_one_of_fastrl(run, tmp_path, capsys):
    page = tmp_path / "here.html"
    assert cli.main(["report", str(run), "--output", str(page)]) == 0
    assert str(page) in capsys.readouterr().out and page.exists()
    assert [p.name for p in tmp_path.iterdir()] == ["here.html"]  # nothing partial beside it


def test_the_head_says_what_was_run_and_what_it_gained(full):
    differences = [b - a for a, b in zip(BEFORE, AFTER, strict=True)]
    half = 1.96 * statistics.stdev(differences) / 2
    gain = f"{statistics.mean(differences):.3f} ± {half:.3f}"
    assert f"rose by {gain}, from {statistics.mean(BEFORE):.3f} ±" in full.text
    for fact in ("ppo", "llama from scratch (width 128, 3 layers)", "multi30k_translation"):
        assert fact in full.text
    assert "Alarm at step 45: gold falls while the proxy rises (p = 0.00120" in full.text
    assert "Not finished" not in full.text


def test_charts_are_of_what_was_logged(full, run):
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for name in ("reward", "rewards_2f_chrf_2f_mean", "rewards_2f_length_2f_mean", "entropy", "kl"):
        assert f"curve-{name}" in full.descriptions
    for name in ("gold", "gold-kl", "evidence", "supervised"):
        assert f"chart-{name}" in full.descriptions
    assert "curve-bad_5f_steps" not in full.descriptions  # always 0
    entropies = [r["entropy"] for r in records]
    said = full.descriptions["curve-entropy"]
    assert f"{entropies[0]:.2f} at 1, {entropies[-1]:.2f} at 60" in said.replace(".00", "")
    assert f"lowest {min(entropies):.2f}, highest {max(entropies):.2f}" in said
    assert "Alarms at  45" in said
    last = math.sqrt(records[-1]["gold/kl"])
    assert f"{records[-1]['gold/gold']:.3f} at {last:.2f}" in full.descriptions["chart-gold-kl"]


def test_what_the_monitor_found_before_the_first_step_is_the_origin(tmp_path):
    """No step logs it; later ones stand in the log too, and those beyond it are repeated."""
    run = written_run(tmp_path / "run", steps=20)
    results = json.loads((run / "results.json").read_text())
    results["monitor"] = [
        {"step": step, "gold/gold": 0.123, "gold/proxy": 0.2, "gold/kl": 0.03 * step}
        for step in (0, 5, 30)
    ]
    (run / "results.json").write_text(json.dumps(results))
    said = reported(run).descriptions
    assert "0.123 at 0," in said["chart-gold-kl"] and "0.123 at 0," in said["chart-gold"]
    assert [r["step"] for r in read_runs([run])[0].evaluations] == [0, 5, 10, 15, 20]


def test_what_an_alarm_did_and_kept_is_said(tmp_path):
    run = written_run(tmp_path / "run", steps=45, total=60)
    assert "is in best/" not in reported(run).text
    (run / "best").mkdir()
    results = json.loads((run / "results.json").read_text())
    results["after"] = {"step": 45, "stopped": True}
    (run / "results.json").write_text(json.dumps(results))
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    golds = {r["gold/gold"]: r["step"] for r in records if "gold/gold" in r}
    text = reported(run).text
    assert "Stopped by its monitor after step 45 of 60." in text and "Not finished" not in text
    assert f"{max(golds):.3f} at step {golds[max(golds)]}, is in best/" in text


def test_the_versions_that_made_a_run_are_shown(tmp_path):
    run = written_run(tmp_path / "run", steps=2)
    starts = [{"step": 0, "fastrl": "0.1.0", "commit": "0123456789abcdef+", "torch": "2.13.0"}]
    (run / "versions.json").write_text(json.dumps({"starts": starts}))
    assert "Made withfastrl 0.1.0 (0123456789ab, changed), torch 2.13.0" in reported(run).text


def test_a_commit_is_that_of_the_files_own_repository(tmp_path):
    def git(*arguments):
        who = ["-c", "user.name=n", "-c", "user.email=e"]
        subprocess.run(["git", "-C", str(tmp_path), *who, *arguments], check=True)

    file, other = tmp_path / "tracked.py", tmp_path / "other.py"
    for path in (file, other):
        path.write_text("")
    assert commit_of(file) is None
    git("init", "-q")
    git("add", "tracked.py")
    git("commit", "-qm", "message")
    assert re.fullmatch("[0-9a-f]{40}", commit_of(file)) and commit_of(other) is None
    file.write_text("1")
    assert re.fullmatch("[0-9a-f]{40}[+]", commit_of(file))


def curve(folder, identifier):
    """The paths of a chart's first line, each as stretches of (x, y) in the axes' units."""
    text = (folder / "report.html").read_text(encoding="utf-8")
    svg = re.search(rf'aria-labelledby="{identifier}-title".*?</svg>', text, re.S)[0]
    axes = [[float(n) for n in re.search(rf'data-{k}="([^"]*)"', svg)[1].split()] for k in "xy"]
    group = re.search(r"<g class=\"c\d d\d\".*?</g>", svg, re.S)[0]

    def value(axis, at):
        low, high, start, end = axis
        return low + (high - low) * (float(at) - start) / (end - start)

    return [
        [
            [tuple(map(value, axes, pair.split(","))) for pair in stretch.split("L")]
            for stretch in path.replace("h0", "").split("M")[1:]
        ]
        for path in re.findall(r' d="([^"]*)"', group)
    ]


def test_a_line_has_the_values_and_gaps_of_its_key(full, run):
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    raw, mean = curve(run, "curve-reward")
    assert [[round(x) for x, _ in part] for part in raw] == [
        list(range(1, 20)),
        list(range(22, 61)),
    ]
    values = {round(x): y for part in raw for x, y in part}
    for record in records:
        if record["reward"] is not None:
            assert values[record["step"]] == pytest.approx(record["reward"], abs=1e-4)
    smooth = {round(x): y for part in mean for x, y in part}
    window = [records[i]["reward"] for i in (39, 40, 41, 42)]  # 60 // 15 of them
    assert smooth[41] == pytest.approx(statistics.mean(window), abs=1e-4)


def test_samples_stand_beside_each_other_escaped(full):
    head = full.rows.index(["Prompt", "Before", "After"])
    rows = [[cell.replace("↵", "") for cell in row] for row in full.rows[head + 1 : head + 5]]
    changes = ("+0.300", "+0.150", "+0.350", "+0.200")
    for row, *expected in zip(rows, PROMPTS, REFERENCES, EARLY, LATE, changes, strict=True):
        prompt, reference, early, late, change = expected
        assert row[0] == f"{prompt}Reference{reference}" and row[1].endswith(early)
        assert change in row[2] and (late.split("\x00")[0] or "(empty)") in row[2]
    attacked = next(row for row in full.rows if "<script>" in row[2])
    assert attacked[0].startswith(PROMPTS[2])
    assert "<script>alert('é')</script>↵\n</td></table><b onclick=" in attacked[2]
    assert "&amp;\\x00\\x1b[31m" in attacked[2]
    assert "Training, step 40" in full.text and "Training, step 20" not in full.text


def test_settings_and_commands_are_there(full, run):
    for text in ("learning_rate = 0.0002", '"max_steps": 60', f"fastrl train --resume {run}"):
        assert text in full.text
    assert f"fastrl eval {run}" in full.text and f"fastrl sample {run}" in full.text


def test_a_killed_run_has_a_page(tmp_path):
    run = written_run(tmp_path / "killed", steps=30)
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 31, "reward": 0.4, "ent')
    page = reported(run)
    assert "Not finished: step 30 of 60" in page.text
    assert "The last line of metrics.jsonl was cut short" in page.text
    assert "30 of 60" in page.text and "Alarm" not in page.text
    assert len(curve(run, "curve-reward")[0][-1]) == 9  # steps 22 to 30


def test_a_run_before_its_first_step_has_a_page(tmp_path):
    (tmp_path / "recipe.toml").write_text(RECIPE.format(algorithm="a2c", steps=3, learning_rate=1))
    page = reported(tmp_path)
    assert "No step is logged yet" in page.text and "svg" not in page.tags


def test_one_step_and_one_prompt_are_enough(tmp_path):
    run = written_run(tmp_path / "one", steps=1, total=1, gap=())
    (run / "supervised.jsonl").unlink()
    results = json.loads((run / "results.json").read_text())
    for entry in results.values():
        entry["prompt_rewards"] = entry["prompt_rewards"][:1]
    (run / "results.json").write_text(json.dumps(results))
    page = reported(run)
    assert "is not shown to have changed: +0.300, from 0.200 to 0.500 over" in page.text
    assert "1 prompt, so without an interval" in page.text
    assert "chart-supervised" not in page.descriptions


def test_chats_long_texts_and_several_references_are_shown(tmp_path):
    run = written_run(tmp_path / "chat", steps=1, total=1)
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    answer = [{"role": "assistant", "content": "word " * 400}]
    sample = {"prompt": chat, "completion": answer, "reward": None, "reference": ["eins", "zwei"]}
    results = {"before": {"step": 0, "samples": [sample]}, "after": {"step": 1, "samples": []}}
    (run / "results.json").write_text(json.dumps(results))
    page = reported(run)
    row = page.rows[page.rows.index(["Prompt", "Before", "After"]) + 1]
    assert row[0] == "systemBe brief.userHiReferenceeinszwei" and row[2] == "–"
    assert "1,100 more characters" in row[1] and row[1].count("word ") == 400
    assert row[1].startswith("no rewardassistantword")


def test_several_runs_are_compared(run, tmp_path):
    other = written_run(tmp_path / "full", steps=40, algorithm="grpo", learning_rate=1e-3, seed=3)
    page = reported(run, other, "--output", tmp_path / "both.html")
    first, second = page.rows[1:3]
    assert str(run) in first[0] and first[1].startswith("ppo") and first[4].startswith("+0.250 ±")
    assert str(other) in second[0] and second[7] == "40 of 60" and second[9] == "none"
    assert first[9] == "step 45"
    assert ["train.learning_rate", "0.0002", "0.001"] in page.rows
    assert not any(row[0] == "train.max_steps" for row in page.rows)  # is the same
    said = page.descriptions["curve-entropy"]
    assert f"A {run}:" in said and f"B {other}:" in said


def test_the_demo_has_a_page(tmp_path):
    settings = {"hidden_dim": 8, "steps": 2, "seed": 0}
    (tmp_path / "config.json").write_text(json.dumps({"settings": settings, "corpus": {}}))
    records = [{"stage": "warm_up", "step": 1, "loss": 4.0, "validation_perplexity": math.e**3}]
    for stage in ("policy_gradient", "actor_critic"):
        records += [{"stage": stage, "step": s, "reward": 0.1 * s, "kl": 0.1} for s in (1, 2)]
    write_lines(tmp_path / "metrics.jsonl", records)
    results = {
        stage: {"prompt_rewards": rewards, "samples": ["one", "two"], "kl": 0.1}
        for stage, rewards in (("warm_up", [0.0, 0.1]), ("policy_gradient", [0.2, 0.3]))
    }
    (tmp_path / "results.json").write_text(json.dumps(results | {"step_timing": {"time/ops": 1}}))
    page = reported(tmp_path)
    assert "A run of the demo, fastrl train without a recipe" in page.text
    assert page.rows[1][4] == "+0.200 ± 0.000" and page.rows[2][4] == "–"
    assert "A validation: 3.00 at 1.00" in page.descriptions["chart-supervised"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (None, "", "got {}, a folder without a recipe.toml"),
        ("recipe.toml", "algorithm = ", "in TOML"),
        ("results.json", "[1, 2]", "results.json as this run wrote it, got a list"),
    ],
)
def test_errors_say_what_is_wrong(tmp_path, capsys, name, content, message):
    folder = tmp_path / "run"
    if name is None:
        folder.mkdir()
    else:
        (written_run(folder, steps=2) / name).write_text(content)
    assert report.main([str(folder)]) == 2
    said = capsys.readouterr().err
    assert said.startswith("report: expected ") and message.format(folder) in said
    assert not (folder / "report.html").exists()


def test_folders_that_are_not_there(run, tmp_path, capsys):
    assert report.main([str(tmp_path / "none")]) == 2
    assert "none, no such folder" in capsys.readouterr().err
    assert report.main([str(run), "--output", str(tmp_path / "no" / "page.html")]) == 1
    assert "report: expected to read the runs and write the page" in capsys.readouterr().err
    assert report.main([]) == 2


def test_thinning_keeps_the_peaks():
    xs = [float(i) for i in range(10_000)]
    ys = [0.0] * 10_000
    ys[1234], ys[8765] = 5.0, -5.0
    kept = thinned(xs, ys, 100)
    assert len(kept) <= 100 and (1234.0, 5.0) in kept and (8765.0, -5.0) in kept
    assert [x for x, _ in kept] == sorted(x for x, _ in kept)
    assert thinned(xs, [None] * 10_000, 100)[7][1] is None


def test_a_running_mean_is_over_what_is_there():
    assert running_mean([1.0, None, 4.0, 7.0], 3) == [1.0, None, 5.5, 5.5]


@pytest.mark.parametrize(
    ("low", "high", "labels"),
    [
        (0, 60, ["0", "20", "40", "60"]),
        (-0.3, 1.1, ["0", "0.5", "1.0"]),
        (1200, 5000, ["2,000", "3,000", "4,000", "5,000"]),
        (-2e-5, 3e-5, ["−2e−5", "−1e−5", "0", "1e−5", "2e−5", "3e−5"]),
    ],
)
def test_ticks_are_round_numbers(low, high, labels):
    assert tick_labels(ticks(low, high, 6 if low < 0 and high < 1 else 4)) == labels


def test_axes_have_room_but_none_below_zero_for_what_is_never_negative():
    assert limits([0.0, 10.0]) == (0.0, 10.6)
    assert limits([-1.0, 1.0]) == pytest.approx((-1.12, 1.12))
    low, high = limits([3.0, 3.0])
    assert low < 3 < high


def test_prompts_that_come_up_twice_are_paired_in_order():
    def sample(prompt, completion):
        return {"prompt": prompt, "completion": completion}

    before = [sample("a", 1), sample("a", 2), sample("b", 3)]
    after = [sample([{"role": "user"}], 6), sample("a", 4), sample("a", 5)]
    assert pair_samples(before, after) == [
        (before[0], after[1]),
        (before[1], after[2]),
        (before[2], None),
        (None, after[0]),
    ]
