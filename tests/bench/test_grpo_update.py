import re

import pytest

from bench import grpo_update

TINY = "--vocab 97 --hidden 16 --head-size 8 --layers 2 --prompts 2 --completions 3 --tokens 5"


@pytest.mark.parametrize("ragged", [[], ["--ragged"]], ids=["equal", "ragged"])
def test_all_four_learn_the_same(capsys, ragged):
    pytest.importorskip("transformers", reason="transformers is not installed")
    grpo_update.main([*TINY.split(), "--prompt-tokens", "8", "--rounds", "2", *ragged])
    printed = capsys.readouterr().out
    number = r" +(\d+\.\d+)"
    row = rf"^.+?{number}{number}x +(\d+|\?) +(?:\d+\.\d+x|\?){' +(-?[0-9.]+)'} *([0-9.e+-]+)$"
    rows = re.findall(row, printed, re.M)
    assert len(rows) == 4
    losses = [float(r[3]) for r in rows]
    assert losses == pytest.approx([losses[0]] * 4, abs=2e-6) and abs(losses[0]) > 1e-3
    differences = [float(r[4]) for r in rows]
    assert max(differences) < 1e-4 and differences[3] == 0
