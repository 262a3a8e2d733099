import io
import json
import os
import pty
import sys
import threading
import time
from types import SimpleNamespace

import pytest
import torch

from fastrl.models import LSTMLanguageModel
from fastrl.rewards._judgements import Answers
from fastrl.rewards._record_file import RecordFile, Tail
from fastrl.rewards._terminal import Screen
from fastrl.rewards.file_ratings import FileRatings
from fastrl.rewards.human import HumanReward
from fastrl.trainers import PolicyGradientConfig, PolicyGradientTrainer

PROMPTS, COMPLETIONS = ["p", "p", "q"], ["one", "two", "three"]


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def append(path, *records):
    with open(path, "a") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)


class Rater(threading.Thread):
    """Somebody who rates what is asked, knowing nothing of fastrl but the two files."""

    def __init__(self, folder, opinion, annotator="ann"):
        super().__init__(daemon=True)
        self.folder, self.opinion, self.annotator = folder, opinion, annotator
        self.is_done = threading.Event()

    def run(self):
        rated = set()
        while not self.is_done.is_set():
            new = [r for r in lines(self.folder / "requests.jsonl") if r["id"] not in rated]
            answers = [(r["id"], self.opinion(r)) for r in new]
            rated |= {identity for identity, _ in answers}
            append(
                self.folder / "ratings.jsonl",
                *({"id": i, "annotator": self.annotator, "rating": x} for i, x in answers),
            )
            time.sleep(0.005)

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *_):
        self.is_done.set()
        self.join()


def call(reward, step=0, completions=COMPLETIONS):
    logged = {}
    state = SimpleNamespace(global_step=step)
    found = reward(
        prompts=PROMPTS, completions=completions, trainer_state=state, log_metric=logged.__setitem__
    )
    return found, logged


class Letters:
    """A tokenizer whose tokens are letters."""

    def encode(self, text):
        return ["abcdefgh".index(letter) for letter in text]

    def decode(self, ids):
        return "".join("abcdefgh"[token] for token in ids)


@pytest.mark.parametrize("liked", ["c", "f"])
def test_a_rating_moves_the_very_next_update(tmp_path, liked):
    """The liked token becomes likelier by one step, and every other one together less likely."""
    torch.manual_seed(0)
    model = LSTMLanguageModel(8, 8, 16)
    config = PolicyGradientConfig(
        max_new_tokens=1, prompts_per_step=1, completions_per_prompt=32, learning_rate=0.02,
        max_steps=1,
    )  # fmt: skip
    reward = HumanReward(tmp_path, poll_seconds=0.005)
    trainer = PolicyGradientTrainer(model, reward, ["ab"], config, tokenizer=Letters())
    before = model(torch.tensor([[0, 1]]))[0][0, -1].softmax(-1)
    with Rater(tmp_path, lambda request: 5 if liked in request["completion"] else 1):
        (record,) = trainer.train()
    after = model(torch.tensor([[0, 1]]))[0][0, -1].softmax(-1)
    token = "abcdefgh".index(liked)
    asked = lines(tmp_path / "requests.jsonl")
    share = sum(liked in request["completion"] for request in asked) / 32
    assert len(asked) == 32 and 0 < share < 1
    assert record["rewards/human/mean"] == pytest.approx(2 * share - 1, abs=1e-6)
    assert record["human/unrated"] == 0
    assert after[token] > before[token] + 0.01


def test_an_evaluation_asks_nobody_unless_it_shall(tmp_path):
    from fastrl.cli.recipes.measure import measure

    config = PolicyGradientConfig(max_new_tokens=2, prompts_per_step=1, completions_per_prompt=2)
    model, options = LSTMLanguageModel(8, 8, 16), {"tokenizer": Letters()}
    for name, evaluations, asked in (("no", False, 0), ("yes", True, 2)):
        reward = HumanReward(tmp_path / name, timeout=0.01, evaluations=evaluations)
        trainer = PolicyGradientTrainer(model, reward, ["ab"], config, **options)
        found = trainer.evaluate(["ab", "ba"])
        requests = lines(tmp_path / name / "requests.jsonl")
        assert sum("prompt" in request for request in requests) == asked
        assert found["rewards/none"] == 2 and ("human/unrated" in found) == evaluations
    reward = HumanReward(tmp_path / "eval", timeout=0.01)
    measure(model, [reward], ["ab", "ba"], config=config, **options)
    assert sum("prompt" in r for r in lines(tmp_path / "eval" / "requests.jsonl")) == 4
    assert reward([""], [""], trainer_state=SimpleNamespace(global_step=0)) == [None]
    assert len(lines(tmp_path / "eval" / "requests.jsonl")) == 8 + 2  # each asked, each closed


