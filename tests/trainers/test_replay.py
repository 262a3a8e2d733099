"""V-trace and its replay buffer: the formula by hand, what is kept, drawn and remembered."""

import copy
from collections import Counter

import pytest
import torch
from hand_losses import USED, assert_learns, move, rollout_with_rewards, rows_of, updates
from torch import Tensor

from fastrl.trainers.replay import ReplayBuffer, joined

STILL = {"max_grad_norm": None, "max_new_tokens": 6, "eos_token_id": 7}


def vtrace_of(rewards, values, ratio, gamma, gae_lambda, rho_clip, c_clip):
    """Espeholt et al. 2018, eq. 1 in its recursive form, and section 4.2: targets, advantages."""
    n, targets, advantages = len(rewards), [0.0] * len(rewards), [0.0] * len(rewards)
    v = [*values.tolist(), 0.0]
    behind = 0.0  # vs_{t+1} - v_{t+1}
    for t in reversed(range(n)):
        rho, c = min(rho_clip, ratio[t].item()), gae_lambda * min(c_clip, ratio[t].item())
        r = rewards[t].item()
        advantages[t] = rho * (r + gamma * (v[t + 1] + gae_lambda * behind) - v[t])
        behind = rho * (r + gamma * v[t + 1] - v[t]) + gamma * c * behind
        targets[t] = v[t] + behind
    return torch.tensor(targets), torch.tensor(advantages)


def with_history(make_trainer, **config):
    """A trainer whose buffer holds rollouts of two earlier policies, and a third one's rollout."""
    trainer = make_trainer(
        "actor_critic", algorithm="vtrace", replay_per_step=2, learning_rate=1e-12,
        **{"replay_size": 2, **config}, **STILL,
    )  # fmt: skip
    torch.manual_seed(2)
    torch.nn.init.normal_(trainer.model.value_head.weight)
    rollouts = []
    for seed in (5, 6, 8):
        rollouts.append(rollout_with_rewards(trainer, USED[1], seed=seed))
        if seed != 8:
            updates(trainer, rollouts[-1])
            trainer.step += 1
            move(trainer.model, 0.25, seed)
    rollouts[-1] = rollout_with_rewards(trainer, USED[1], seed=8)
    return trainer, rollouts


@pytest.mark.parametrize(
    "config, gamma, gae_lambda, rho_clip, c_clip",
    [
        ({"gae_lambda": 1.0}, 1.0, 1.0, 1.0, 1.0),
        ({"gamma": 0.9, "gae_lambda": 0.7, "entropy_coef": 0.1}, 0.9, 0.7, 1.0, 1.0),
        ({"gamma": 0.9, "rho_clip": 1.3, "c_clip": 0.9}, 0.9, 0.95, 1.3, 0.9),
        ({"kl_coef": 0.3, "kl_estimator": "k3"}, 1.0, 0.95, 1.0, 1.0),
        ({"kl_coef": 0.3, "kl_in": "reward"}, 1.0, 0.95, 1.0, 1.0),
    ],
)
def test_vtrace_with_replay(make_trainer, config, gamma, gae_lambda, rho_clip, c_clip):
    trainer, rollouts = with_history(make_trainer, **config)
    losses, ratios = [], []
    for rollout in rollouts:
        for row in (row for row in rows_of(trainer, rollout) if row.is_used):
            now = row.logprobs.detach()
            ratio = (now - row.old_logprobs).exp()
            rewards = row.rewards
            if trainer.config.kl_in == "reward":
                rewards = rewards - 0.3 * (now - row.ref_logprobs)
            vs, advantages = vtrace_of(
                rewards, row.values.detach(), ratio, gamma, gae_lambda, rho_clip, c_clip
            )
            loss = -row.logprobs * advantages + 0.5 * (vs - row.values).square()
            loss = loss - config.get("entropy_coef", 0.0) * row.entropies
            if "kl_estimator" in config:
                d = row.logprobs - row.ref_logprobs
                loss = loss + 0.3 * ratio.clamp(max=2.0) * ((-d).exp() - 1 + d)
            losses.append(loss)
            ratios.append(ratio)
    every = torch.cat(ratios)
    assert (every > 1.3).any() and (every < 0.8).any()
    numbers = assert_learns(trainer, rollouts[-1], torch.cat(losses).mean())
    assert numbers["logprob_gap"] < 1e-5  # of the tokens that this policy sampled


def test_micro_batches_of_replayed_rollouts_add_up(make_trainer):
    found = []
    for limit in (None, 12):
        trainer, rollouts = with_history(make_trainer, micro_batch_tokens=limit)
        found.append(updates(trainer, rollouts[-1]))
    for one, other in zip(found[0][1][0], found[1][1][0], strict=True):
        torch.testing.assert_close(one, other, atol=3e-7, rtol=1e-5)
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-4, abs=1e-6)


