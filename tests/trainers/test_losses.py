"""The trainers' losses and gradients against their formulas, written out token by token."""

from dataclasses import replace

import pytest
import torch

import fastrl.reference as ops
from fastrl.rollout import completion_seeds, generate
from fastrl.trainers.baselines import RunningMean, leave_one_out
from fastrl.trainers.tokens import score_tokens

EOS = 7
PROMPTS = [torch.tensor([1, 2, 3]), torch.tensor([4])]


def rollout_with_rewards(trainer, is_used=(True,) * 8):
    """8 ragged completions with random rewards, from the trainer's policy."""
    rollout = generate(
        trainer.policy,
        PROMPTS,
        completions_per_prompt=4,
        max_new_tokens=6,
        seeds=completion_seeds(5, 0, torch.arange(2), 4),
        eos_token_id=EOS,
    )
    assert rollout.lengths.unique().numel() > 1
    generator = torch.Generator().manual_seed(1)
    rewards = torch.randn(rollout.token_ids.numel(), generator=generator)
    return replace(rollout, rewards=rewards, is_used=torch.tensor(is_used))


def loss_of(trainer, rollout):
    tokens = score_tokens(trainer.policy, trainer.reference, rollout, temperature=1.0, ops=ops)
    return trainer._loss(rollout, tokens)[0]


def by_hand(trainer, rollout):
    """For each used completion, token by token: log-probs, entropies, values and rewards."""
    policy, rewards = trainer.policy, rollout.rewards.split(rollout.lengths.tolist())
    rows = []
    for index, ids in enumerate(rollout.completion_ids):
        prompt = PROMPTS[rollout.group_ids[index]]
        hidden, _ = policy.hidden_states(torch.cat([prompt, ids])[None])
        hidden = hidden[0, len(prompt) - 1 : -1]
        log_p = policy.lm_head(hidden).log_softmax(-1)
        entropies = -(log_p.exp() * log_p).sum(-1)
        values = trainer.model.values(hidden) if hasattr(trainer.model, "values") else None
        rows.append((log_p.gather(1, ids[:, None])[:, 0], entropies, values, rewards[index]))
    return [row for row, used in zip(rows, rollout.is_used.tolist(), strict=True) if used]


def returns_of(rewards, gamma):
    returns, following = [], 0.0
    for reward in reversed(rewards.tolist()):
        following = reward + gamma * following
        returns.insert(0, following)
    return torch.tensor(returns)


def assert_same_loss_and_gradient(trainer, loss, expected):
    parameters = list(trainer.model.parameters())
    torch.testing.assert_close(loss, expected, atol=1e-6, rtol=1e-5)
    got = torch.autograd.grad(loss, parameters, allow_unused=True)
    wanted = torch.autograd.grad(expected, parameters, allow_unused=True)
    for one, other in zip(got, wanted, strict=True):
        zero = torch.zeros(())
        one, other = (zero if grad is None else grad for grad in (one, other))
        torch.testing.assert_close(one, other.expand_as(one), atol=1e-6, rtol=1e-4)


# Which completions count: all, and all but two.
USED = [(True,) * 8, (True, False, True, True, True, True, True, False)]


@pytest.mark.parametrize("is_used", USED)
def test_gamma_0_is_minus_mean_of_logprob_times_reward(make_trainer, is_used):
    trainer = make_trainer(gamma=0.0)
    rollout = rollout_with_rewards(trainer, is_used)
    rows = by_hand(trainer, rollout)
    expected = -torch.cat([logprobs * rewards for logprobs, _, _, rewards in rows]).mean()
    assert_same_loss_and_gradient(trainer, loss_of(trainer, rollout), expected)


@pytest.mark.parametrize("is_used", USED)
def test_reinforce_takes_the_reward_to_go(make_trainer, is_used):
    trainer = make_trainer(gamma=0.7, entropy_coef=0.3)
    rollout = rollout_with_rewards(trainer, is_used)
    expected = torch.cat(
        [
            -logprobs * returns_of(rewards, 0.7) - 0.3 * entropies
            for logprobs, entropies, _, rewards in by_hand(trainer, rollout)
        ]
    ).mean()
    assert_same_loss_and_gradient(trainer, loss_of(trainer, rollout), expected)


def with_values(make_trainer, **config):
    trainer = make_trainer("actor_critic", **config)
    torch.manual_seed(2)
    torch.nn.init.normal_(trainer.model.value_head.weight)
    return trainer


