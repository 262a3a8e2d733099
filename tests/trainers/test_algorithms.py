"""Each algorithm's loss and gradient by hand, for a policy that is not the one that sampled."""

import pytest
import torch
from hand_losses import (
    USED,
    assert_learns,
    assert_same,
    clipped,
    gae_of,
    move,
    returns_of,
    rollout_with_rewards,
    rows_of,
    updates,
)

EXTRAS = [
    {},
    {"kl_coef": 0.3, "entropy_coef": 0.2},
    {"kl_coef": 0.3, "kl_estimator": "k3"},
    {"kl_coef": 0.3, "kl_in": "reward"},
    {"mask_truncated": True},
]
CRITIC_EXTRAS = [*EXTRAS, {"critic_coef": 0.9, "whiten_advantages": False}]
MANY_TOKENS = 6  # max_new_tokens


def moved(make_trainer, kind, is_used=USED[1], **config):
    """A trainer whose policy has moved away from the start, a rollout of it, and its rows after
    it has moved on: ratios are then not 1, divergences not 0."""
    trainer = make_trainer(
        kind, max_grad_norm=None, max_new_tokens=MANY_TOKENS, eos_token_id=7, **config
    )
    if kind == "actor_critic":
        torch.manual_seed(2)
        torch.nn.init.normal_(trainer.model.value_head.weight)
    move(trainer.model, 0.2)
    rollout = rollout_with_rewards(trainer, is_used)
    move(trainer.model, 0.25, seed=4)
    return trainer, rollout, rows_of(trainer, rollout)


def rewards_of(row, config):
    """With the divergence of the policy that sampled, where it is a part of the reward."""
    if config.kl_coef and config.kl_in == "reward":
        return row.rewards - config.kl_coef * (row.old_logprobs - row.ref_logprobs)
    return row.rewards


def compared(rows, config, kind):
    """Of each row, against the used ones of its prompt: truncated ones are compared with too."""
    totals = [rewards_of(row, config).sum() for row in rows]
    advantages = []
    for i, row in enumerate(rows):
        group = [j for j, r in enumerate(rows) if r.group == row.group and r.is_used]
        r = torch.stack([totals[j] for j in group])
        if kind == "rloo":
            others = torch.stack([totals[j] for j in group if j != i])
            advantages.append(totals[i] - others.mean())
        else:
            scale = r.std() + 1e-4 if kind == "grpo" else 1.0
            advantages.append((totals[i] - r.mean()) / scale)
    return advantages


def counted(rows, config):
    return [i for i, r in enumerate(rows) if r.is_used and (r.ended or not config.mask_truncated)]


def with_penalties(row, losses, config):
    """[n] losses of a row's tokens, and what every algorithm adds to them."""
    if config.kl_coef and config.kl_in == "loss":
        d = row.logprobs - row.ref_logprobs
        kl = d.square() / 2 if config.kl_estimator == "k2" else (-d).exp() - 1 + d
        losses = losses + config.kl_coef * kl
    return losses - config.entropy_coef * row.entropies


def token_mean(losses):
    return torch.cat(losses).mean()


def ratios(row):
    return (row.logprobs - row.old_logprobs).exp()


def assert_some_are_clipped(surrogates, low, high):
    """On either side, where the bound takes the gradient and where it does not."""
    ratio = torch.cat([r.detach().expand(n) for r, _, n in surrogates])
    is_up = torch.cat([(a > 0).expand(n) for _, a, n in surrogates])
    for outside in (ratio < 1 - low, ratio > 1 + high):
        for side in (is_up, ~is_up):
            assert (outside & side).any() and (~outside & side).any()


