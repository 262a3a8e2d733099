import json
import math
import re
from dataclasses import asdict

import pytest
import torch

from bench import grpo_update, update_table

TINY = "--vocab 97 --hidden 16 --head-size 8 --layers 2 --prompts 2 --completions 3 --tokens 5"


@pytest.mark.parametrize(
    "changes", ["", "--ragged", "--ragged --copies 4"], ids=["equal", "ragged", "4 rows at once"]
)
def test_all_four_learn_the_same(capsys, changes):
    pytest.importorskip("transformers", reason="transformers is not installed")
    sizes = [*TINY.split(), "--prompt-tokens", "8", "--rounds", "2"]
    grpo_update.main([*sizes, *changes.split()])
    printed = capsys.readouterr().out
    number = r" +(\d+\.\d+)"
    row = rf"^.+?{number}{number}x +(\d+|\?) +(?:\d+\.\d+x|\?){' +(-?[0-9.]+)'} *([0-9.e+-]+)$"
    rows = re.findall(row, printed, re.M)
    assert len(rows) == 4
    losses = [float(r[3]) for r in rows]
    assert losses == pytest.approx([losses[0]] * 4, abs=2e-6) and abs(losses[0]) > 1e-3
    differences = [float(r[4]) for r in rows]
    assert max(differences) < 1e-4 and differences[0] == 0


def test_a_way_that_has_no_room_does_not_take_the_others_down(monkeypatch, tmp_path):
    pytest.importorskip("transformers", reason="transformers is not installed")
    log_softmax, path = torch.Tensor.log_softmax, tmp_path / "update.json"

    def in_little_memory(x, dim):
        if x.shape[0] > 3:
            raise torch.OutOfMemoryError("no room")
        return log_softmax(x, dim)

    monkeypatch.setattr(torch.Tensor, "log_softmax", in_little_memory)
    options = [*TINY.split(), "--one-billion", "--layers", "1", "--key-heads", "1"]
    options += ["--prompt-tokens", "4", "--json", str(path), "--rounds", "9", "--seconds", "0"]
    grpo_update.main(options)
    runs = json.loads(path.read_text())["runs"]
    assert [run["reason"] for run in runs.values()] == ["", *2 * ["out of memory"], ""]
    packed, *_, padded = runs.values()
    assert len(packed["seconds"]) == len(padded["seconds"]) == 1
    assert padded["loss"] == pytest.approx(packed["loss"], abs=2e-6)
    assert "out of memory" in "\n".join(update_table.lines(json.loads(path.read_text())))


def test_the_others_are_measured_where_the_packed_one_has_no_room():
    model = torch.nn.Linear(2, 1)

    def too_large():
        raise torch.OutOfMemoryError("no room")

    def fits():
        loss = model.weight.sum()
        loss.backward()
        return loss.detach()

    options = grpo_update.parser().parse_args(["--rounds", "2"])
    updates = {update_table.PACKED: (model, too_large), "padded": (model, fits)}
    *_, runs = grpo_update.measure(updates, options, math.inf)
    assert runs[update_table.PACKED].reason == "out of memory"
    assert len(runs["padded"].seconds) == 2 and runs["padded"].grad_difference is None
    record = grpo_update.describe(options) | {"runs": {n: asdict(r) for n, r in runs.items()}}
    text = "\n".join(update_table.lines(record))
    assert "fastrl, packed                    out of memory" in text and "padded" in text
