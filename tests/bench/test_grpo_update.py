import re
import weakref

import pytest
import torch

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


def test_padded_copies_learn_the_same_some_rows_at_a_time():
    pytest.importorskip("transformers", reason="transformers is not installed")
    options = [*TINY.split(), "--prompt-tokens", "8", "--ragged"]
    gradients = []
    for rows in ([], ["--rows", "4"]):
        given = grpo_update.parser().parse_args([*options, *rows])
        prompts, completions = grpo_update.tokens(given)
        count = sum(len(c) for group in completions for c in group)
        advantages, old = torch.linspace(-1, 1, count), torch.full((count,), -4.5)
        for name in grpo_update.PADDED:
            model, update = grpo_update.padded(name, given, prompts, completions, advantages, old)
            gradients.append([update(), *(p.grad for p in model.parameters())])
    for whole, parts in zip(gradients[:3], gradients[3:], strict=True):
        for a, b in zip(whole, parts, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_what_does_not_fit_is_listed_and_the_others_go_on(capsys):
    options = grpo_update.parser().parse_args(["--rounds", "2"])
    held, left = [], []

    def too_large():
        large = torch.zeros(1000)
        held.append(weakref.ref(large))
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")

    def fits():
        left.append(any(x() is not None for x in held))
        loss = model.weight.square().sum()
        loss.backward()
        return loss.detach()

    model = torch.nn.Linear(2, 3, bias=False)
    updates = {grpo_update.ALL_LOGITS: (model, too_large), grpo_update.PACKED: (model, fits)}
    grpo_update.show(grpo_update.measure(updates, options), options)
    printed = capsys.readouterr().out
    assert re.search(r"all logits +CUDA out of memory$", printed, re.M)
    assert re.search(rf"{grpo_update.PACKED} +\d+\.\d+ +1\.00x", printed)
    assert len(left) == 4 and not any(left)
