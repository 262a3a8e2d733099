import io
import json
import math

import pytest

pytest.importorskip("rich")
pytest.importorskip("tensorboard")

from rich.console import Console

from fastrl.trainers.loggers import JsonLines, ProgressBar, SampleTable, TensorBoard, headline


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def record(step, **more):
    return {"step": step, "reward": step / 10, "completions/mean_length": 8.0, **more}


def test_lines_are_in_the_file_at_once_and_valid_json(tmp_path):
    path = tmp_path / "new" / "metrics.jsonl"
    log = JsonLines(path)
    log(record(1, loss=math.nan, kl=math.inf, text="\ud800 ü\r\u2028"))
    assert path.read_bytes().count(b"\n") == 1  # before any close
    strict = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(name))
    assert strict == record(1, loss=None, kl=None, text="\ud800 ü\r\u2028")
    log.close()


@pytest.mark.parametrize("cut", range(1, 30))
def test_a_line_cut_short_anywhere_is_repaired(tmp_path, cut):
    path = tmp_path / "metrics.jsonl"
    with JsonLines(path) as log:
        log(record(1))
        log(record(2, text="ü"))
    whole = path.read_bytes()
    first = len(whole.split(b"\n")[0]) + 1
    path.write_bytes(whole[: first + cut])
    with JsonLines(path, step=1) as log:
        log(record(2, text="ü"))
    assert path.read_bytes() == whole


def test_steps_after_the_checkpoint_are_logged_once(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with JsonLines(path) as log:
        for step in range(1, 6):
            log(record(step))
    with JsonLines(path, step=3) as log:
        log(record(4, again=True))
    assert [line["step"] for line in lines(path)] == [1, 2, 3, 4]
    assert lines(path)[-1]["again"] is True
    JsonLines(path).close()  # without a step all stay
    assert len(lines(path)) == 4


def test_a_full_disk_is_an_error_at_the_step():
    with JsonLines("/dev/full") as log, pytest.raises(OSError, match="No space left"):
        log(record(1))


def scalars(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder)).Reload()
    return {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }


def test_tensorboard_has_the_names_and_each_step_once(tmp_path):
    with TensorBoard(tmp_path) as log:
        for step in (1, 2, 3):
            log(record(step, **{"rewards/hits/mean": None}))
    with TensorBoard(tmp_path, step=2) as log:
        log(record(3, reward=0.5))
        log(record(4))
    found = scalars(tmp_path)
    assert found.keys() == {"reward", "completions/mean_length"}
    assert [step for step, _ in found["reward"]] == [1, 2, 3, 4]
    assert [value for _, value in found["reward"]] == pytest.approx([0.1, 0.2, 0.5, 0.4])


def console(terminal):
    return Console(file=io.StringIO(), force_terminal=terminal, width=120)


def test_progress_is_plain_lines_without_a_terminal():
    out = console(False)
    with ProgressBar(3, title="grpo", done=1, console=out, seconds=3600) as bar:
        bar(record(2, kl=0.25))
        bar(record(3, kl=0.25, logprob_gap=2.4e-6, entropy=None))
    assert out.file.getvalue() == "grpo: step 3/3, reward +0.300, KL 0.2500, length 8, gap 2e-06\n"


def test_progress_is_a_bar_in_a_terminal():
    out = console(True)
    with ProgressBar(3, console=out) as bar:
        bar(record(3))
    shown = out.file.getvalue()
    assert "3/3" in shown and "reward +0.300" in shown and "\x1b[" in shown


def test_headline_takes_what_the_record_has():
    assert headline({"step": 1}) == ""
    assert headline({"tokens_per_second": 12345.6, "loss": 1.0}) == "tokens/s 12,346"


def test_samples_come_every_so_many_steps_in_a_table_and_a_file(tmp_path):
    path, out = tmp_path / "samples.jsonl", console(False)
    samples = [
        {"prompt": f"[b]prompt {i}", "completion": "a\nb", "reward": 0.5, "hits": None}
        for i in range(6)
    ]
    with SampleTable(lambda: samples, path, every=2, rows=3, console=out) as log:
        for step in (1, 2, 3):
            log(record(step))
    assert lines(path) == [{"step": 2, **sample} for sample in samples]
    shown = out.file.getvalue()
    assert "step 2" in shown and "+0.500" in shown and "step 3" not in shown
    assert [i for i in range(6) if f"[b]prompt {i}" in shown] == [0, 2, 4]  # not as markup
    with SampleTable(lambda: samples[:1], path, every=1, rows=0, step=1) as log:
        log(record(2))
    assert lines(path) == [{"step": 2, **samples[0]}]


def test_any_callable_is_a_logger_and_a_list_of_them_is(make_trainer):
    kept, others = [], []
    make_trainer().train(max_steps=2, on_step=[kept.append, others.append])
    assert [r["step"] for r in kept] == [1, 2] and kept == others
