"""When numbers go bad: each clause of the rule."""

import math
import warnings
from types import SimpleNamespace

import pytest
import torch

from fastrl import reference
from fastrl.models import LSTMLanguageModel
from fastrl.trainers import TrainingDivergedError

EOS = 7  # of 8 tokens
KINDS = ["policy_gradient", "actor_critic"]


def weights_of(trainer):
    return [p.detach().clone() for p in trainer.model.parameters()]


def moments_of(trainer):
    states = trainer.optimizer.state_dict()["state"].values()
    return [tensor.clone() for state in states for tensor in state.values()]


def assert_equal(one, other):
    assert len(one) == len(other)
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def spoiled(rewards, bad, value):
    """Rewards where some completions' are replaced."""

    def reward(completion_ids, **_):
        entries = rewards(completion_ids)
        return [
            value(ids) if i in bad else e
            for i, (ids, e) in enumerate(zip(completion_ids, entries, strict=True))
        ]

    reward.__name__ = "reward"
    return reward


def by_token(completion_ids):
    return [[token / 8 for token in ids] for ids in completion_ids]


@pytest.mark.parametrize(
    "value",
    [
        lambda ids: math.nan,
        lambda ids: -math.inf,
        lambda ids: [0.0] * (len(ids) - 1) + [math.nan],  # one token of many
        lambda ids: [3e38] * len(ids),  # finite, but no sum of them is
    ],
)
@pytest.mark.parametrize(
    "kind, config",
    [
        ("policy_gradient", {}),
        ("policy_gradient", {"baseline": "rloo"}),
        ("policy_gradient", {"baseline": "running_mean"}),
        ("actor_critic", {}),
        ("policy_gradient", {"algorithm": "grpo", "epochs": 2}),
        ("policy_gradient", {"algorithm": "gspo"}),
        ("actor_critic", {"advantage": "gae", "whiten_advantages": True}),
        ("actor_critic", {"algorithm": "ppo", "minibatches": 2}),
        ("actor_critic", {"algorithm": "vtrace", "replay_size": 2}),
    ],
)
def test_a_bad_reward_masks_its_own_completion_and_is_counted(make_trainer, kind, config, value):
    """As if nobody had an opinion on it; the others are learned from."""
    bad, none = (
        make_trainer(kind, spoiled(by_token, {1, 6}, v), max_steps=3, **config)
        for v in (value, lambda ids: None)
    )
    before = weights_of(bad)
    records, others = bad.train(), none.train()
    assert [r["rewards/bad"] for r in records] == [2, 2, 2]
    assert [r["rewards/none"] for r in others] == [2, 2, 2]
    assert [r["loss"] for r in records] == [r["loss"] for r in others]
    assert [r["reward"] for r in records] == [r["reward"] for r in others]
    assert records[-1]["skipped_updates"] == 0
    assert_equal(weights_of(bad), weights_of(none))
    assert not any(torch.equal(a, b) for a, b in zip(before, weights_of(bad), strict=True))


def failing_ops(when, factor=math.nan):
    """Reference ops whose losses are spoiled in the updates that `when` names."""
    calls = iter(range(1000))
    names = {name: getattr(reference, name) for name in reference.__all__}

    def linear_token_loss(*arguments, **options):
        loss, *rest = reference.linear_token_loss(*arguments, **options)
        return loss * factor if next(calls) in when else loss, *rest

    return SimpleNamespace(**names | {"linear_token_loss": linear_token_loss})


@pytest.mark.parametrize("factor", [math.nan, math.inf])
@pytest.mark.parametrize("kind", KINDS)
def test_a_bad_loss_skips_the_update_and_is_counted(make_trainer, kind, factor):
    trainer = make_trainer(kind, ops=failing_ops({1, 2}, factor))
    trainer.train(max_steps=1)
    weights, moments = weights_of(trainer), moments_of(trainer)
    records = trainer.train(max_steps=3)
    assert [r["bad_steps"] for r in records] == [1, 2]
    assert not math.isfinite(records[0]["loss"])
    assert_equal(weights_of(trainer), weights)
    assert_equal(moments_of(trainer), moments)
    record = trainer.train(max_steps=4)[0]
    assert record["bad_steps"] == 0 and record["skipped_updates"] == 2
    assert math.isfinite(record["loss"]) and math.isfinite(record["grad_norm"])
    assert not torch.equal(weights_of(trainer)[0], weights[0])


@pytest.mark.parametrize("kind", KINDS)
def test_a_bad_gradient_of_a_good_loss_skips_the_update(make_trainer, kind):
    trainer = make_trainer(kind)
    weights = weights_of(trainer)
    hook = trainer.policy.lm_head.weight.register_hook(lambda grad: grad * math.inf)
    record = trainer.train(max_steps=1)[0]
    assert math.isfinite(record["loss"]) and not math.isfinite(record["grad_norm"])
    assert record["skipped_updates"] == 1
    assert_equal(weights_of(trainer), weights)
    hook.remove()
    assert trainer.train(max_steps=2)[0]["skipped_updates"] == 1