def test_ratings_are_scaled_and_a_resumed_run_asks_nothing_twice(tmp_path):
    opinions = {"one": 0, "two": 5, "three": 10}
    with Rater(tmp_path, lambda request: opinions[request["completion"]]):
        found, logged = call(HumanReward(tmp_path, scale=[0, 10], poll_seconds=0.01), step=3)
    assert found == [-1.0, 0.0, 1.0] and logged == {"human/unrated": 0}
    asked = lines(tmp_path / "requests.jsonl")
    assert [(r["prompt"], r["completion"]) for r in asked] == list(
        zip(PROMPTS, COMPLETIONS, strict=True)
    )
    assert {r["step"] for r in asked} == {3} and len({r["id"] for r in asked}) == 3
    # Nobody is there any more: what was rated is known, and the rest is asked for.
    reward = HumanReward(tmp_path, scale=[0, 10], poll_seconds=0.01, timeout=0.05)
    assert call(reward, step=3)[0] == found
    assert lines(tmp_path / "requests.jsonl") == asked
    assert call(reward, step=4)[0] == [None] * 3
    assert len([r for r in lines(tmp_path / "requests.jsonl") if r.get("step") == 4]) == 3


def test_after_the_timeout_the_unrated_have_no_opinion(tmp_path, caplog):
    reward = HumanReward(tmp_path, timeout=20.0, poll_seconds=0.01, name="people")
    with Rater(tmp_path, lambda request: None if request["completion"] == "one" else 4):
        assert call(reward)[0] == [None, 0.5, 0.5]  # "one" was skipped, which ends the wait for it
    started, reward.timeout = time.monotonic(), 0.1
    found, logged = call(reward, step=1)
    assert found == [None] * 3 and logged == {"people/unrated": 3}
    assert 0.1 <= time.monotonic() - started < 20
    ids = [r["id"] for r in lines(tmp_path / "requests.jsonl") if r.get("step") == 1]
    closed = [r["id"] for r in lines(tmp_path / "requests.jsonl") if r.get("closed")]
    assert closed == ids
    assert caplog.text.count(f"fastrl label --live {tmp_path}") == 1
    # A resumed run asks for what was given up, and takes a rating that came too late.
    append(tmp_path / "ratings.jsonl", {"id": ids[1], "annotator": "ann", "rating": 1})
    assert call(HumanReward(tmp_path, timeout=0.05, poll_seconds=0.01), step=1)[0] == [
        None,
        -1,
        None,
    ]
    assert [r["id"] for r in lines(tmp_path / "requests.jsonl")][-4:] == [ids[0], ids[2]] * 2


def test_the_mean_over_annotators_is_waited_for(tmp_path):
    reward = HumanReward(tmp_path, annotators=2, poll_seconds=0.01)
    found = []
    with Rater(tmp_path, lambda request: 5):
        thread = threading.Thread(target=lambda: found.append(call(reward)[0]), daemon=True)
        thread.start()
        thread.join(0.3)
        assert thread.is_alive()
    with Rater(tmp_path, lambda request: 2 if request["completion"] == "two" else 5, "bob"):
        thread.join(60)
    assert found == [[1.0, 0.25, 1.0]]


def test_a_run_with_other_settings_asks_anew_and_leaves_nothing_open(tmp_path):
    killed = HumanReward(tmp_path, timeout=0.02, poll_seconds=0.01)
    killed._close = lambda ids: None  # as a kill leaves it
    call(killed, step=7)
    before = lines(tmp_path / "requests.jsonl")
    assert len(before) == 3 and not any("closed" in r for r in before)
    resumed = HumanReward(tmp_path, annotators=2, timeout=0.02, poll_seconds=0.01)
    call(resumed, step=7, completions=["one", "other", "three"])
    added = lines(tmp_path / "requests.jsonl")[3:]
    # `fastrl label --live` would ask one person for each of these, and nobody for a second.
    assert [r["id"] for r in added[:3] if r.get("closed")] == [r["id"] for r in before]
    asked = [(r["completion"], r["annotators"]) for r in added[3:6]]
    assert asked == [("one", 2), ("other", 2), ("three", 2)]
    assert [r["id"] for r in added[6:] if r.get("closed")] == [r["id"] for r in added[3:6]]


