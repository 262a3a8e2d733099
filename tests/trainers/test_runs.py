"""Runs as people use them: saved elsewhere and gone on with, evaluated in the middle, resumed."""

import random

import numpy as np
import pytest
import torch


def test_a_run_that_was_saved_elsewhere_goes_on(make_trainer, tmp_path):
    trainer = make_trainer(output_dir=tmp_path / "run", max_steps=2)
    trainer.train()
    trainer.save(tmp_path / "export")
    assert len(trainer.train(max_steps=3)) == 1
    again = make_trainer(output_dir=tmp_path / "run").resume(tmp_path / "run" / "checkpoint")
    assert again.step == 3
    with pytest.raises(ValueError, match="expected output_dir without a checkpoint"):
        make_trainer(output_dir=tmp_path / "run").train(max_steps=1)


def test_a_resumed_run_may_have_a_lower_learning_rate(make_trainer, tmp_path):
    make_trainer(max_steps=1, learning_rate=1e-2, output_dir=tmp_path).train()
    trainer = make_trainer(learning_rate=1e-3, micro_batch_tokens=16)
    record = trainer.resume(tmp_path / "checkpoint").train(max_steps=2)[0]
    assert record["learning_rate"] == 1e-3


def test_reward_functions_know_the_step_in_an_evaluation_too(make_trainer):
    steps = []

    def reward(completion_ids, trainer_state, **_):
        steps.append(trainer_state.global_step)
        return [0.0] * len(completion_ids)

    trainer = make_trainer(reward_functions=reward)
    trainer.train(max_steps=2)
    trainer.evaluate(trainer.dataset.dataset)
    assert steps == [0, 1, 2]


@pytest.mark.parametrize("draw", [random.random, np.random.rand, lambda: float(torch.rand(()))])
def test_an_evaluation_leaves_each_generator_where_it_was(make_trainer, draw):
    def noisy(completion_ids, **_):
        return [draw() for _ in completion_ids]

    trainer = make_trainer(reward_functions=noisy)
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    first = trainer.evaluate(trainer.dataset.dataset, seed=3)
    after = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    assert states == after
    assert first["reward"] == trainer.evaluate(trainer.dataset.dataset, seed=3)["reward"]


def test_an_evaluation_that_is_broken_off_leaves_the_rewards_state(make_trainer):
    class Counting:
        calls = 0

        def __call__(self, completion_ids, **_):
            self.calls += 1
            if self.calls == 2:
                raise KeyboardInterrupt
            return [float(self.calls)] * len(completion_ids)

        def state_dict(self):
            return {"calls": self.calls}

        def load_state_dict(self, state):
            self.calls = state["calls"]

    reward = Counting()
    trainer = make_trainer(reward_functions=reward)
    trainer.train(max_steps=1)
    with pytest.raises(KeyboardInterrupt):
        trainer.evaluate(trainer.dataset.dataset)
    assert reward.calls == 1


def test_the_gap_is_that_before_the_first_step_that_changes_weights(make_trainer):
    """Of minibatches that teach nothing, the first included, none counts as a gradient step."""

    def first_prompt_alone(prompts, completion_ids, **_):
        return [
            float(3 in ids) if prompt == [1, 2, 3] else 0.0
            for prompt, ids in zip(prompts, completion_ids, strict=True)
        ]

    trainer = make_trainer(
        reward_functions=first_prompt_alone, algorithm="grpo", minibatches=3, learning_rate=0.05,
        max_steps=12,
    )  # fmt: skip
    records = trainer.train()
    assert any(record["grad_norm"] > 0 for record in records)
    assert all(record["logprob_gap"] < 1e-5 for record in records)


def test_an_error_while_learning_leaves_the_model_as_it_samples(make_trainer, monkeypatch):
    trainer, was_training = make_trainer(dropout=True), []

    def stops(trainer, *_):
        was_training.extend(module.training for module in trainer.model.modules())
        pytest.fail("stopped", pytrace=False)

    monkeypatch.setattr("fastrl.trainers.update.micro_loss", stops)
    with pytest.raises(pytest.fail.Exception):
        trainer.train(max_steps=1)
    assert was_training and all(was_training)
    assert not any(module.training for module in trainer.model.modules())


def test_what_could_not_be_trained_or_sampled_is_said_at_once(make_trainer):
    frozen = make_trainer().model.requires_grad_(False)
    with pytest.raises(ValueError, match="expected a model with weights to train"):
        make_trainer(model=frozen)
    with pytest.raises(ValueError, match="expected tokenizer with stop_strings, got None"):
        make_trainer(stop_strings=("\n",))
    assert make_trainer(stop_strings=None).config.stop_strings == ()