def by_hand(rows, config):
    """The loss of a policy-gradient algorithm, from its paper."""
    name = config.algorithm
    used = counted(rows, config)
    if name == "reinforce":
        losses = []
        for row in (rows[i] for i in used):
            loss = -row.logprobs * returns_of(rewards_of(row, config), 1.0)
            losses.append(with_penalties(row, loss, config))
        return token_mean(losses)
    kind = name if name in ("rloo", "dr_grpo") else "grpo"
    advantages = compared(rows, config, kind)
    losses = []
    for i in used:
        row, a = rows[i], advantages[i]
        ratio = ratios(row)
        if name == "cispo":
            loss = -ratio.detach().clamp(max=5.0) * a * row.logprobs
        elif name == "gspo":  # s = (pi / old)^(1/n), gradient s a mean(grad log pi)
            s = (row.logprobs - row.old_logprobs).mean().exp()
            loss = -clipped(s, a, 3e-4, 4e-4).expand(len(ratio))
        else:
            loss = -clipped(ratio, a, 0.2, 0.28 if name == "dapo" else 0.2)
        losses.append(with_penalties(row, loss, config))
    if name == "rloo":
        return torch.stack([x.sum() for x in losses]).mean()
    if name in ("grpo", "gspo"):
        return torch.stack([x.mean() for x in losses]).mean()
    if name == "dr_grpo":
        return torch.stack([x.sum() for x in losses]).mean() / MANY_TOKENS
    return token_mean(losses)


ALGORITHMS = ["reinforce", "rloo", "grpo", "dr_grpo", "dapo", "gspo", "cispo"]


@pytest.mark.parametrize("is_used", USED)
@pytest.mark.parametrize("extra", EXTRAS)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_policy_gradient(make_trainer, algorithm, extra, is_used):
    trainer, rollout, rows = moved(
        make_trainer, "policy_gradient", is_used, algorithm=algorithm, **extra
    )
    assert_learns(trainer, rollout, by_hand(rows, trainer.config))


@pytest.mark.parametrize("algorithm", ["rloo", "grpo", "dapo", "gspo"])
def test_ratios_leave_their_bounds_on_either_side_and_are_counted(make_trainer, algorithm):
    """As TRL counts: only where the bound takes the gradient away; of GSPO the sequence's."""
    trainer, rollout, rows = moved(make_trainer, "policy_gradient", algorithm=algorithm)
    config = trainer.config
    advantages = compared(rows, config, "rloo" if algorithm == "rloo" else "grpo")
    low = high = total = 0
    surrogates = []
    for i in counted(rows, config):
        ratio, a = ratios(rows[i]).detach(), advantages[i]
        n = len(ratio)
        if algorithm == "gspo":
            ratio = ratio.log().mean().exp().expand(n)
        surrogates.append((ratio, a, n))
        low += int((ratio < 1 - config.clip_low).sum()) if a < 0 else 0
        high += int((ratio > 1 + config.clip_high).sum()) if a > 0 else 0
        total += n
    if algorithm != "gspo":
        assert_some_are_clipped(surrogates, config.clip_low, config.clip_high)
    assert low > 0 and high > 0
    numbers, _ = updates(trainer, rollout)
    assert numbers["clip_ratio/low_mean"] == pytest.approx(low / total)
    assert numbers["clip_ratio/high_mean"] == pytest.approx(high / total)
    assert numbers["clip_ratio/region_mean"] == pytest.approx((low + high) / total)


def test_gspo_clips_on_either_side_and_lets_others_through(make_trainer):
    """Bounds between the sequences' ratios, so that some are clipped and some are not."""
    bounds = {"clip_low": 0.05, "clip_high": 0.05}
    trainer, rollout, rows = moved(make_trainer, "policy_gradient", algorithm="gspo", **bounds)
    advantages, losses, sides = compared(rows, trainer.config, "grpo"), [], set()
    lost = total = 0  # tokens
    for i in counted(rows, trainer.config):
        s = (rows[i].logprobs - rows[i].old_logprobs).mean().exp()
        losses.append(-clipped(s, advantages[i], 0.05, 0.05))
        side = -1 if s < 0.95 else 1 if s > 1.05 else 0
        sides.add((side, bool(advantages[i] > 0)))
        total += len(rows[i].rewards)
        lost += len(rows[i].rewards) * ((side, bool(advantages[i] > 0)) in {(-1, False), (1, True)})
    assert {(-1, False), (1, True)} <= sides  # no gradient
    assert sides & {(-1, True), (1, False), (0, True), (0, False)}
    numbers = assert_learns(trainer, rollout, torch.stack(losses).mean())
    assert numbers["clip_ratio/region_mean"] == pytest.approx(lost / total)


