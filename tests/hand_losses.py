"""Losses of the trainers written out token by token, and an update's own loss and gradients."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastrl.rollout import completion_seeds, generate
from fastrl.trainers.experience import gather
from fastrl.trainers.update import learn

EOS = 7
PROMPTS = [torch.tensor([1, 2, 3]), torch.tensor([4])]
# Which completions count: all, and all but two.
USED = [(True,) * 8, (True, False, True, True, True, True, True, False)]


def rollout_with_rewards(trainer, is_used=USED[0], seed=5):
    """8 ragged completions with random rewards, from the trainer's policy as it is now."""
    rollout = generate(
        trainer.policy,
        PROMPTS,
        completions_per_prompt=4,
        max_new_tokens=6,
        seeds=completion_seeds(seed, 0, torch.arange(2), 4),
        temperature=trainer.temperature,
        eos_token_id=EOS,
        value_fn=trainer.values_while_sampling(),
    )
    assert rollout.lengths.unique().numel() > 1
    assert rollout.ended.any() and not rollout.ended.all()
    rewards = torch.randn(len(rollout.token_ids), generator=torch.Generator().manual_seed(seed))
    return replace(rollout, rewards=rewards, is_used=torch.tensor(is_used))


def move(model, by=0.1, seed=3):
    """Take the weights away from where they are."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(by * torch.randn(parameter.shape, generator=generator))


@dataclass
class Row:
    """One completion of n tokens; logprobs, entropies and values have a graph."""

    logprobs: Tensor
    entropies: Tensor
    values: Tensor | None
    ref_logprobs: Tensor | None
    old_logprobs: Tensor
    old_values: Tensor | None
    rewards: Tensor
    group: int
    ended: bool
    is_used: bool


def scored(policy, prompt, ids, temperature=1.0):
    """Log-probs and entropies of a completion's ids, and the hidden states that predict them."""
    hidden, _ = policy.hidden_states(torch.cat([prompt, ids])[None])
    hidden = hidden[0, len(prompt) - 1 : -1]
    log_p = (policy.lm_head(hidden) / temperature).log_softmax(-1)
    entropies = -(log_p.exp() * log_p).sum(-1)
    return log_p.gather(1, ids[:, None])[:, 0], entropies, hidden


def rows_of(trainer, rollout, prompts=PROMPTS):
    """Each completion by itself, its prompt read anew."""
    policy, lengths = trainer.policy, rollout.lengths.tolist()
    old, rewards = rollout.logprobs.split(lengths), rollout.rewards.split(lengths)
    old_values = None if rollout.values is None else rollout.values.split(lengths)
    rows = []
    for i, ids in enumerate(rollout.completion_ids):
        group = int(rollout.group_ids[i])
        at = (prompts[group], ids, trainer.temperature)
        logprobs, entropies, hidden = scored(policy, *at)
        values = None
        if hasattr(trainer.model, "values"):
            critic = trainer.model.critic
            values = trainer.model.values(hidden if critic is None else scored(critic, *at)[2])
        ref = None
        if trainer.reference is not None:
            with torch.no_grad():
                ref, _, _ = scored(trainer.reference, *at)
        rows.append(
            Row(
                logprobs, entropies, values, ref, old[i],
                None if old_values is None else old_values[i], rewards[i],
                group, bool(rollout.ended[i]), bool(rollout.is_used[i]),
            )
        )  # fmt: skip
    return rows


def returns_of(rewards, gamma):
    """G_t = r_t + gamma G_{t+1}."""
    returns, following = [], 0.0
    for reward in reversed(rewards.tolist()):
        following = reward + gamma * following
        returns.insert(0, following)
    return torch.tensor(returns)


def gae_of(rewards, values, gamma, gae_lambda):
    following = torch.cat([values[1:], torch.zeros(1)])
    return returns_of(rewards + gamma * following - values, gamma * gae_lambda)


def clipped(ratio, advantage, low, high, dual=None):
    """min(ratio A, clip(ratio) A), and for A < 0 not below dual A; [n], advantage [n]."""
    surrogate = torch.minimum(ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage)
    if dual is None:
        return surrogate
    return torch.where(advantage < 0, torch.maximum(surrogate, dual * advantage), surrogate)


def updates(trainer, rollout):
    """What `learn` makes of a rollout: its numbers, and the gradients of each optimizer step."""
    gradients = []

    def capture(*_):
        gradients.append(
            [
                torch.zeros_like(p) if p.grad is None else p.grad.clone()
                for p in trainer.model.parameters()
            ]
        )

    hook = trainer.optimizer.register_step_pre_hook(capture)
    known, _ = gather(trainer, rollout)
    numbers, problem = learn(trainer, known)
    hook.remove()
    assert problem is None
    return numbers, gradients


def gradient_of(trainer, loss):
    parameters = list(trainer.model.parameters())
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]


def assert_same(got, wanted, atol=1e-6, rtol=1e-4):
    assert len(got) == len(wanted)
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other, atol=atol, rtol=rtol)


def assert_learns(trainer, rollout, expected):
    """The one gradient step on a rollout has this loss and its gradient."""
    wanted = gradient_of(trainer, expected)
    assert any(g.abs().max() > 1e-3 for g in wanted)
    numbers, gradients = updates(trainer, rollout)
    torch.testing.assert_close(
        torch.tensor(numbers["loss"]), expected.detach().cpu(), atol=1e-6, rtol=1e-5
    )
    assert len(gradients) == 1
    assert_same(gradients[0], wanted)
    return numbers
