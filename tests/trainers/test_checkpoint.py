"""Checkpoints: bitwise resumption, whole or not at all, and errors that change nothing."""

import errno
import json
import random
import shutil
import warnings

import numpy as np
import pytest
import safetensors.torch
import torch
from compared_runs import Counting, contents, noise, seed_all, weights_of, without_times

from fastrl.models import ActorCritic, LSTMLanguageModel
from fastrl.trainers import checkpoint, load_model

RUNS = [
    ("policy_gradient", {"baseline": "running_mean", "kl_coef": 0.1, "kl_target": 0.01}),
    ("policy_gradient", {"algorithm": "grpo", "weight_decay": 0.01, "kl_every": 0}),
    ("policy_gradient", {"algorithm": "rloo", "lr_schedule": "cosine", "warmup_steps": 4}),
    ("actor_critic", {"advantage": "gae", "entropy_coef": 0.01, "eos_token_id": 6}),
    ("actor_critic", {"algorithm": "ppo", "epochs": 2, "minibatches": 3, "entropy_target": 1.0}),
    ("actor_critic", {"algorithm": "vtrace", "replay_size": 3, "replay_per_step": 2}),
]
FILES = [
    "config.json",
    "model.safetensors",
    "reference.safetensors",
    "state.json",
    "state.safetensors",
    "trainer.json",
]


def noisy(completion_ids, **_):
    shared = noise()
    return [[token / 8 + shared for token in ids] for ids in completion_ids]


def counting():
    return Counting(lambda ids, calls: float(sum(ids) % (calls + 1)))


@pytest.mark.parametrize("kind, config", RUNS)
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(make_trainer, tmp_path, kind, config):
    def make():
        return make_trainer(kind, [noisy, counting()], max_steps=7, **config)

    seed_all(9)
    whole = make()
    records = whole.train()

    seed_all(9)
    first = make()
    records_before = first.train(max_steps=3)
    first.save(tmp_path / "run")
    seed_all(1234)
    second = make()
    reference = [] if second.reference is None else second.reference.parameters()
    with torch.no_grad():  # what it starts from does not matter, its reference included
        for parameter in [*second.model.parameters(), *reference]:
            parameter.fill_(0.5)
    assert second.resume(tmp_path / "run") is second
    records_after = second.train()

    # As text: NaN stands where a figure does not exist.
    assert str(without_times(records_before + records_after)) == str(without_times(records))
    assert torch.equal(weights_of(second), weights_of(whole))
    whole.save(tmp_path / "whole")
    second.save(tmp_path / "second")
    assert contents(tmp_path / "second") == contents(tmp_path / "whole")


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
    """What the library reads from it is what the trainer holds."""
    trainer = make_trainer()
    trainer.train(max_steps=1)
    trainer.save(tmp_path / "run")
    assert sorted(contents(tmp_path / "run")) == FILES
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    state = safetensors.torch.load_file(tmp_path / "run" / "state.safetensors")
    for name, weight in trainer.model.named_parameters():
        for slot, moment in trainer.optimizer.state[weight].items():
            assert torch.equal(state[f"optimizer/moments/{name}/{slot}"], moment)
    assert torch.equal(state["random/torch"], torch.get_rng_state())
    reference = safetensors.torch.load_file(tmp_path / "run" / "reference.safetensors")
    for name, weight in trainer.reference.state_dict().items():
        assert torch.equal(reference[name], weight)


def test_without_a_reference_none_is_written(make_trainer, tmp_path):
    make_trainer(kl_every=0).save(tmp_path / "run")
    assert sorted(contents(tmp_path / "run")) == [n for n in FILES if "reference" not in n]


@pytest.mark.parametrize("kind", ["policy_gradient", "actor_critic"])
def test_load_model(make_trainer, tmp_path, kind):
    trainer = make_trainer(kind)
    trainer.train(max_steps=2)
    trainer.save(tmp_path / "run")
    model = load_model(tmp_path / "run")
    token_ids = torch.tensor([[1, 2, 3]])
    for ours, theirs in zip(model(token_ids)[:2], trainer.model(token_ids)[:2], strict=True):
        assert str(ours) == str(theirs)
    for name, weight in trainer.model.state_dict().items():
        assert torch.equal(model.state_dict()[name], weight)


