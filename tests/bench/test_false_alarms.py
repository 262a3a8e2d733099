"""The command that measures the monitor's errors: its intervals, and that it runs."""

import re
import sys

import pytest

from bench import false_alarms


def test_the_binomial_interval():
    """5 of 100 is in every table; the ends are where 0 and all have a chance of 2.5 %."""
    assert false_alarms.interval(5, 100) == pytest.approx((0.016432, 0.112835), abs=1e-6)
    assert false_alarms.interval(0, 100) == pytest.approx((0, 1 - 0.025**0.01))
    assert false_alarms.interval(100, 100) == pytest.approx((0.025**0.01, 1))


def test_the_command_counts_honest_and_gamed_streams(monkeypatch, capsys):
    arguments = ["--streams", "2", "--evaluations", "16", "--prompts", "48"]
    monkeypatch.setattr(sys, "argv", ["false_alarms", *arguments])
    false_alarms.main()
    printed = capsys.readouterr().out
    assert len(re.findall(r"^honest .* 0 of 2 ", printed, re.MULTILINE)) == 10
    assert len(re.findall(r"^gamed .* 2 of 2 .* when: median", printed, re.MULTILINE)) == 3
    assert "all honest:     0 of 20" in printed