@pytest.mark.parametrize("is_used", USED)
@pytest.mark.parametrize("advantage", ["returns", "gae"])
def test_a2c_loss(make_trainer, advantage, is_used):
    config = {"gamma": 0.9, "gae_lambda": 0.6, "entropy_coef": 0.1, "critic_coef": 0.5}
    trainer = with_values(make_trainer, advantage=advantage, **config)
    rollout = rollout_with_rewards(trainer, is_used)
    losses = []
    for logprobs, entropies, values, rewards in by_hand(trainer, rollout):
        v = values.detach()
        if advantage == "returns":
            returns = returns_of(rewards, 0.9)
        else:
            delta = rewards + 0.9 * torch.cat([v[1:], torch.zeros(1)]) - v
            returns = returns_of(delta, 0.9 * 0.6) + v
        critic = 0.5 * (returns - values).square()
        losses.append(-logprobs * (returns - v) + critic - 0.1 * entropies)
    assert_same_loss_and_gradient(trainer, loss_of(trainer, rollout), torch.cat(losses).mean())


@pytest.mark.parametrize("is_used", USED)
def test_a2c_with_whitened_advantages(make_trainer, is_used):
    trainer = with_values(make_trainer, gamma=0.9, whiten_advantages=True, entropy_coef=0.1)
    rollout = rollout_with_rewards(trainer, is_used)
    rows = by_hand(trainer, rollout)
    logprobs, entropies, values = (
        torch.cat(column) for column in list(zip(*rows, strict=True))[:3]
    )
    returns = torch.cat([returns_of(rewards, 0.9) for *_, rewards in rows])
    advantages = returns - values.detach()
    whitened = (advantages - advantages.mean()) / advantages.std()
    losses = -logprobs * whitened + 0.5 * (returns - values).square() - 0.1 * entropies
    assert_same_loss_and_gradient(trainer, loss_of(trainer, rollout), losses.mean())


@pytest.mark.parametrize("kind", ["policy_gradient", "actor_critic"])
def test_k2_penalty_has_the_gradient_of_the_divergence(make_trainer, kind):
    trainer = make_trainer(kind, kl_coef=0.4)
    plain = make_trainer(kind, model=trainer.model)
    plain.reference = trainer.reference
    with torch.no_grad():  # away from the start
        for parameter in trainer.policy.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    rollout = rollout_with_rewards(trainer)
    tokens = score_tokens(trainer.policy, trainer.reference, rollout, temperature=1.0, ops=ops)
    penalty = 0.4 * ((tokens.logprobs - tokens.ref_logprobs).square() / 2).mean()
    expected = loss_of(plain, rollout) + penalty
    assert_same_loss_and_gradient(trainer, loss_of(trainer, rollout), expected)


def test_rloo_by_hand(make_trainer):
    """Per position, ragged, one completion unusable; an ended one stands with its last return."""
    rollout = rollout_with_rewards(make_trainer(), USED[1])
    returns = torch.arange(rollout.token_ids.numel(), dtype=torch.float32).square()
    baseline, is_known = leave_one_out(returns, rollout)
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
    baseline, _ = leave_one_out(returns, rollout)
    advantages, _ = ops.group_advantages(rewards, rollout.group_ids, estimator="rloo")
    expected = advantages.repeat_interleave(rollout.lengths)
    torch.testing.assert_close(returns - baseline, expected)


def test_rloo_without_another_usable_completion_teaches_nothing(make_trainer):
    rollout = rollout_with_rewards(make_trainer(), (True, False, False, False) + (True,) * 4)
    _, is_known = leave_one_out(rollout.rewards, rollout)
    first = rollout.lengths[:4].sum()
    assert not is_known[:first].any() and is_known[first:].all()


def test_running_mean_by_hand(make_trainer):
    """Position by position; a step's own returns enter only the next one's baseline."""
    trainer = make_trainer()
    rollout = rollout_with_rewards(trainer, USED[1])
    returns = torch.arange(rollout.token_ids.numel(), dtype=torch.float32)
    mean = RunningMean(6, 0.5, torch.device("cpu"))
    assert mean(returns, rollout).eq(0).all()
    mean(2 * returns + 1, rollout)
    third = mean(returns, rollout)
    position = torch.cat([torch.arange(n) for n in rollout.lengths.tolist()])
    for step in range(6):
        here = returns[(position == step) & rollout.loss_mask].double()
        if here.numel() > 0:  # (half of the first step, the whole second one) / their weight
            expected = (0.5 * here.sum() + (2 * here + 1).sum()) / (1.5 * here.numel())
            got = third[position == step].double()
            torch.testing.assert_close(got, expected.expand_as(got), atol=1e-4, rtol=1e-6)