def test_cispo_bounds_the_weight_and_keeps_the_gradient(make_trainer):
    bounds = {"clip_low": 0.1, "clip_high": 0.1}
    trainer, rollout, rows = moved(make_trainer, "policy_gradient", algorithm="cispo", **bounds)
    advantages, losses = compared(rows, trainer.config, "grpo"), []
    for i in counted(rows, trainer.config):
        weight = ratios(rows[i]).detach().clamp(0.9, 1.1)
        losses.append(-weight * advantages[i] * rows[i].logprobs)
    assert_learns(trainer, rollout, token_mean(losses))


@pytest.mark.parametrize("kind, algorithm", [("policy_gradient", "grpo"), ("actor_critic", "ppo")])
def test_dual_clip_bounds_the_ratio_of_bad_tokens(make_trainer, kind, algorithm):
    trainer, rollout, rows = moved(make_trainer, kind, algorithm=algorithm, dual_clip=1.15)
    config, losses, is_bounded = trainer.config, [], []
    used = counted(rows, config)
    if kind == "policy_gradient":
        advantages = compared(rows, config, "grpo")
        for i in used:
            ratio, a = ratios(rows[i]), advantages[i]
            losses.append(-clipped(ratio, a, 0.2, 0.2, 1.15).mean())
            is_bounded.append((ratio > 1.15) & (a < 0))
        expected = torch.stack(losses).mean()
    else:
        whitened, returns = ppo_targets(rows, config)
        for i in used:
            ratio, a = ratios(rows[i]), whitened[i]
            is_bounded.append((ratio > 1.15) & (a < 0))
            critic = 0.5 * (returns[i] - rows[i].values).square()
            losses.append(critic - clipped(ratio, a, 0.2, 0.2, 1.15))
        expected = token_mean(losses)
    is_bounded = torch.cat(is_bounded)
    assert is_bounded.any() and not is_bounded.all()
    assert_learns(trainer, rollout, expected)


def ppo_targets(rows, config, gamma=1.0, gae_lambda=0.95):
    """Of each row: advantages, of all that count together at mean 0 and deviation 1; returns."""
    advantages = [
        gae_of(rewards_of(row, config), row.old_values, gamma, gae_lambda) for row in rows
    ]
    returns = [a + row.old_values for a, row in zip(advantages, rows, strict=True)]
    if config.whiten_advantages:
        every = torch.cat([advantages[i] for i in counted(rows, config)])
        advantages = [(a - every.mean()) / every.std() for a in advantages]
    return advantages, returns


@pytest.mark.parametrize("is_used", USED)
@pytest.mark.parametrize("extra", CRITIC_EXTRAS)
def test_ppo(make_trainer, extra, is_used):
    options = {"gamma": 0.9, "gae_lambda": 0.7, "clip_low": 0.1, "clip_high": 0.15, **extra}
    trainer, rollout, rows = moved(
        make_trainer, "actor_critic", is_used, algorithm="ppo", **options
    )
    config = trainer.config
    advantages, returns = ppo_targets(rows, config, 0.9, 0.7)
    losses = []
    for i in counted(rows, config):
        row = rows[i]
        actor = -clipped(ratios(row), advantages[i], 0.1, 0.15)
        critic = config.critic_coef * (returns[i] - row.values).square()
        losses.append(with_penalties(row, actor, config) + critic)
    assert_learns(trainer, rollout, token_mean(losses))


