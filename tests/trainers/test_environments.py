"""Environments that answer: conversations of several turns, of which the policy's are learned."""

import math
from dataclasses import replace

import pytest
import torch
from hand_losses import assert_learns, returns_of, scored

from fastrl.trainers import sampling


@pytest.mark.parametrize("kind", ["policy_gradient", "actor_critic"])
def test_an_environments_tokens_are_read_and_not_learned(make_trainer, kind):
    asked = []

    def environment(index, prompt_ids, completion_ids):
        asked.append((index, prompt_ids, completion_ids))
        return [6, 0] if len(completion_ids) < 4 else None

    trainer = make_trainer(
        kind, environment=environment, entropy_coef=0.1, max_grad_norm=None, max_new_tokens=10,
        eos_token_id=7, completions_per_prompt=8, gamma=0.9,
    )  # fmt: skip
    rollout = sampling.collect(trainer, [trainer.dataset[i] for i in range(3)], torch.arange(3))
    answers = [int((~own).sum()) for own in rollout.is_target]
    assert max(answers) >= 2 and min(answers) == 0 and asked
    rewards = torch.randn(len(rollout.token_ids), generator=torch.Generator().manual_seed(0))
    rollout = replace(rollout, rewards=rewards, is_used=torch.ones(24, dtype=torch.bool))
    losses = []
    for i, (ids, own, r) in enumerate(
        zip(
            rollout.completion_ids,
            rollout.is_target,
            rewards.split(rollout.lengths.tolist()),
            strict=True,
        )  # fmt: skip
    ):
        prompt = trainer.dataset[int(rollout.group_ids[i])].token_ids
        logprobs, entropies, hidden = scored(trainer.policy, prompt, ids)
        returns = returns_of(r, 0.9)
        loss = -logprobs[own] * returns - 0.1 * entropies[own]
        if kind == "actor_critic":
            values = trainer.model.values(hidden)[own]
            loss = loss + 0.5 * (returns - values).square()
        losses.append(loss)
    assert_learns(trainer, rollout, torch.cat(losses).mean())


@pytest.mark.parametrize(
    "answer, error, message",
    [
        ([1, 8], ValueError, r"completion 0 with ids in \[0, 8\), got 1 to 8"),
        ([-1], ValueError, "got -1 to -1"),
        ("ab", TypeError, "a list of ids or None, got 'ab'"),
        ([1, 0.5], TypeError, r"a list of ids or None, got \[1, 0.5\]"),
        ([1, True], TypeError, r"a list of ids or None, got \[1, True\]"),
    ],
)
def test_answers_that_are_no_ids_are_errors(make_trainer, answer, error, message):
    trainer = make_trainer(
        environment=lambda index, prompt_ids, completion_ids: answer,
        eos_token_id=tuple(range(8)), max_new_tokens=3,
    )  # fmt: skip
    with pytest.raises(error, match=f"generate: expected environment to answer .*{message}"):
        trainer.train(max_steps=1)


def test_a_run_with_an_environment(make_trainer):
    """The policy is to say 3 after the question, and has to wait for it."""

    def environment(index, prompt_ids, completion_ids):
        return [6] if completion_ids.count(6) == 0 else None

    def three_after_six(completion_ids, **_):
        return [
            [float(i > 0 and ids[i - 1] == 6 and t == 3) for i, t in enumerate(ids)]
            for ids in completion_ids
        ]

    trainer = make_trainer(
        "actor_critic", three_after_six, environment=environment, algorithm="ppo",
        max_new_tokens=6, eos_token_id=(4, 5, 7), learning_rate=0.02, max_steps=15,
    )  # fmt: skip
    records = trainer.train()
    assert all(math.isfinite(r["loss"]) and r["skipped_updates"] == 0 for r in records)
    assert all(r["logprob_gap"] < 1e-5 for r in records)
    assert records[-1]["reward"] > records[0]["reward"] + 0.2
