"""The trainers' losses and gradients against their formulas, written out token by token."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hand_losses import USED, assert_learns, gae_of, move, returns_of, rollout_with_rewards, rows_of

import fastrl.reference as ops
from fastrl.models import ActorCritic, LSTMLanguageModel
from fastrl.trainers.baselines import RunningMean, leave_one_out
from fastrl.trainers.trajectories import Trajectories

STILL = {"max_grad_norm": None, "max_new_tokens": 6, "eos_token_id": 7}


def used_rows(trainer, rollout):
    return [row for row in rows_of(trainer, rollout) if row.is_used]


@pytest.mark.parametrize("is_used", USED)
def test_gamma_0_is_minus_mean_of_logprob_times_reward(make_trainer, is_used):
    trainer = make_trainer(gamma=0.0, **STILL)
    rollout = rollout_with_rewards(trainer, is_used)
    rows = used_rows(trainer, rollout)
    expected = -torch.cat([row.logprobs * row.rewards for row in rows]).mean()
    assert_learns(trainer, rollout, expected)


@pytest.mark.parametrize("is_used", USED)
def test_reinforce_takes_the_reward_to_go(make_trainer, is_used):
    trainer = make_trainer(gamma=0.7, entropy_coef=0.3, **STILL)
    rollout = rollout_with_rewards(trainer, is_used)
    expected = torch.cat(
        [
            -row.logprobs * returns_of(row.rewards, 0.7) - 0.3 * row.entropies
            for row in used_rows(trainer, rollout)
        ]
    ).mean()
    assert_learns(trainer, rollout, expected)


def with_values(make_trainer, **options):
    trainer = make_trainer("actor_critic", **STILL, **options)
    torch.manual_seed(2)
    torch.nn.init.normal_(trainer.model.value_head.weight)
    return trainer


@pytest.mark.parametrize("is_used", USED)
@pytest.mark.parametrize("advantage", ["returns", "gae"])
def test_a2c_loss(make_trainer, advantage, is_used):
    config = {"gamma": 0.9, "entropy_coef": 0.1, "critic_coef": 0.7}
    config |= {"gae_lambda": 0.6} if advantage == "gae" else {}
    trainer = with_values(make_trainer, advantage=advantage, **config)
    rollout = rollout_with_rewards(trainer, is_used)
    losses = []
    for row in used_rows(trainer, rollout):
        v = row.values.detach()
        if advantage == "returns":
            returns = returns_of(row.rewards, 0.9)
        else:
            returns = gae_of(row.rewards, v, 0.9, 0.6) + v
        critic = 0.7 * (returns - row.values).square()
        losses.append(-row.logprobs * (returns - v) + critic - 0.1 * row.entropies)
    assert_learns(trainer, rollout, torch.cat(losses).mean())


def test_a2c_with_a_critic_of_its_own(make_trainer):
    """Its gradient is the values' alone, and the policy's has none of them."""
    model = ActorCritic(LSTMLanguageModel(8, 6, 10, 1), LSTMLanguageModel(8, 5, 7, 2))
    trainer = with_values(make_trainer, model=model, gamma=0.9, micro_batch_tokens=20)
    rollout = rollout_with_rewards(trainer, USED[1])
    assert rollout.values is None
    losses = []
    for row in used_rows(trainer, rollout):
        returns = returns_of(row.rewards, 0.9)
        critic = 0.5 * (returns - row.values).square()
        losses.append(critic - row.logprobs * (returns - row.values.detach()))
    assert_learns(trainer, rollout, torch.cat(losses).mean())


@pytest.mark.parametrize("is_used", USED)
def test_a2c_with_whitened_advantages(make_trainer, is_used):
    trainer = with_values(make_trainer, gamma=0.9, whiten_advantages=True, entropy_coef=0.1)
    rollout = rollout_with_rewards(trainer, is_used)
    rows = used_rows(trainer, rollout)
    logprobs = torch.cat([row.logprobs for row in rows])
    entropies = torch.cat([row.entropies for row in rows])
    values = torch.cat([row.values for row in rows])
    returns = torch.cat([returns_of(row.rewards, 0.9) for row in rows])
    advantages = returns - values.detach()
    whitened = (advantages - advantages.mean()) / advantages.std()
    losses = -logprobs * whitened + 0.5 * (returns - values).square() - 0.1 * entropies
    assert_learns(trainer, rollout, losses.mean())


@pytest.mark.parametrize("estimator", [None, "k2", "k3"])
@pytest.mark.parametrize("kind", ["policy_gradient", "actor_critic"])
def test_the_divergence_as_a_loss(make_trainer, kind, estimator):
    """By default k2, which alone has the gradient of the divergence."""
    trainer = make_trainer(kind, kl_coef=0.4, kl_estimator=estimator, **STILL)
    move(trainer.policy, 0.2)  # away from the start
    rollout = rollout_with_rewards(trainer)
    losses, divergences = [], []
    for row in rows_of(trainer, rollout):
        d = row.logprobs - row.ref_logprobs
        k3 = (-d).exp() - 1 + d
        kl = k3 if estimator == "k3" else d.square() / 2
        returns = returns_of(row.rewards, 1.0)
        losses.append(-row.logprobs * returns + 0.4 * kl)
        if kind == "actor_critic":  # whose values are 0 still
            losses[-1] = losses[-1] + 0.5 * (returns - row.values).square()
        divergences.append(k3.detach())
    assert torch.cat(divergences).mean() > 0.01
    assert_learns(trainer, rollout, torch.cat(losses).mean())


def test_the_divergence_as_a_reward(make_trainer):
    trainer = make_trainer(kl_coef=0.4, kl_in="reward", gamma=0.8, **STILL)
    assert trainer.config.kl_estimator == "k1"
    move(trainer.policy, 0.2)
    rollout = rollout_with_rewards(trainer)
    losses = []
    for row in rows_of(trainer, rollout):
        rewards = row.rewards - 0.4 * (row.logprobs - row.ref_logprobs).detach()
        losses.append(-row.logprobs * returns_of(rewards, 0.8))
    assert_learns(trainer, rollout, torch.cat(losses).mean())


@pytest.mark.parametrize("temperature", [0.6, 2.0])
def test_the_loss_is_that_of_the_policy_at_its_temperature(make_trainer, temperature):
    trainer = make_trainer(temperature=temperature, entropy_coef=0.2, **STILL)
    rollout = rollout_with_rewards(trainer)
    losses = [
        -row.logprobs * returns_of(row.rewards, 1.0) - 0.2 * row.entropies
        for row in rows_of(trainer, rollout)
    ]
    numbers = assert_learns(trainer, rollout, torch.cat(losses).mean())
    assert numbers["logprob_gap"] < 1e-5


def test_rloo_by_hand(make_trainer):
    """Per position, ragged, one completion unusable; an ended one stands with its last return."""
    rollout = rollout_with_rewards(make_trainer(), USED[1])
    returns = torch.arange(rollout.token_ids.numel(), dtype=torch.float32).square()
    baseline, is_known = leave_one_out(returns, Trajectories(rollout), rollout.loss_mask)
    rows = returns.split(rollout.lengths.tolist())
    expected = []
    for index, row in enumerate(rows):
        others = [
            other
            for other in range(8)
            if other != index
            and rollout.is_used[other]
            and rollout.group_ids[other] == rollout.group_ids[index]
        ]
        for step in range(len(row)):
            at_step = [rows[other][min(step, len(rows[other]) - 1)] for other in others]
            expected.append(sum(at_step) / len(others))
    used = rollout.loss_mask
    assert torch.equal(is_known, used)
    torch.testing.assert_close(baseline[used], torch.stack(expected)[used])


def test_rloo_of_one_reward_at_the_end_is_group_advantages(make_trainer):
    rollout = rollout_with_rewards(make_trainer())
    rewards = torch.linspace(-1, 2, 8).square()
    returns = rewards.repeat_interleave(rollout.lengths)  # gamma = 1
    baseline, _ = leave_one_out(returns, Trajectories(rollout), rollout.loss_mask)
    advantages, _ = ops.group_advantages(rewards, rollout.group_ids, estimator="rloo")
    expected = advantages.repeat_interleave(rollout.lengths)
    torch.testing.assert_close(returns - baseline, expected)


@pytest.mark.parametrize("reward", [0.1, 0.3, 1 / 3])
def test_rloo_of_equal_rewards_leaves_nothing(make_trainer, reward):
    """Exactly 0: Adam makes steps of what rounding leaves, however small that is."""
    trainer = make_trainer(
        reward_functions=lambda completion_ids, **_: [reward] * len(completion_ids),
        baseline="rloo", completions_per_prompt=8, max_steps=2, **STILL,
    )  # fmt: skip
    before = [p.detach().clone() for p in trainer.parameters]
    assert [record["grad_norm"] for record in trainer.train()] == [0, 0]
    assert all(map(torch.equal, trainer.parameters, before))


def test_a_completion_without_tokens_is_no_other_of_rloo():
    bounds = torch.tensor([0, 2, 3, 3])
    trajectories = SimpleNamespace(
        cu_seqlens=bounds,
        group_ids=torch.zeros(3),
        over=lambda x: x.repeat_interleave(bounds.diff()),
    )
    counts = torch.ones(3, dtype=torch.bool)
    baseline, is_known = leave_one_out(torch.tensor([1.0, 2.0, 4.0]), trajectories, counts)
    assert baseline.tolist() == [4.0, 4.0, 1.0] and is_known.all()


def test_rloo_without_another_usable_completion_teaches_nothing(make_trainer):
    """Neither the policy gradient nor the entropy bonus."""
    trainer = make_trainer(baseline="rloo", entropy_coef=0.1, **STILL)
    rollout = rollout_with_rewards(trainer, (True, False, False, False) + (True,) * 4)
    _, is_known = leave_one_out(rollout.rewards, Trajectories(rollout), rollout.loss_mask)
    first = rollout.lengths[:4].sum()
    assert not is_known[:first].any() and is_known[first:].all()
    rows = rows_of(trainer, rollout)[4:]
    losses = []
    for i, row in enumerate(rows):
        returns = [returns_of(other.rewards, 1.0) for other in rows]
        others = [r for j, r in enumerate(returns) if j != i]
        baseline = torch.stack(
            [
                torch.stack([r[min(t, len(r) - 1)] for r in others]).mean()
                for t in range(len(row.rewards))
            ]
        )
        losses.append(-row.logprobs * (returns[i] - baseline) - 0.1 * row.entropies)
    assert_learns(trainer, rollout, torch.cat(losses).mean())


def test_running_mean_by_hand(make_trainer):
    """Position by position; a step's own returns enter only the next one's baseline."""
    trainer = make_trainer()
    rollout = rollout_with_rewards(trainer, USED[1])
    returns = torch.arange(rollout.token_ids.numel(), dtype=torch.float32)
    mean = RunningMean(6, 0.5, torch.device("cpu"))

    def call(x):
        return mean(x, rollout.cu_seqlens, rollout.loss_mask)

    assert call(returns).eq(0).all()
    call(2 * returns + 1)
    third = call(returns)
    position = torch.cat([torch.arange(n) for n in rollout.lengths.tolist()])
    for step in range(6):
        here = returns[(position == step) & rollout.loss_mask].double()
        if here.numel() > 0:  # (half of the first step, the whole second one) / their weight
            expected = (0.5 * here.sum() + (2 * here + 1).sum()) / (1.5 * here.numel())
            got = third[position == step].double()
            torch.testing.assert_close(got, expected.expand_as(got), atol=1e-4, rtol=1e-6)


def test_a_running_mean_goes_on_as_at_its_last_position():
    """Behind max_new_tokens, where a conversation has several turns."""
    mean = RunningMean(2, 1.0, torch.device("cpu"))
    arguments = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([0, 4]), torch.ones(4).bool()
    assert mean(*arguments).tolist() == [0.0, 0.0, 0.0, 0.0]
    assert mean(*arguments).tolist() == [1.0, 3.0, 3.0, 3.0]


@pytest.mark.parametrize("is_used", USED)
def test_reinforce_takes_off_the_running_mean(make_trainer, is_used):
    trainer = make_trainer(baseline="running_mean", gamma=0.7, **STILL)
    rollout = rollout_with_rewards(trainer, is_used)
    level = torch.linspace(1.0, 3.0, trainer.config.max_new_tokens)
    trainer._running_mean.load_state_dict({"total": 2 * level, "count": torch.tensor(2.0)})
    losses = [
        -row.logprobs * (returns_of(row.rewards, 0.7) - level[: len(row.rewards)])
        for row in used_rows(trainer, rollout)
    ]
    assert_learns(trainer, rollout, torch.cat(losses).mean())


def test_an_unused_completion_has_no_part_whatever_its_rewards(make_trainer):
    trainer = make_trainer(baseline="running_mean", **STILL)
    rollout = rollout_with_rewards(trainer, USED[1])
    rows = used_rows(trainer, rollout)
    expected = torch.cat([-row.logprobs * returns_of(row.rewards, 1.0) for row in rows]).mean()
    lost = ~rollout.loss_mask
    spoiled = replace(rollout, rewards=rollout.rewards.masked_fill(lost, 1e9))
    assert_learns(trainer, spoiled, expected)