@pytest.mark.parametrize("kind", KINDS)
def test_training_stops_after_max_bad_steps_in_a_row(make_trainer, kind):
    seen = []
    bad_steps = {1, 2, 4, 5, 6, 7}  # two, a good one, and then too many
    trainer = make_trainer(kind, ops=failing_ops(bad_steps), max_bad_steps=3)
    with pytest.raises(
        TrainingDivergedError, match=r"no update in 3 steps in a row, the last one \(step 7\).*nan"
    ):
        trainer.train(on_step=seen.append)
    assert [r["bad_steps"] for r in seen] == [0, 1, 2, 0, 1, 2, 3]


@pytest.mark.parametrize("reward", [math.nan, None])
def test_a_step_without_a_usable_completion_is_a_bad_step(make_trainer, reward):
    trainer = make_trainer(reward_functions=lambda completion_ids, **_: [reward] * 12)
    trainer.train(max_steps=2)
    weights = weights_of(trainer)
    with pytest.raises(TrainingDivergedError, match="in 5 steps .*no completion with a usable"):
        trainer.train()
    assert_equal(weights_of(trainer), weights)


def test_momentum_does_not_move_weights_in_a_bad_step(make_trainer):
    rewards = iter([1.0, math.nan])

    def reward(completion_ids, **_):
        return [next(rewards) if i == 0 else math.nan for i in range(len(completion_ids))]

    trainer = make_trainer(reward_functions=reward)
    trainer.train(max_steps=1)
    weights = weights_of(trainer)
    assert trainer.train(max_steps=2)[0]["skipped_updates"] == 1
    assert_equal(weights_of(trainer), weights)


@pytest.mark.parametrize("kind", KINDS)
def test_broken_weights_stop_training_with_the_same_error(make_trainer, kind):
    trainer = make_trainer(kind, max_bad_steps=2)
    with torch.no_grad():
        trainer.policy.lm_head.weight[0] = math.nan
    with pytest.raises(TrainingDivergedError, match="no update in 2 steps"):
        trainer.train()


@pytest.mark.parametrize("where", ["weight", "moment"])
def test_no_checkpoint_of_a_bad_state_and_the_last_good_one_stays(make_trainer, tmp_path, where):
    trainer = make_trainer(output_dir=tmp_path, save_every=1)
    trainer.train(max_steps=2)
    folder = tmp_path / "checkpoint"
    good = {path.name: path.read_bytes() for path in folder.iterdir()}
    with torch.no_grad():
        if where == "weight":
            trainer.policy.lm_head.weight[0] = math.nan
        else:
            trainer.optimizer.state[trainer.policy.lm_head.weight]["exp_avg"][0] = math.inf
    with pytest.raises(TrainingDivergedError, match="expected finite weights .* at step 2"):
        trainer.save(folder)
    with pytest.raises(TrainingDivergedError, match="expected finite weights"):
        trainer.train(max_steps=3)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == good
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]
    again = make_trainer(output_dir=tmp_path).resume(folder)
    assert again.step == 2


@pytest.mark.parametrize("config", [{"algorithm": "dapo"}, {"mask_truncated": True}])
def test_a_model_that_never_ends_learns_nothing_and_is_told_once(make_trainer, config):
    model = LSTMLanguageModel(8, 8, 24, 1)
    with torch.no_grad():
        model.lm_head.bias[EOS] = -100
    trainer = make_trainer(model=model, eos_token_id=EOS, max_steps=12, **config)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        before = weights_of(trainer)
        records = trainer.train(max_steps=4)
        assert all(record["loss"] == record["grad_norm"] == 0 for record in records)
        assert not caught
        trainer.train()
        assert_equal(weights_of(trainer), before)
    (warning,) = caught
    message = str(warning.message)
    assert "nothing was learned in 5 steps in a row" in message
    assert "max_new_tokens = 4" in message and "mask_truncated=False" in message
    assert warning.filename == __file__


def test_a_model_that_ends_now_and_then_is_not_told(make_trainer, recwarn):
    """Four steps without an end, and one with one."""
    model, steps = LSTMLanguageModel(8, 8, 24, 1), []

    def end_in_every_fifth(record):
        steps.append(record["completions/clipped_ratio"])
        with torch.no_grad():
            model.lm_head.bias[EOS] = 100 if len(steps) % 5 == 4 else -100

    trainer = make_trainer(
        model=model, eos_token_id=EOS, max_steps=11, algorithm="dapo", learning_rate=1e-9
    )
    with torch.no_grad():
        model.lm_head.bias[EOS] = -100
    trainer.train(on_step=end_in_every_fifth)
    assert steps == ([1.0] * 4 + [0.0]) * 2 + [1.0]
    assert not recwarn.list
