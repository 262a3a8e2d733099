import re

import pytest

from bench import trl_step

TINY = "--vocab 97 --hidden 16 --layers 1 --prompts 2 --completions 2 --tokens 4 --prompt-tokens 6"


def test_a_tiny_run_prints_times_calls_and_the_same_losses(capsys):
    pytest.importorskip(
        "trl", reason="TRL is not installed: `make test` does it, from Python 3.11 on"
    )
    trl_step.main([*TINY.split(), "--steps", "4", "--rounds", "1"])
    printed = capsys.readouterr().out
    timed = re.findall(r"^step (?:with|of) .* \d+\.\d{3} +\d+\.\d{3} +\d+\.\d\dx$", printed, re.M)
    assert len(timed) == 2
    assert re.search(r"our function called, a run +0 +6$", printed, re.M)
    steps = re.findall(r"^ +([1-4]) +(.*)$", printed, re.M)
    assert [int(step) for step, _ in steps] == [1, 2, 3, 4]
    for _, numbers in steps:
        values = [float(x) for x in numbers.split()]
        assert values[0::2] == pytest.approx(values[1::2], rel=1e-3, abs=1e-5)
        assert values[2] > 0.01  # a gradient, so that something was learned from


def test_too_few_steps_to_time():
    with pytest.raises(SystemExit, match="trl_step: expected steps >= 4, got 3"):
        trl_step.main(["--steps", "3"])
