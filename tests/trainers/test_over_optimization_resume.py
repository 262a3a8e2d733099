"""A monitor in a run that is interrupted, and beside the random numbers of the run."""

import random
import warnings

import gamed_runs
import pytest
import torch
from compared_runs import Counting, contents, noise, seed_all, weights_of, without_times
from gamed_runs import HELD_OUT, make_run, share, up_to_a_half

from fastrl.trainers import PolicyGradientTrainer
from fastrl.trainers._attachments import Attachments

pytestmark = pytest.mark.filterwarnings("ignore:Reward (falling|stalled)")


def noisy(completion_ids, **_):
    shared = noise()
    return [ids.count(3) / 8 + shared for ids in completion_ids]


@pytest.mark.filterwarnings("ignore:Over-optimisation")  # all of a call share their noise
def test_watching_changes_nothing():
    def run(every=6, is_watched=True):
        trainer, monitor = make_run(noisy, max_steps=6, monitor={"every": every, "alpha": 0.5})
        trainer.scorer = type(trainer.scorer)(
            [noisy, Counting(lambda ids, calls: ids.count(3) / 8 + calls)]
        )
        monitor._weights = [1.0, 1.0]
        if not is_watched:
            trainer.attachments = Attachments()
        seed_all(4)
        records = [
            {k: v for k, v in record.items() if not k.startswith("gold/")}
            for record in without_times(trainer.train())
        ]
        return str(records), weights_of(trainer), torch.rand(3), random.random()

    never = run(is_watched=False)
    for found in (run(1), run(6)):
        assert found[0] == never[0] and found[3] == never[3]
        assert torch.equal(found[1], never[1]) and torch.equal(found[2], never[2])


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