def test_a_rating_out_of_scale_and_bad_arguments_are_errors(tmp_path):
    with (
        Rater(tmp_path, lambda request: 6),
        pytest.raises(ValueError, match="HumanReward: expected ratings from 1 to 5, got 6"),
    ):
        call(HumanReward(tmp_path, poll_seconds=0.01))
    for options, message in [
        ({"scale": (5, 1)}, "scale two whole numbers that rise"),
        ({"scale": (0.5, 1)}, "scale two whole numbers that rise"),
        ({"annotators": 0}, "annotators a whole number >= 1, got 0"),
        ({"annotators": 2, "terminal": True}, "annotators 1 with terminal=True, got 2"),
        ({"timeout": 0}, "timeout above 0 seconds, got 0"),
        ({"poll_seconds": 0}, "poll_seconds finite and above 0, got 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            HumanReward(tmp_path / "new", **options)
    assert not (tmp_path / "new").exists()
    with pytest.raises(TypeError, match="Pass the trainer a tokenizer"):
        call(HumanReward(tmp_path), completions=[[1], [2], [3]])


def read(terminal):
    try:
        return os.read(terminal, 4096)
    except OSError:  # Linux says so when the other end is closed
        return b""


class Terminal:
    """One in the place of standard input and output, where keys are pressed when asked for."""

    def __init__(self, typed, monkeypatch):
        self.shown, self._keys = b"", iter(typed)
        self._master, slave = pty.openpty()
        self._files = [os.fdopen(os.dup(slave), mode) for mode in ("r", "w")]
        os.close(slave)
        for name, file in zip(("stdin", "stdout"), self._files, strict=True):
            monkeypatch.setattr(sys, name, file)
        monkeypatch.setenv("TERM", "xterm")
        self._person = threading.Thread(target=self._press, daemon=True)
        self._person.start()

    def _press(self):
        while data := read(self._master):
            is_new = (self.shown + data).count(b"q(uit)?") > self.shown.count(b"q(uit)?")
            self.shown += data
            if is_new:
                os.write(self._master, next(self._keys, "q").encode())  # asked too often: leave

    def close(self):
        """What was shown."""
        for file in self._files:
            file.close()
        self._person.join(30)
        assert not self._person.is_alive()
        os.close(self._master)
        return self.shown.decode()


def test_in_this_terminal_a_key_is_an_answer(tmp_path, monkeypatch):
    pytest.importorskip("rich")
    with monkeypatch.context() as patch:  # 7 is asked for again
        terminal = Terminal(["1", "5", "u", "7", "4", "s"], patch)
        reward = HumanReward(tmp_path, terminal=True)
        found = reward(
            prompts=["p"] * 3, completions=["one", "two\x1b[2J", "three"],
            trainer_state=SimpleNamespace(global_step=0),
        )  # fmt: skip
        shown = terminal.close()
    assert found == [-1.0, 0.5, None]
    assert "\x1b[2J" not in shown and "␛[2J" in shown  # a completion does not steer the terminal
    rows = lines(tmp_path / "ratings.jsonl")
    assert [row.get("rating", "retracted") for row in rows] == [1, 5, "retracted", 4, None]


def test_a_terminal_without_utf_8_shows_escapes():
    class Terminal(io.TextIOWrapper):
        def isatty(self):
            return True

    terminal = Terminal(io.BytesIO(), encoding="ascii")
    Screen(terminal).show("1/1", "日", {"A": "é" * 200, "B": "…"})
    terminal.flush()
    shown = terminal.buffer.getvalue().decode("ascii")
    assert "\\u65e5" in shown and "\\xe9" * 200 in shown and "\\u2026" in shown


def test_ratings_of_a_file_are_found_by_text(tmp_path):
    plain = tmp_path / "plain.jsonl"
    append(
        plain,
        {"prompt": "p", "completion": "one", "rating": 1},
        {"prompt": "p", "completion": "two", "rating": 5},
        {"prompt": "p", "completion": "two", "rating": 2},
        {"prompt": "q", "completion": "two", "rating": 1},
        {"prompt": "q", "completion": "three", "rating": None},
    )
    logged = {}
    reward = FileRatings(plain)
    arguments = {"prompts": PROMPTS, "completions": COMPLETIONS}
    assert reward(**arguments, log_metric=logged.__setitem__) == [-1.0, 0.25, None]
    assert logged == {"human/unrated": 1} and reward.__name__ == "human"
    chats = [[{"role": "assistant", "content": text}] for text in COMPLETIONS]
    assert reward(prompts=PROMPTS, completions=chats) == [-1.0, 0.25, None]
    with pytest.raises(ValueError, match="FileRatings: expected ratings from 1 to 4, got 5"):
        FileRatings(plain, scale=(1, 4))
    append(tmp_path / "skipped.jsonl", {"prompt": "q", "completion": "three", "rating": None})
    with pytest.raises(ValueError, match="at least one rating in .*skipped.jsonl, got none"):
        FileRatings(tmp_path / "skipped.jsonl")


def test_what_was_rated_live_is_a_file_too(tmp_path):
    opinions = {"one": 1, "two": 2, "three": 5}
    with Rater(tmp_path, lambda request: opinions[request["completion"]]):
        found, _ = call(HumanReward(tmp_path, poll_seconds=0.01))
    files = tmp_path / "ratings.jsonl", tmp_path / "requests.jsonl"
    assert FileRatings(*files)(prompts=PROMPTS, completions=COMPLETIONS) == found == [-1, -0.5, 1]
    with pytest.raises(ValueError, match="Ratings without texts need completions="):
        FileRatings(files[0])
    append(files[0], {"id": "strange", "annotator": "ann", "rating": 3})
    with pytest.raises(ValueError, match="got one of strange"):
        FileRatings(*files)


@pytest.mark.parametrize("missing", range(1, 12))
def test_a_line_that_was_cut_short_is_dropped_and_no_other(tmp_path, missing):
    path = tmp_path / "file.jsonl"
    record = {"annotator": "b", "id": "\ud800\u2028ü"}
    with RecordFile(path) as file:
        file.append({"id": "1"}, record)
    whole = path.read_bytes()
    first = whole.index(b"\n") + 1
    path.write_bytes(whole[:-missing])
    tail = Tail(path)
    assert tail() == [{"id": "1"}]
    is_whole = missing == 1  # nothing but its newline
    with RecordFile(path) as file:
        assert path.read_bytes() == (whole if is_whole else whole[:first])
        file.append({"id": "3"})
    assert tail() == ([record, {"id": "3"}] if is_whole else [{"id": "3"}])
    assert tail() == []


def test_a_file_of_another_kind_is_left_alone(tmp_path):
    for content in ("some prose without a newline", '{"id": "1"}\nprose\n', "[1]\n"):
        (tmp_path / "notes").write_text(content)
        with pytest.raises(ValueError, match="expected line . of .* to be a JSON object"):
            RecordFile(tmp_path / "notes")
        assert (tmp_path / "notes").read_text() == content


def test_the_later_answer_stands_until_it_is_taken_back():
    answers = Answers()
    for fields in ({"choice": "a"}, {"choice": "b"}):
        answers.add({"id": "1", "annotator": "ann", **fields})
    answers.add({"id": "1", "annotator": "bob", "choice": "tie"})
    assert answers.of("ann")["1"]["choice"] == "b"
    answers.add({"id": "1", "annotator": "ann", "retracted": True})
    assert answers.of("ann") == {} and list(answers.by_item["1"]) == ["bob"]
    with pytest.raises(ValueError, match="either choices or ratings, got both"):
        answers.add({"id": "1", "annotator": "cyd", "rating": 2})
    too_large = {"rating": 10**400}  # for a float: JSON has it
    for bad in ({}, {"choice": "c"}, {"annotator": None, "choice": "a"}, too_large):
        with pytest.raises(ValueError, match='expected "id", "annotator"'):
            answers.add({"id": "1", "annotator": "ann", **bad})
