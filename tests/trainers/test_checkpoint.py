"""Checkpoints: bitwise resumption, whole or not at all, and errors that change nothing."""

import json
import shutil

import pytest
import torch

from fastrl.trainers import load_model

RUNS = [
    ("policy_gradient", {"baseline": "running_mean", "kl_coef": 0.1}),
    ("policy_gradient", {"baseline": "rloo", "weight_decay": 0.01}),
    ("actor_critic", {"advantage": "gae", "entropy_coef": 0.01, "eos_token_id": 6}),
]
FILES = [
    "config.json",
    "model.safetensors",
    "reference.safetensors",
    "trainer.json",
    "trainer.safetensors",
]


def noisy(completion_ids, **_):
    """A reward function with random numbers of its own."""
    return [[token / 8 + float(torch.rand(())) for token in ids] for ids in completion_ids]


def weights_of(trainer):
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


def without_times(records):
    return [{k: v for k, v in r.items() if "time" not in k and "second" not in k} for r in records]


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("kind, config", RUNS)
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(make_trainer, tmp_path, kind, config):
    options = {"reward_functions": noisy, "max_steps": 7, **config}
    torch.manual_seed(9)
    whole = make_trainer(kind, **options)
    records = whole.train()

    torch.manual_seed(9)
    first = make_trainer(kind, **options)
    records_before = first.train(max_steps=3)
    first.save(tmp_path / "run")
    torch.manual_seed(1234)
    second = make_trainer(kind, **options)
    with torch.no_grad():  # what it starts from does not matter, its reference included
        for parameter in [*second.model.parameters(), *second.reference.parameters()]:
            parameter.fill_(0.5)
    assert second.resume(tmp_path / "run") is second
    records_after = second.train()

    assert without_times(records_before + records_after) == without_times(records)
    assert torch.equal(weights_of(second), weights_of(whole))
    prompts = whole.dataset.dataset
    assert second.evaluate(prompts) == whole.evaluate(prompts)


def test_train_saves_when_it_is_due(make_trainer, tmp_path):
    steps = []

    def on_step(record):
        path = tmp_path / "run" / "checkpoint" / "trainer.json"
        steps.append(json.loads(path.read_text())["step"] if path.exists() else None)

    trainer = make_trainer(output_dir=tmp_path / "run", save_every=2, max_steps=5)
    trainer.train(on_step=on_step)
    assert steps == [None, None, 2, 2, 4]  # as it stood before each step's own
    on_step({})
    assert steps[-1] == 5


def test_a_checkpoint_is_safetensors_and_json_alone(make_trainer, tmp_path):
    make_trainer().save(tmp_path / "run")
    assert sorted(contents(tmp_path / "run")) == FILES
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("kind, config", RUNS[1:])
def test_load_model(make_trainer, tmp_path, kind, config):
    trainer = make_trainer(kind, **config)
    trainer.train(max_steps=2)
    trainer.save(tmp_path / "run")
    model = load_model(tmp_path / "run")
    token_ids = torch.tensor([[1, 2, 3]])
    assert torch.equal(model(token_ids)[0], trainer.model(token_ids)[0])


def assert_refused(trainer, folder, message):
    before, step = weights_of(trainer).clone(), trainer.step
    state = torch.get_rng_state()
    with pytest.raises(ValueError, match=message):
        trainer.resume(folder)
    assert torch.equal(weights_of(trainer), before) and trainer.step == step
    assert torch.equal(torch.get_rng_state(), state)
    assert not trainer.optimizer.state_dict()["state"]


@pytest.mark.parametrize("keep", [0, 0.5, 0.99])  # nothing, the header at best, nearly all
@pytest.mark.parametrize("name", FILES)
def test_a_file_cut_short_is_named_and_changes_nothing(make_trainer, tmp_path, name, keep):
    trainer = make_trainer()
    trainer.train(max_steps=1)
    trainer.save(tmp_path / "run")
    path = tmp_path / "run" / name
    data = path.read_bytes()
    path.write_bytes(data[: int(keep * (len(data) - 2))])
    assert_refused(make_trainer(), tmp_path / "run", f"{name} of a complete checkpoint, got .*")


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(make_trainer, tmp_path, name):
    make_trainer().save(tmp_path / "run")
    (tmp_path / "run" / name).unlink()
    assert_refused(make_trainer(), tmp_path / "run", f"{name} of a complete checkpoint, got .*")