def test_value_clip_stops_values_that_have_moved(make_trainer):
    trainer, rollout, rows = moved(make_trainer, "actor_critic", algorithm="ppo", value_clip=0.4)
    advantages, returns = ppo_targets(rows, trainer.config)
    losses, is_stopped = [], []
    for i in counted(rows, trainer.config):
        row, target = rows[i], returns[i]
        near = row.old_values + (row.values - row.old_values).clamp(-0.4, 0.4)
        errors = (target - row.values).square(), (target - near).square()
        is_stopped.append((errors[1] > errors[0]).detach())
        losses.append(0.5 * torch.maximum(*errors) - clipped(ratios(row), advantages[i], 0.2, 0.2))
    is_stopped = torch.cat(is_stopped)
    assert is_stopped.any() and not is_stopped.all()
    assert_learns(trainer, rollout, token_mean(losses))


@pytest.mark.parametrize("is_used", USED)
@pytest.mark.parametrize("extra", CRITIC_EXTRAS)
@pytest.mark.parametrize("advantage", ["returns", "gae"])
def test_a2c(make_trainer, advantage, extra, is_used):
    """The values are those of the critic that sampled, recorded then."""
    options = {"gamma": 0.9, "advantage": advantage, **extra}
    options |= {"gae_lambda": 0.7} if advantage == "gae" else {}
    trainer, rollout, rows = moved(make_trainer, "actor_critic", is_used, **options)
    config, losses = trainer.config, []
    for i in counted(rows, config):
        row = rows[i]
        rewards = rewards_of(row, config)
        if advantage == "gae":
            a = gae_of(rewards, row.old_values, 0.9, 0.7)
        else:
            a = returns_of(rewards, 0.9) - row.old_values
        critic = config.critic_coef * (a + row.old_values - row.values).square()
        losses.append(with_penalties(row, -row.logprobs * a, config) + critic)
    assert_learns(trainer, rollout, token_mean(losses))


@pytest.mark.parametrize("algorithm", ["grpo", "gspo", "cispo"])
def test_the_first_step_is_reinforce_with_the_same_advantages(make_trainer, algorithm):
    """While the policy is the one that sampled, a ratio's gradient is that of the log-prob."""

    def step(name):
        trainer = make_trainer(
            algorithm=name, advantage="grpo", reduction="sequence_mean", max_grad_norm=None,
            max_new_tokens=6, eos_token_id=7,
        )  # fmt: skip
        return updates(trainer, rollout_with_rewards(trainer, USED[1]))[1][0]

    assert_same(step("reinforce"), step(algorithm))


def test_ppos_first_step_is_a2c_with_the_same_advantages(make_trainer):
    def step(algorithm):
        trainer = make_trainer(
            "actor_critic", algorithm=algorithm, advantage="gae", whiten_advantages=True,
            max_grad_norm=None, max_new_tokens=6, eos_token_id=7,
        )  # fmt: skip
        return updates(trainer, rollout_with_rewards(trainer, USED[1]))[1][0]

    assert_same(step("a2c"), step("ppo"))


def test_later_epochs_see_the_ratio_to_the_policy_that_sampled(make_trainer):
    """Two epochs in one update are two updates on the same rollout, by hand."""
    options = {"algorithm": "ppo", "learning_rate": 0.02, "max_new_tokens": 6, "eos_token_id": 7}
    trainer = make_trainer("actor_critic", epochs=2, max_grad_norm=None, **options)
    rollout = rollout_with_rewards(trainer, USED[1])
    _, gradients = updates(trainer, rollout)
    by_one = make_trainer("actor_critic", max_grad_norm=None, **options)
    updates(by_one, rollout)
    rows = rows_of(by_one, rollout)
    assert max(abs(ratios(row) - 1).max() for row in rows) > 0.05
    advantages, returns = ppo_targets(rows, by_one.config)
    losses = [
        0.5 * (returns[i] - rows[i].values).square()
        - clipped(ratios(rows[i]), advantages[i], 0.2, 0.2)
        for i in counted(rows, by_one.config)
    ]
    wanted = torch.autograd.grad(token_mean(losses), list(by_one.model.parameters()))
    assert len(gradients) == 2
    assert_same(gradients[1], wanted)
