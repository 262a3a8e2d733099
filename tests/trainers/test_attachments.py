"""Parts that ride along with a run: when they are called, and what is saved of them."""

import json
import re

import pytest

from fastrl.trainers import StopTraining


class Counter:
    """A part that counts the steps since its run began, and stops it after some."""

    def __init__(self, stop_after=None):
        self.starts, self.count, self.stop_after = 0, 0, stop_after

    def start(self):
        self.starts += 1

    def __call__(self, record):
        self.count += 1
        record["count"] = float(self.count)
        if self.count == self.stop_after:
            raise StopTraining

    def state_dict(self):
        return {"count": self.count}

    def load_state_dict(self, state):
        self.count = state["count"]


def saved(folder):
    return json.loads((folder / "checkpoint" / "state.json").read_text())["trainer"]


def test_a_part_comes_before_the_callbacks_and_the_checkpoint(make_trainer, tmp_path):
    trainer, part, seen = (
        make_trainer(max_steps=4, output_dir=tmp_path, save_every=2),
        Counter(),
        [],
    )
    trainer.attach("counter", part)
    trainer.attach("stateless", lambda record: record.update(more=record["count"] + 1))
    records = trainer.train(on_step=lambda record: seen.append((record["count"], record["more"])))
    assert seen == [(1, 2), (2, 3), (3, 4), (4, 5)]
    assert [record["count"] for record in records] == [1, 2, 3, 4]
    assert part.starts == 1
    trainer.train()  # nothing is left to do
    assert part.starts == 1
    assert saved(tmp_path)["attachments"] == {"counter": {"count": 4}}


def test_a_resumed_part_goes_on(make_trainer, tmp_path):
    first = make_trainer(max_steps=3)
    first.attach("counter", Counter())
    first.train()
    first.save(tmp_path / "run")
    second = make_trainer(max_steps=5)
    second.attach("counter", Counter())
    records = second.resume(tmp_path / "run").train()
    assert [record["count"] for record in records] == [4, 5]


@pytest.mark.parametrize("names", [[], ["other"], ["counter", "other"]])
def test_other_parts_than_the_checkpoints_are_refused(make_trainer, tmp_path, names):
    first = make_trainer(max_steps=1)
    first.attach("counter", Counter())
    first.train()
    first.save(tmp_path / "run")
    second = make_trainer(max_steps=2)
    for name in names:
        second.attach(name, Counter())
    message = f"expected the parts ['counter'] of the checkpoint, got {sorted(names)}"
    with pytest.raises(ValueError, match=re.escape(message)):
        second.resume(tmp_path / "run")
    assert second.step == 0


def test_a_checkpoint_without_parts_resumes_with_them(make_trainer, tmp_path):
    """Such as one that was written before there were any."""
    first = make_trainer(max_steps=2)
    first.train()
    first.save(tmp_path / "run")
    assert "attachments" not in json.loads((tmp_path / "run" / "state.json").read_text())["trainer"]
    second = make_trainer(max_steps=3)
    second.attach("counter", Counter())
    assert [record["count"] for record in second.resume(tmp_path / "run").train()] == [1]


def test_a_part_stops_the_run_and_the_others_hear_of_the_step(make_trainer, tmp_path):
    trainer, seen = make_trainer(max_steps=9, output_dir=tmp_path), []
    trainer.attach("counter", Counter(stop_after=2))
    trainer.attach("behind it", lambda record: seen.append(record["step"]))
    records = trainer.train(on_step=lambda record: seen.append(record["count"]))
    assert seen == [1, 1, 2, 2] and len(records) == 2
    assert saved(tmp_path)["step"] == 2
    resumed = make_trainer(max_steps=3, output_dir=tmp_path)
    resumed.attach("counter", Counter())
    assert len(resumed.resume(tmp_path / "checkpoint").train()) == 1


def test_a_callback_stops_the_run(make_trainer):
    def on_step(record):
        if record["step"] == 3:
            raise StopTraining

    assert len(make_trainer(max_steps=9).train(on_step=on_step)) == 3


def test_a_part_stops_the_run_before_its_first_step(make_trainer):
    class Reluctant(Counter):
        def start(self):
            super().start()
            raise StopTraining

    trainer, reluctant, other = make_trainer(max_steps=9), Reluctant(), Counter()
    trainer.attach("reluctant", reluctant)
    trainer.attach("other", other)
    assert trainer.train() == [] and trainer.step == 0
    assert reluctant.starts == other.starts == 1


def test_what_cannot_be_attached(make_trainer):
    trainer = make_trainer()
    trainer.attach("counter", Counter())
    with pytest.raises(ValueError, match="expected a name that is free, got 'counter'"):
        trainer.attach("counter", Counter())
    with pytest.raises(TypeError, match="expected a part that can be called, got 3"):
        trainer.attach("three", 3)
    with pytest.raises(TypeError, match="expected a name that is a string, got 4"):
        trainer.attach(4, Counter())
