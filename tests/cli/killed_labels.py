"""`fastrl label` in a terminal, killed with SIGKILL; test_label.py starts this, reads its report.

A process that has imported everything forks each attempt: an attempt costs milliseconds.
"""

import json
import os
import pty
import random
import re
import select
import signal
import sys
import termios
import time
from pathlib import Path

from rich import console, panel, table, text  # noqa: F401  # once, and not in every attempt

from fastrl.cli import label
from fastrl.cli.labelling import session  # noqa: F401
from fastrl.cli.recipes import command  # noqa: F401

NUM_KILLS, NUM_ITEMS = 45, 500
MOST_ANSWERS = 10  # before a kill: all of them together are fewer than the items, on any machine
QUESTION = re.compile(r"item-(\d+)(?:(?!item-).)*?(first|second)(?:(?!item-).)*?q\(uit\)\?", re.S)


def start(arguments):
    """A labelling process and the other end of its terminal."""
    pid, terminal = pty.fork()
    if pid:
        return pid, terminal
    status = 98
    try:
        status = label.main(list(map(str, arguments)))
        if not termios.tcgetattr(0)[3] & termios.ICANON:
            status = 99  # the terminal was not given back
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        os._exit(status)


def read(terminal, timeout):
    """What is shown within that time, b"" for nothing, None at the end."""
    if not select.select([terminal], [], [], max(0.0, timeout))[0]:
        return b""
    try:
        return os.read(terminal, 65536) or None
    except OSError:  # Linux says so when the other end is closed
        return None


class Person:
    """Presses keys, and remembers what the program acknowledged by showing the next question."""

    def __init__(self, seed):
        self.draw = random.Random(seed)
        self.events = []  # acknowledged: (item, choice or "retracted")
        self.in_flight = None
        self.shown, self.num_seen = "", 0

    def at_a_new_process(self):
        self.shown, self.num_seen = "", 0

    def sees(self, data):
        """Whether a new question stands there now."""
        self.shown += data.decode(errors="replace")
        questions = QUESTION.findall(self.shown)
        if len(questions) == self.num_seen:
            return False
        assert len(questions) == self.num_seen + 1, "two questions, one answer"
        self.num_seen = len(questions)
        self.acknowledge()
        self.item, self.left = questions[-1]
        return True

    def acknowledge(self):
        if self.in_flight is not None:
            self.events.append(self.in_flight)
            self.in_flight = None

    def key(self):
        standing = [item for item, choice in self.standing().items() if choice != "retracted"]
        key = self.draw.choice("aabbts" + "u" * bool(standing))
        if key == "u":
            self.in_flight = (standing[-1], "retracted")
        else:
            left, right = ("a", "b") if self.left == "first" else ("b", "a")
            choice = {"a": left, "b": right, "t": "tie", "s": "skip"}[key]
            self.in_flight = (self.item, choice)
        return key

    def standing(self):
        """The last event of each item, the latest last."""
        result = {}
        for item, choice in self.events:
            result.pop(item, None)
            result[item] = choice
        return result


def written(path):
    """The events in the file's complete lines."""
    content = path.read_bytes() if path.exists() else b""
    rows = [json.loads(line) for line in content.split(b"\n")[:-1]]
    return [(r["id"], "retracted" if r.get("retracted") else r["choice"]) for r in rows]


def attempt(arguments, person, num_answers, seconds):
    """Label, and die so long after the last of these answers; after the start, if they are none.

    What was shown before death counts. Returns the seconds to the first question, if it came, and
    between two questions, if there were two.
    """
    person.at_a_new_process()
    pid, terminal = start(arguments)
    times = [time.monotonic()]
    end = times[0] + (60 if num_answers else seconds)
    is_alive = True
    while (data := read(terminal, end - time.monotonic() if is_alive else 10)) is not None:
        if is_alive and time.monotonic() >= end:
            os.kill(pid, signal.SIGKILL)
            is_alive = False
        if person.sees(data) and is_alive:
            times.append(time.monotonic())
            if person.num_seen <= num_answers:
                os.write(terminal, person.key().encode())
            if person.num_seen == num_answers:
                end = time.monotonic() + seconds
    os.close(terminal)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert code == -signal.SIGKILL, (code, person.shown)
    to_first = times[1] - times[0] if len(times) > 1 else None
    to_next = (times[-1] - times[1]) / (len(times) - 2) if len(times) > 2 else None
    return to_first, to_next


def kill_at_random_moments(arguments, output):
    """The file's lines are always the acknowledged events, and at most the one in flight more."""
    person, draw = Person(1), random.Random(2)
    report = {"kills": 0, "kept": 0, "lost": 0, "torn": 0, "before_any": 0}
    to_first, to_next = 0.0, 0.0  # seconds, as this machine has them now
    for number in range(NUM_KILLS):
        num_answers = 0 if number % 5 == 4 else draw.randint(1, MOST_ANSWERS)
        seconds = draw.uniform(0, 1.5 * to_next if num_answers else to_first)
        measured = attempt(arguments, person, num_answers, seconds)
        to_first, to_next = measured[0] or to_first, measured[1] or to_next
        found = written(output)
        more = found[len(person.events) :]
        assert found[: len(person.events)] == person.events
        assert more in ([], [person.in_flight]), (more, person.in_flight)
        report["kills"] += 1
        report["before_any"] += person.num_seen == 0
        if person.in_flight is not None:
            report["kept" if more else "lost"] += 1
        if more:
            person.acknowledge()
        person.in_flight = None
        if draw.random() < 0.3:  # a write that a dying machine took a part of
            with open(output, "ab") as file:
                line = json.dumps({"id": "001", "annotator": "ann", "choice": "a"}).encode()
                file.write(line[: draw.randint(1, len(line) - 1)])
            report["torn"] += 1
    report["events"] = len(person.events)
    report["retracted"] = sum(choice == "retracted" for _, choice in person.events)
    status = leave(arguments, b"q")
    assert written(output) == person.events and output.read_bytes().endswith(b"\n")
    return {**report, "status": status}


def leave(arguments, key):
    """The exit status after a key at the first question."""
    pid, terminal = start(arguments)
    shown = b""
    while (data := read(terminal, 10)) is not None:
        if not data:
            os.kill(pid, signal.SIGKILL)
            raise SystemExit(f"no end after {key!r}: {shown!r}")
        if b"q(uit)?" not in shown and b"q(uit)?" in shown + data:
            os.write(terminal, key)
        shown += data
    os.close(terminal)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def main():
    os.environ["TERM"] = "xterm"
    # A shell's background job, such as a test run may be, ignores it, and so do its children.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    root = Path(sys.argv[1])
    pairs, output = root / "pairs.jsonl", root / "judgements.jsonl"
    rows = [
        {"id": f"{i:04d}", "prompt": f"item-{i:04d}", "a": "first", "b": "second"}
        for i in range(NUM_ITEMS)
    ]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = [pairs, "--output", output, "--annotator", "ann"]
    report = kill_at_random_moments(arguments, output)
    report["interrupted"] = leave(arguments, b"\x03")
    report["ended"] = leave(arguments, b"\x04")
    (root / "report.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main()
