"""A monitor in a run that is interrupted, and beside the random numbers of the run."""

import random
import warnings

import gamed_runs
import numpy as np
import pytest
import torch
from gamed_runs import HELD_OUT, make_run, share, up_to_a_half

from fastrl.trainers import PolicyGradientTrainer

pytestmark = pytest.mark.filterwarnings("ignore:Reward (falling|stalled)")


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def without_times(records):
    return [{k: v for k, v in r.items() if "time" not in k and "second" not in k} for r in records]


def noisy(completion_ids, **_):
    """Draws from every global generator."""
    noise = random.gauss(0, 1) + np.random.randn() + float(torch.rand(()))
    return [ids.count(3) / 8 + noise for ids in completion_ids]


class Counting:
    """A reward that changes from call to call."""

    def __init__(self):
        self.calls = 0

    def __call__(self, completion_ids, **_):
        self.calls += 1
        return [ids.count(3) / 8 + self.calls for ids in completion_ids]

    def state_dict(self):
        return {"calls": self.calls}

    def load_state_dict(self, state):
        self.calls = state["calls"]


def seed_all(seed):
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def weights_of(trainer):
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


@pytest.mark.filterwarnings("ignore:Over-optimisation")  # all of a call share their noise
def test_watching_changes_nothing():
    def run(every):
        trainer, monitor = make_run(noisy, max_steps=6, monitor={"every": every, "alpha": 0.5})
        trainer.scorer = type(trainer.scorer)([noisy, Counting()])
        monitor._weights = [1.0, 1.0]
        seed_all(4)
        records = [
            {k: v for k, v in record.items() if not k.startswith("gold/")}
            for record in without_times(trainer.train())
        ]
        return str(records), weights_of(trainer), torch.rand(3), random.random()

    often, once = run(1), run(6)
    assert often[0] == once[0] and often[3] == once[3]
    assert torch.equal(often[1], once[1]) and torch.equal(often[2], once[2])


@pytest.mark.parametrize("kl_every", [1, 0])
@pytest.mark.parametrize("stop_at", [4, 18])
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(tmp_path, kl_every, stop_at):
    """Before and after an alarm; without kl_every the monitor keeps a reference of its own."""
    options = {"max_steps": 24, "kl_every": kl_every}
    options["monitor"] = {"action": "lower" if kl_every else "warn", "kl_budget": 9.0}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        whole, watched = make_run(up_to_a_half, **options)
        records = whole.train()
        first, _ = make_run(up_to_a_half, **options)
        before = first.train(max_steps=stop_at)
        first.save(tmp_path / "run")
        second, watching = make_run(up_to_a_half, **options)
        with torch.no_grad():
            for reference in (second.reference, watching._own_reference):
                for parameter in [] if reference is None else reference.parameters():
                    parameter.fill_(0.5)
        after = second.resume(tmp_path / "run").train()
    assert any(record.get("gold/alarm") for record in records)
    assert str(without_times(before + after)) == str(without_times(records))
    assert watching.evaluations == watched.evaluations
    whole.save(tmp_path / "whole")
    second.save(tmp_path / "second")
    assert contents(tmp_path / "second") == contents(tmp_path / "whole")


def test_a_resumed_monitor_has_to_be_the_same(tmp_path):
    first, _ = make_run(share, max_steps=3)
    first.train()
    first.save(tmp_path / "run")
    for change, message in [
        ({"every": 2}, "expected every 3 as in the checkpoint, got 2"),
        ({"alpha": 0.01}, "expected alpha 0.05 as in the checkpoint, got 0.01"),
    ]:
        second, _ = make_run(share, monitor=change)
        with pytest.raises(ValueError, match=message):
            second.resume(tmp_path / "run")
        assert second.step == 0


def test_held_out_prompts_have_to_be_the_same_ones(tmp_path, monkeypatch):
    """As many, but others: their rewards cannot be compared with those before."""
    first, _ = make_run(share, max_steps=3)
    first.train()
    first.save(tmp_path / "run")
    monkeypatch.setattr(gamed_runs, "HELD_OUT", HELD_OUT[1:] + HELD_OUT[:1])
    second, _ = make_run(share)
    with pytest.raises(ValueError, match="expected held-out prompts with SHA-256 '[0-9a-f]{64}'"):
        second.resume(tmp_path / "run")


@pytest.mark.filterwarnings("ignore:KL budget")
def test_a_stopped_run_makes_no_further_step(tmp_path):
    options = {"monitor": {"action": "stop", "kl_budget": 1e-9}, "output_dir": tmp_path}
    trainer, _ = make_run(share, **options)
    assert len(trainer.train()) == 3 and trainer.train() == []
    again, monitor = make_run(share, **options)
    assert again.resume(tmp_path / "checkpoint").train() == []
    assert again.step == 3 and len(monitor.evaluations) == 2
    warned, _ = make_run(share, **options | {"monitor": {"kl_budget": 1e-9}}, max_steps=4)
    assert len(warned.resume(tmp_path / "checkpoint").train()) == 1


def test_a_checkpoint_without_a_monitor_resumes_with_one(tmp_path):
    plain, _ = make_run(share)
    plain = PolicyGradientTrainer(plain.model, share, plain.dataset.dataset, plain.config)
    plain.train(max_steps=4)
    plain.save(tmp_path / "run")
    trainer, monitor = make_run(share, max_steps=9)
    trainer.resume(tmp_path / "run").train()
    assert [evaluation["step"] for evaluation in monitor.evaluations] == [4, 6, 9]


def test_the_best_checkpoint_of_another_run_is_not_overwritten(tmp_path):
    first, _ = make_run(share, max_steps=1, output_dir=tmp_path)
    first.save(tmp_path / "best")
    before = contents(tmp_path / "best")
    second, _ = make_run(share, max_steps=1, output_dir=tmp_path)
    with pytest.raises(ValueError, match="expected output_dir without a checkpoint, got .*best"):
        second.train()
    assert contents(tmp_path / "best") == before