def test_without_replay_vtrace_is_gae(make_trainer):
    gradients = []
    for config in ({"algorithm": "vtrace"}, {"algorithm": "a2c", "advantage": "gae"}):
        trainer = make_trainer("actor_critic", gamma=0.9, gae_lambda=0.7, **config, **STILL)
        torch.manual_seed(2)
        torch.nn.init.normal_(trainer.model.value_head.weight)
        gradients.append(updates(trainer, rollout_with_rewards(trainer, USED[1]))[1][0])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4)


def same(one, other):
    assert type(one) is type(other)
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        return all(same(one[name], other[name]) for name in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    return torch.equal(one, other) if isinstance(one, Tensor) else one == other


def test_the_last_rollouts_are_kept_and_each_is_as_likely(make_trainer):
    trainer = make_trainer(**STILL)
    rollouts = [rollout_with_rewards(trainer, seed=seed) for seed in (5, 6, 8, 10)]
    buffer = ReplayBuffer(3, seed=0)
    assert buffer.draw(0, 2) == []
    for rollout in rollouts:
        buffer.add(rollout)
    assert [id(r) for r in buffer.rollouts] == [id(r) for r in rollouts[1:]]
    assert len(buffer.draw(7, 2)) == 2 and len(buffer.draw(7, 10)) == 3
    assert len({id(r) for r in buffer.draw(7, 3)}) == 3
    counts = Counter(id(buffer.draw(step, 1)[0]) for step in range(300))
    assert len(counts) == 3 and all(70 < count < 130 for count in counts.values())
    one, again = (
        [[id(r) for r in b.draw(step, 2)] for step in range(20)] for b in (buffer, buffer)
    )
    other = ReplayBuffer(3, seed=1)
    other.rollouts = buffer.rollouts
    assert one == again != [[id(r) for r in other.draw(step, 2)] for step in range(20)]
    empty = ReplayBuffer(0, seed=0)
    empty.add(rollouts[0])
    assert empty.rollouts == [] and empty.draw(0, 1) == []


def test_joined_rollouts_stay_apart(make_trainer):
    trainer = make_trainer(**STILL)
    one, other = (rollout_with_rewards(trainer, USED[i], seed=5 + i) for i in (0, 1))
    both = joined([one, other])
    assert both.group_ids.tolist() == [0] * 4 + [1] * 4 + [2] * 4 + [3] * 4
    assert torch.equal(both.token_ids, torch.cat([one.token_ids, other.token_ids]))
    assert torch.equal(both.rewards, torch.cat([one.rewards, other.rewards]))
    assert torch.equal(both.loss_mask, torch.cat([one.loss_mask, other.loss_mask]))
    back = both.take(torch.arange(16) >= 8)
    for name in ("token_ids", "logprobs", "rewards", "is_used", "ended", "cu_seqlens"):
        assert torch.equal(getattr(back, name), getattr(other, name))
    assert torch.equal(back.batch.token_ids, other.batch.token_ids)


def test_a_run_goes_on_from_its_state_as_if_it_had_never_stopped(make_trainer):
    """The buffer bitwise, so the next steps too; also with a tool's tokens in it."""

    def environment(index, prompt_ids, completion_ids):
        return [6, 0] if len(completion_ids) < 3 else None

    def made():
        return make_trainer(
            "actor_critic", algorithm="vtrace", replay_size=2, replay_per_step=2, max_steps=5,
            max_new_tokens=6, eos_token_id=(5, 7), environment=environment, learning_rate=0.01,
        )  # fmt: skip

    whole = made()
    whole.train(max_steps=3)
    assert any(not own.all() for r in whole.replay.rollouts for own in r.is_target)
    other = made()
    other.model.load_state_dict(whole.model.state_dict())
    other.optimizer.load_state_dict(copy.deepcopy(whole.optimizer.state_dict()))
    other.load_state_dict(whole.state_dict())
    assert same(whole.state_dict(), other.state_dict())
    assert len(other.replay.rollouts) == 2
    timed = ("time/", "tokens_per_second")
    for one, two in zip(whole.train(), other.train(), strict=True):
        assert {k: v for k, v in one.items() if not k.startswith(timed)} == {
            k: v for k, v in two.items() if not k.startswith(timed)
        }
    assert same(dict(whole.model.state_dict()), dict(other.model.state_dict()))


def test_replay_is_of_vtrace_alone(make_trainer):
    trainer = make_trainer("actor_critic", algorithm="a2c", max_steps=2)
    trainer.train()
    assert trainer.replay.rollouts == []
    trainer = make_trainer("actor_critic", algorithm="vtrace", replay_size=2, max_steps=4)
    records = trainer.train()
    assert len(trainer.replay.rollouts) == 2
    assert all(r["skipped_updates"] == 0 and r["logprob_gap"] < 1e-5 for r in records)
