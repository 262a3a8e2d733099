"""Whole runs: ops and reference agree, records say what happened, evaluation leaves no trace."""

import math

import pytest
import torch

import fastrl
from fastrl import reference
from fastrl.models import ActorCritic, LSTMLanguageModel

KINDS = ["policy_gradient", "actor_critic"]


def test_one_reward_per_completion_is_learned_from(make_trainer):
    """The sparse case: how many tokens are 3, told at the end only."""

    def threes(completion_ids, **_):
        return [float(ids.count(3)) for ids in completion_ids]

    trainer = make_trainer(
        reward_functions=threes, baseline="rloo", learning_rate=0.02, max_steps=80
    )
    trainer.train()
    assert trainer.evaluate(trainer.dataset.dataset, temperature=0.0)["reward"] == 4


@pytest.mark.parametrize("kind", KINDS)
def test_ops_and_reference_give_the_same_curve(make_trainer, kind):
    curves = []
    for ops in (reference, fastrl.ops):
        trainer = make_trainer(
            kind, ops=ops, gamma=0.9, learning_rate=0.01, max_steps=20, eos_token_id=6,
            kl_coef=0.1, entropy_coef=0.01, max_new_tokens=8,
        )  # fmt: skip
        records = trainer.train()
        curves.append([[r[k] for k in ("loss", "kl", "entropy", "reward")] for r in records])
    torch.testing.assert_close(
        torch.tensor(curves[0]), torch.tensor(curves[1]), atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_is_a_function_of_its_seed(make_trainer, kind):
    def run(seed, disturb=0):
        trainer = make_trainer(kind, seed=seed, max_steps=4)
        torch.manual_seed(disturb)
        records = trainer.train()
        weights = torch.cat([p.flatten() for p in trainer.model.parameters()])
        return [r["loss"] for r in records], weights

    losses, weights = run(0)
    again, same_weights = run(0, disturb=1)
    others, _ = run(1)
    assert losses == again and torch.equal(weights, same_weights)
    assert losses != others


@pytest.mark.parametrize("kind", KINDS)
def test_records(make_trainer, kind):
    seen = []
    trainer = make_trainer(kind, max_steps=3, eos_token_id=6)
    records = trainer.train(on_step=seen.append)
    assert seen == records
    assert [r["step"] for r in records] == [1, 2, 3]
    record = records[-1]
    assert record["reward"] == record["rewards/hits/mean"]
    lengths = [record[f"completions/{name}_length"] for name in ("min", "mean", "max")]
    assert 1 <= lengths[0] <= lengths[1] <= lengths[2] <= 4
    assert 0 < record["completions/clipped_ratio"] < 1
    assert 0 < record["entropy"] <= math.log(8)
    assert record["logprob_gap"] < 1e-5
    parts = record["time/rollout"] + record["time/reward"] + record["time/update"]
    assert parts == pytest.approx(record["time/step"])
    assert all(isinstance(value, int | float) for value in record.values())
    assert trainer.train() == []  # the run has its steps
    assert len(trainer.train(max_steps=5)) == 2


def test_metrics_by_trls_names_by_hand(make_trainer):
    """Of one step, from what the reward function saw."""
    seen = {}

    def first_token(prompts, completion_ids, **_):
        seen.update(ids=completion_ids, prompts=prompts)
        return [None if i == 2 else float(ids[0]) for i, ids in enumerate(completion_ids)]

    trainer = make_trainer(reward_functions=first_token, eos_token_id=6)
    record = trainer.train(max_steps=1)[0]
    ids, lengths = seen["ids"], torch.tensor([len(c) for c in seen["ids"]]).double()
    ended = torch.tensor([c[-1] == 6 for c in ids])
    rewards = torch.tensor([float(c[0]) for i, c in enumerate(ids) if i != 2])
    expected = {
        "completions/mean_length": lengths.mean(),
        "completions/min_length": lengths.min(),
        "completions/max_length": lengths.max(),
        "completions/clipped_ratio": 1 - ended.double().mean(),
        "completions/mean_terminated_length": lengths[ended].mean(),
        "reward": rewards.mean(),
        "reward_std": rewards.std(),
        "rewards/first_token/mean": rewards.mean(),
        "rewards/first_token/std": rewards.std(),
        "rewards/none": 1,
        "num_tokens": 6 + lengths.sum(),  # the prompts' own once each
        "frac_reward_zero_std": 0,
        "learning_rate": 3e-4,
        "epoch": 1,
    }
    assert 0 < ended.sum() < 12
    for name, value in expected.items():
        assert record[name] == pytest.approx(float(value)), name


def test_samples_are_the_last_steps(make_trainer):
    trainer = make_trainer(max_steps=2)
    assert trainer.samples() == []
    trainer.train()
    samples = trainer.samples()
    assert len(samples) == 12
    for sample in samples:
        position = enumerate(sample["completion"])
        wanted = [(sample["prompt"][-1] + i) % 5 == token for i, token in position]
        assert sample["reward"] == sample["rewards/hits"] == sum(wanted)


def test_several_callbacks_see_each_record_and_one_may_stop_the_run(make_trainer):
    class Enough(Exception):
        pass

    def stop(record):
        if record["step"] == 2:
            raise Enough

    one, other = [], []
    trainer = make_trainer(max_steps=4)
    with pytest.raises(Enough):
        trainer.train(on_step=[one.append, other.append, stop])
    assert one == other and [r["step"] for r in one] == [1, 2]
    assert [r["step"] for r in trainer.train()] == [3, 4]
    assert len(one) == 2


def test_each_prompt_comes_once_an_epoch(make_trainer):
    seen = []

    def remember(prompts, **_):
        seen.extend(prompts)
        return [0.0] * len(prompts)

    dataset = [[token] for token in range(5)]
    trainer = make_trainer(
        reward_functions=remember, dataset=dataset, completions_per_prompt=1, prompts_per_step=3
    )
    trainer.train(max_steps=10)
    epochs = [sum(seen[start : start + 5], []) for start in range(0, 30, 5)]
    assert all(sorted(epoch) == [0, 1, 2, 3, 4] for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1


def test_more_prompts_a_step_than_the_dataset_has_gives_other_completions(make_trainer):
    completions = []

    def remember(completion_ids, **_):
        completions.extend(map(tuple, completion_ids))
        return [0.0] * len(completion_ids)

    trainer = make_trainer(
        reward_functions=remember, dataset=[[1]], prompts_per_step=16, completions_per_prompt=1,
        max_new_tokens=16,
    )  # fmt: skip
    trainer.train(max_steps=2)
    assert len(set(completions)) == 32


def test_gradients_are_clipped(make_trainer):
    """One step at once, and with gradients too large to matter once they are scaled down."""

    def huge(completion_ids, **_):
        return [1e6 * ids.count(3) for ids in completion_ids]

    norms = []
    trainer = make_trainer(reward_functions=huge, max_grad_norm=0.5, baseline="rloo")
    trainer.optimizer.register_step_pre_hook(
        lambda *_: norms.append(
            torch.cat([p.grad.flatten() for p in trainer.model.parameters()]).norm().item()
        )
    )
    record = trainer.train(max_steps=1)[0]
    assert record["grad_norm"] > 1e3
    assert norms == [pytest.approx(0.5, rel=1e-4)]


def test_evaluation_does_not_depend_on_or_disturb_the_run(make_trainer):
    def noisy(completion_ids, **_):
        return torch.rand(len(completion_ids))

    trainer = make_trainer(reward_functions=noisy)
    other = make_trainer(reward_functions=noisy)
    torch.manual_seed(3)
    plain = trainer.train(max_steps=4)
    torch.manual_seed(3)
    disturbed = []
    for step in range(1, 5):
        disturbed += other.train(max_steps=step)
        first = other.evaluate(other.dataset.dataset, seed=1)
        assert first == other.evaluate(other.dataset.dataset, seed=1)
    assert [r["reward"] for r in plain] == [r["reward"] for r in disturbed]
    weights = zip(trainer.model.parameters(), other.model.parameters(), strict=True)
    assert all(torch.equal(one, two) for one, two in weights)


def test_evaluation_reports_by_prompt(make_trainer):
    trainer = make_trainer(prompts_per_step=2, completions_per_prompt=1)
    dataset = trainer.dataset.dataset
    result = trainer.evaluate(dataset, completions_per_prompt=5, seed=2)
    assert [len(rows) for rows in result["completions"]] == [5, 5, 5]
    assert result["completions"] == result["completion_ids"]  # no tokenizer
    assert sum(result["prompt_rewards"]) / 3 == pytest.approx(result["reward"])
    assert result["kl"] == 0 and result["completions/mean_length"] == 4
    # In one batch or in three, alone or together.
    wide = make_trainer(prompts_per_step=8, completions_per_prompt=8, model=trainer.model)
    assert (
        wide.evaluate(dataset, completions_per_prompt=5, seed=2)["completion_ids"]
        == (result["completion_ids"])
    )


def test_models_of_the_wrong_kind_are_errors(make_trainer):
    language_model = make_trainer().model
    actor_critic = make_trainer("actor_critic").model
    with pytest.raises(TypeError, match="got ActorCritic. Pass an ActorCritic's .language_model"):
        make_trainer(model=actor_critic)
    with pytest.raises(TypeError, match=r"got LSTMLanguageModel. Wrap .*ActorCritic\(model\)"):
        make_trainer("actor_critic", model=language_model)
    with pytest.raises(TypeError, match="expected config PolicyGradientConfig, got ActorCritic"):
        config = make_trainer("actor_critic").config
        type(make_trainer())(language_model, lambda **_: [], [[1]], config)


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_checkpointing_computes_layers_again_and_changes_no_weight(make_trainer, kind):
    pytest.importorskip("transformers")
    from hf_models import build

    def run(checkpointing):
        models, calls = [build("llama") for _ in range(1 + (kind == "actor_critic"))], []
        for each in models:
            each.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
        model = ActorCritic(*models) if kind == "actor_critic" else models[0]
        options = {"gradient_checkpointing": checkpointing, "kl_coef": 0.1, "max_steps": 2}
        make_trainer(kind, model=model, **options).train()
        return [x.detach().clone() for each in models for x in each.parameters()], len(calls)

    (weights, calls), (again, calls_again) = run(False), run(True)
    assert all(map(torch.equal, weights, again))
    num_models = 1 + (kind == "actor_critic")
    assert calls_again - calls == 2 * num_models  # once more in each backward pass, nowhere else


def test_gradient_checkpointing_of_a_model_without_it_is_an_error(make_trainer, monkeypatch):
    pytest.importorskip("transformers")
    from hf_models import build

    small = LSTMLanguageModel(8, 4, 4)
    critic = ActorCritic(build("llama"), small)
    for kind, model in (("policy_gradient", small), ("actor_critic", critic)):
        with pytest.raises(ValueError, match="with gradient checkpointing, got LSTMLanguageModel"):
            make_trainer(kind, model=model, gradient_checkpointing=True)
    monkeypatch.setattr("transformers.modeling_layers.GradientCheckpointingLayer", torch.nn.LSTM)
    with pytest.raises(ValueError, match="layers for gradient checkpointing, got LlamaForCausalLM"):
        make_trainer(model=build("llama"), gradient_checkpointing=True)


def test_dropout_is_an_error(make_trainer):
    model = make_trainer().model
    model.lstm.dropout = 0.1
    with pytest.raises(ValueError, match="expected model without dropout in lstm, got 0.1"):
        make_trainer(model=model)


def test_an_eos_outside_the_vocabulary_is_an_error(make_trainer):
    with pytest.raises(ValueError, match=r"expected eos_token_id in \[0, 8\), got 8"):
        make_trainer(eos_token_id=8)