def test_no_checkpoint_at_all(make_trainer, tmp_path):
    assert_refused(make_trainer(), tmp_path / "nothing", "nothing/trainer.json of a complete")
    with pytest.raises(ValueError, match="nothing/config.json of a complete"):
        load_model(tmp_path / "nothing")


@pytest.mark.parametrize(
    "other, message",
    [
        ({"kind": "actor_critic"}, "expected trainer 'PolicyGradientTrainer' .*got 'ActorCritic"),
        ({"seed": 1}, "expected config seed 0 .*got 1"),
        ({"gamma": 0.5}, "expected config gamma 1.0 .*got 0.5"),
        ({"dataset": [[1]]}, "expected dataset size 3 .*got 1"),
    ],
)
def test_the_checkpoint_of_another_run_is_refused(make_trainer, tmp_path, other, message):
    make_trainer().save(tmp_path / "run")
    assert_refused(make_trainer(**other), tmp_path / "run", message)


def test_another_model_is_refused(make_trainer, tmp_path):
    from fastrl.models import LSTMLanguageModel

    make_trainer().save(tmp_path / "run")
    other = make_trainer(model=LSTMLanguageModel(8, 8, 16, 1))
    assert_refused(other, tmp_path / "run", "expected model .*'hidden_dim': 24.*'hidden_dim': 16")
    # Documents that agree do not vouch for the tensors.
    make_trainer(model=LSTMLanguageModel(8, 8, 16, 1)).save(tmp_path / "other")
    weights = "model.safetensors"
    shutil.copy(tmp_path / "other" / weights, tmp_path / "run" / weights)
    assert_refused(
        make_trainer(), tmp_path / "run", r"lm_head.weight .*\(8, 24\) in .*got .*\(8, 16\)"
    )


def test_other_limits_may_be_given_to_a_resumed_run(make_trainer, tmp_path):
    make_trainer(max_steps=1).save(tmp_path / "run")
    trainer = make_trainer(max_steps=2, save_every=1, max_bad_steps=2, output_dir=tmp_path / "new")
    assert len(trainer.resume(tmp_path / "run").train()) == 2


def test_a_failing_save_leaves_the_last_checkpoint(make_trainer, tmp_path, monkeypatch):
    import safetensors.torch

    trainer = make_trainer()
    trainer.train(max_steps=1)
    trainer.save(tmp_path / "run")
    good = contents(tmp_path / "run")
    write = safetensors.torch.save_file

    def full(tensors, path, **options):
        if path.name == "trainer.safetensors":
            path.write_bytes(b"half")
            raise OSError("No space left on device")
        write(tensors, path, **options)

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    trainer.train(max_steps=2)
    with pytest.raises(OSError, match="No space left"):
        trainer.save(tmp_path / "run")
    assert contents(tmp_path / "run") == good
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    monkeypatch.undo()
    trainer.save(tmp_path / "run")
    assert make_trainer().resume(tmp_path / "run").step == 2


def test_a_save_killed_between_its_renames_loses_nothing(make_trainer, tmp_path):
    trainer = make_trainer(output_dir=tmp_path, max_steps=1)
    trainer.train()
    folder, previous = tmp_path / "checkpoint", tmp_path / ".checkpoint.previous"
    good = contents(folder)
    shutil.copytree(folder, tmp_path / ".checkpoint.partial")
    folder.rename(previous)
    assert_refused(make_trainer(), folder, "interrupted: rename .*previous to .*checkpoint")
    with pytest.raises(ValueError, match="expected output_dir without a checkpoint"):
        make_trainer(output_dir=tmp_path).train()
    assert contents(previous) == good

    trainer.train(max_steps=2)  # the same run goes on, and puts its folder in order
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]
    assert make_trainer(output_dir=tmp_path).resume(folder).step == 2


def test_nothing_that_is_not_ours_is_overwritten(make_trainer, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("...")
    (tmp_path / "file").write_text("...")
    trainer = make_trainer()
    for name in ("thesis", "file"):
        with pytest.raises(ValueError, match=f"{name} to be a checkpoint or not to exist"):
            trainer.save(tmp_path / name)
    assert contents(tmp_path / "thesis") == {"chapter.tex": b"..."}

    make_trainer(output_dir=tmp_path, max_steps=1).train()
    good = contents(tmp_path / "checkpoint")
    with pytest.raises(ValueError, match="expected output_dir without a checkpoint, got"):
        make_trainer(output_dir=tmp_path).train()
    assert contents(tmp_path / "checkpoint") == good
    trainer = make_trainer(output_dir=tmp_path, max_steps=2).resume(tmp_path / "checkpoint")
    assert len(trainer.train()) == 1