def test_frozen_weights_are_left_alone(make_trainer, tmp_path):
    """Only what is trained has moments and comes back; the rest is the model's own."""

    def make():
        torch.manual_seed(0)
        model = LSTMLanguageModel(8, 8, 24, 1)
        model.embedding.requires_grad_(False)
        return make_trainer(model=model, max_steps=5)

    whole, first, second = make(), make(), make()
    whole.train()
    first.train(max_steps=2)
    first.save(tmp_path / "run")
    second.resume(tmp_path / "run").train()
    assert torch.equal(weights_of(second), weights_of(whole))
    names = safetensors.torch.load_file(tmp_path / "run" / "state.safetensors")
    assert not [name for name in names if "embedding" in name]
    trained = make_trainer(model=LSTMLanguageModel(8, 8, 24, 1))
    assert_refused(trained, tmp_path / "run", "expected 6 weights .* to be trained .* got 7")


def assert_refused(trainer, folder, message):
    before, step = weights_of(trainer).clone(), trainer.step
    state = torch.get_rng_state(), random.getstate(), str(np.random.get_state())
    with pytest.raises(ValueError, match=message):
        trainer.resume(folder)
    assert torch.equal(weights_of(trainer), before) and trainer.step == step
    assert torch.equal(torch.get_rng_state(), state[0])
    assert (random.getstate(), str(np.random.get_state())) == state[1:]
    assert not trainer.optimizer.state_dict()["state"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A good checkpoint, to be copied and damaged."""
    return tmp_path_factory.mktemp("saved") / "run"


@pytest.fixture
def damaged(make_trainer, saved, tmp_path):
    if not saved.exists():
        trainer = make_trainer()
        trainer.train(max_steps=1)
        trainer.save(saved)
    return shutil.copytree(saved, tmp_path / "run")


@pytest.mark.parametrize("keep", [0, 0.5, 0.99])  # nothing, the header at best, nearly all
@pytest.mark.parametrize("name", FILES)
def test_a_file_cut_short_is_named_and_changes_nothing(make_trainer, damaged, name, keep):
    data = (damaged / name).read_bytes()
    (damaged / name).write_bytes(data[: int(keep * (len(data) - 2))])
    assert_refused(make_trainer(), damaged, f"{name} of a complete checkpoint, got .*")


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(make_trainer, damaged, name):
    (damaged / name).unlink()
    assert_refused(make_trainer(), damaged, f"{name} of a complete checkpoint, got .*")


@pytest.mark.parametrize("name", ["state.json", "state.safetensors", "reference.safetensors"])
def test_a_file_of_the_right_length_with_other_bytes(make_trainer, damaged, name):
    path = damaged / name
    path.write_bytes(b" " * path.stat().st_size)
    assert_refused(make_trainer(), damaged, f"{name} of a complete checkpoint, got .*")


def test_no_checkpoint_at_all(make_trainer, tmp_path):
    assert_refused(make_trainer(), tmp_path / "nothing", "nothing/trainer.json of a complete")
    with pytest.raises(ValueError, match="nothing/trainer.json of a complete"):
        load_model(tmp_path / "nothing")


@pytest.mark.parametrize(
    "other, message",
    [
        ({"kind": "actor_critic"}, "expected trainer 'PolicyGradientTrainer' .*got 'ActorCritic"),
        ({"seed": 1}, "expected config seed 0 .*got 1"),
        ({"gamma": 0.5}, "expected config gamma 1.0 .*got 0.5"),
        ({"reward_weights": [2.0]}, r"expected config reward_weights None .*got \[2.0\]"),
        ({"dataset": [[1]]}, "expected dataset size 3 .*got 1"),
        ({"reward_functions": counting()}, r"expected the state .*functions \['Counting'\]"),
        ({"kl_every": 0}, "expected config kl_every 1 .*got 0"),
    ],
)
def test_the_checkpoint_of_another_run_is_refused(make_trainer, damaged, other, message):
    assert_refused(make_trainer(**other), damaged, message)


def test_other_prompts_of_the_same_number_are_said(make_trainer, tmp_path):
    first = make_trainer(dataset=[[1], {"prompt": torch.tensor([2]), "x": 1}])
    first.save(tmp_path / "run")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make_trainer(dataset=[{"prompt": [1]}, {"prompt": [2], "x": 2}]).resume(tmp_path / "run")
    other = make_trainer(dataset=[[1], [3]])
    said = "expected the prompts that the run in .*, got others"
    with pytest.warns(RuntimeWarning, match=said) as warned:
        other.resume(tmp_path / "run")
    assert warned[0].filename == __file__
    path = tmp_path / "run" / "trainer.json"  # as a version before would have written it
    description = json.loads(path.read_text())
    del description["prompts_digest"]
    path.write_text(json.dumps(description))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        other.resume(tmp_path / "run")


def test_prompts_that_are_drawn_are_the_same(make_trainer, tmp_path):
    class Drawn:
        def __len__(self):
            return 4

        def __getitem__(self, index):
            return [random.randrange(4), int(torch.randint(4, ()))]

    first = make_trainer(dataset=Drawn())
    random.seed(0)
    expected = random.random()
    random.seed(0)
    first.save(tmp_path / "run")
    assert random.random() == expected
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make_trainer(dataset=Drawn()).resume(tmp_path / "run")


def test_what_nothing_reads_is_not_compared(make_trainer, damaged):
    """Versions before took any value there, which none can be given now."""
    path = damaged / "trainer.json"
    description = json.loads(path.read_text())
    description["config"] |= {"clip_high": 0.5, "baseline_decay": 0.5, "importance_cap": 9.0}
    path.write_text(json.dumps(description))
    assert make_trainer().resume(damaged).step == 1
    description["config"]["temperature"] = 0.5
    path.write_text(json.dumps(description))
    assert_refused(make_trainer(), damaged, "expected config temperature 0.5")


def test_another_format_is_refused(make_trainer, damaged):
    path = damaged / "trainer.json"
    path.write_text(path.read_text().replace("fastrl checkpoint 2", "fastrl checkpoint 1"))
    assert_refused(make_trainer(), damaged, "of format 'fastrl checkpoint 2', got '.* 1'")


def test_another_model_is_refused(make_trainer, damaged, tmp_path):
    other = make_trainer(model=LSTMLanguageModel(8, 8, 16, 1))
    assert_refused(other, damaged, "expected model hidden_dim 24 as in .*got 16. ")
    half = make_trainer(model=LSTMLanguageModel(8, 8, 24, 1).bfloat16())
    assert_refused(half, damaged, "expected embedding.weight torch.bfloat16 .*got torch.float32")
    # Documents that agree do not vouch for the tensors.
    other.train(max_steps=1)
    other.save(tmp_path / "other")
    path = damaged / "trainer.json"
    description = json.loads(path.read_text())
    for name, what in (("state", "optimizer"), ("reference", "lm_head")):
        name = f"{name}.safetensors"
        good = (damaged / name).read_bytes()
        size = shutil.copy(tmp_path / "other" / name, damaged / name).stat().st_size
        files = {**description["files"], name: size}
        path.write_text(json.dumps({**description, "files": files}))
        assert_refused(make_trainer(), damaged, f"expected {what}.*(24|96).* got .*(16|64)")
        (damaged / name).write_bytes(good)


def test_a_state_that_does_not_fit_is_undone(make_trainer, damaged):
    """The trainer has taken over half of it when the other half turns out to be wrong."""
    trainer = make_trainer()
    load = trainer.load_state_dict

    def half(state):
        load(state)
        if state["step"] == 1:
            raise KeyError("the rest")

    trainer.load_state_dict = half
    assert_refused(trainer, damaged, "expected the state in .*state.json to fit .*the rest")


def test_other_limits_may_be_given_to_a_resumed_run(make_trainer, tmp_path):
    make_trainer(max_steps=1).save(tmp_path / "run")
    trainer = make_trainer(max_steps=2, save_every=1, max_bad_steps=2, output_dir=tmp_path / "new")
    assert len(trainer.resume(tmp_path / "run").train()) == 2


def no_room(*_):
    raise OSError(errno.ENOSPC, "no room")


def test_a_save_killed_between_its_renames_is_put_right(make_trainer, tmp_path, monkeypatch):
    """Reading finds what stands, and changes nothing on the disk; the next save tidies up."""
    trainer = make_trainer(output_dir=tmp_path, max_steps=1)
    trainer.train()
    folder, previous = tmp_path / "checkpoint", tmp_path / ".checkpoint.previous"
    good = contents(folder)
    shutil.copytree(folder, tmp_path / ".checkpoint.partial")
    (tmp_path / ".checkpoint.partial" / "trainer.json").unlink()
    folder.rename(previous)
    with pytest.raises(ValueError, match="expected output_dir without a checkpoint"):
        make_trainer(output_dir=tmp_path).train()
    second = make_trainer(output_dir=tmp_path).resume(folder)
    assert second.step == 1
    assert torch.equal(load_model(folder).lm_head.weight, trainer.model.lm_head.weight)
    assert contents(previous) == good and not folder.exists()

    with monkeypatch.context() as full:
        full.setattr("fastrl.trainers.checkpoint.write_tensors", no_room)
        with pytest.raises(checkpoint.CheckpointError, match="The last checkpoint, of step 1"):
            second.save(folder)
    assert contents(folder) == good

    folder.rename(previous)
    second.train(max_steps=2)  # the same run goes on, and puts its folder in order
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]
    assert make_trainer(output_dir=tmp_path).resume(folder).step == 2

    shutil.copytree(folder, previous)  # killed behind them
    second.train(max_steps=3)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]
    assert make_trainer(output_dir=tmp_path).resume(folder).step == 3


def test_nothing_that_is_not_ours_is_overwritten(make_trainer, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("...")
    (tmp_path / "file").write_text("...")
    trainer = make_trainer()
    for name in ("thesis", "file"):
        with pytest.raises(ValueError, match=f"{name} to be a checkpoint or not to exist"):
            trainer.save(tmp_path / name)
    assert contents(tmp_path / "thesis") == {"chapter.tex": b"..."}
    trainer.save(tmp_path / "run")
    (tmp_path / "run" / "notes.txt").write_text("...")
    with pytest.raises(ValueError, match="run to be a checkpoint or not to exist"):
        trainer.save(tmp_path / "run")

    make_trainer(output_dir=tmp_path, max_steps=1).train()
    good = contents(tmp_path / "checkpoint")
    with pytest.raises(ValueError, match="expected output_dir without a checkpoint, got"):
        make_trainer(output_dir=tmp_path).train()
    assert contents(tmp_path / "checkpoint") == good
    trainer = make_trainer(output_dir=tmp_path, max_steps=2).resume(tmp_path / "checkpoint")
    assert len(trainer.train()) == 1


def test_a_separate_critic(make_trainer, tmp_path):
    def make():
        torch.manual_seed(0)
        model = ActorCritic(LSTMLanguageModel(8, 8, 24, 1), LSTMLanguageModel(8, 4, 12, 1))
        return make_trainer("actor_critic", model=model, max_steps=4)

    whole, first, second = make(), make(), make()
    whole.train()
    first.train(max_steps=2)
    first.save(tmp_path / "run")
    first.save(tmp_path / "run")  # over one with folders in it
    second.resume(tmp_path / "run").train()
    assert torch.equal(weights_of(second), weights_of(whole))


@pytest.mark.gpu
def test_generators_of_every_gpu_come_back(make_trainer, tmp_path):
    trainer = make_trainer()
    devices = range(torch.cuda.device_count())
    for device in devices:
        torch.rand(1, device=f"cuda:{device}")  # a run without CUDA has no state of it
        with torch.cuda.device(device):
            torch.cuda.manual_seed(device + 5)
    trainer.save(tmp_path / "run")
    expected = [torch.rand(3, device=f"cuda:{device}") for device in devices]
    torch.cuda.manual_seed_all(99)
    make_trainer().resume(tmp_path / "run")
    for device, draws in zip(devices, expected, strict=True):
        assert torch.equal(torch.rand(3, device=f"cuda:{device}"), draws)
