"""The gradient over all completions, each as likely as it is, is that of the expected return.

No formula of an estimator stands in here: what is differentiated is the sum over completions of
probability times return. So a reward at a wrong token, one that is missed behind an environment's
answer, or a baseline that depends on the token it is taken from, cannot hide.
"""

from dataclasses import replace

import pytest
import torch
from hand_losses import assert_same, gradient_of, move

from fastrl.models import ActorCritic, LSTMLanguageModel
from fastrl.trainers.engines import rollout_of
from fastrl.trainers.experience import gather
from fastrl.trainers.update import learn

EOS, LENGTH, ANSWER = 3, 4, [2, 0]
PROMPT = torch.tensor([1, 2])


def completions(ids=(), own=(), is_answered=False):
    """All of them, and which tokens the policy wrote: its first EOS is answered."""
    if len(ids) >= LENGTH:
        return [(ids[:LENGTH], own[:LENGTH])]
    found = []
    for token in range(4):
        at, mine = (*ids, token), (*own, True)
        if token != EOS:
            found += completions(at, mine, is_answered)
        elif is_answered or len(at) == LENGTH:
            found.append((at, mine))
        else:
            found += completions((*at, *ANSWER), (*mine, False, False), True)
    return found


def rewards_of(ids):
    """Of each token, by what stands before it."""
    return [0.5 * token - 0.3 * i + (i > 0 and ids[i - 1] == token) for i, token in enumerate(ids)]


def log_p_of(policy, ids, temperature):
    """[T, 4], of every next token at each position of a completion."""
    hidden, _ = policy.hidden_states(torch.cat([PROMPT, torch.tensor(ids)])[None])
    return (policy.lm_head(hidden[0, len(PROMPT) - 1 : -1]) / temperature).log_softmax(-1)


def objective(trainer):
    """Expected sum of rewards less the penalty; and the probability of each completion."""
    config = trainer.config
    total, probabilities = torch.zeros(()), []
    for ids, own in completions():
        at, mine = torch.tensor(ids)[:, None], torch.tensor(own)
        ours, theirs = (
            log_p_of(policy, ids, config.temperature)[mine]
            for policy in (trainer.policy, trainer.reference)
        )
        logprobs, ref_logprobs = ours.gather(1, at[mine])[:, 0], theirs.gather(1, at[mine])[:, 0]
        value = torch.tensor(rewards_of(ids))[mine].sum()
        if config.kl_in == "reward":  # the divergence of whole completions
            value = value - config.kl_coef * (logprobs - ref_logprobs).detach().sum()
        p = logprobs.sum().exp()
        total = total + p * value
        if config.kl_in == "loss":  # that of each token, where the policy comes to it
            kl = (ours.exp() * (ours - theirs.detach())).sum(-1)
            total = total - config.kl_coef * p.detach() * kl.sum()
        probabilities.append(p.detach())
    return total, torch.stack(probabilities)


@pytest.mark.parametrize(
    "kind, config",
    [
        ("policy_gradient", {"temperature": 0.7}),
        ("policy_gradient", {"kl_in": "reward"}),
        ("policy_gradient", {"algorithm": "cispo", "advantage": "returns"}),
        ("actor_critic", {"kl_in": "reward", "temperature": 1.5}),
        ("actor_critic", {"algorithm": "ppo", "gae_lambda": 1.0, "whiten_advantages": False}),
    ],
)
def test_the_expected_gradient_is_that_of_the_expected_return(make_trainer, kind, config):
    torch.manual_seed(0)
    model = LSTMLanguageModel(4, 4, 8, 1)
    config = config | ({"critic_coef": 0.0} if kind == "actor_critic" else {})
    trainer = make_trainer(
        kind, lambda completion_ids, **_: [rewards_of(ids) for ids in completion_ids],
        model=ActorCritic(model) if kind == "actor_critic" else model, dataset=[PROMPT],
        max_new_tokens=LENGTH, eos_token_id=EOS, kl_coef=0.5, max_grad_norm=None,
        **config,
    )  # fmt: skip
    move(trainer.model, 0.4)  # values as they come: a baseline
    expected, probabilities = objective(trainer)
    assert probabilities.sum().item() == pytest.approx(1, abs=1e-5)
    wanted = [-g for g in gradient_of(trainer, expected)]

    ids, own = zip(*completions(), strict=True)
    with torch.no_grad():
        every = [log_p_of(trainer.policy, x, trainer.temperature) for x in ids]
        given = [
            log_p.gather(1, torch.tensor(x)[:, None])[:, 0].tolist()
            for log_p, x in zip(every, ids, strict=True)
        ]
    result = {"completion_ids": [ids], "logprobs": [given], "loss_mask": [own]}
    rollout = rollout_of(result, [PROMPT], [EOS], torch.device("cpu"))
    scores = trainer.scored([trainer.dataset[0]], rollout, trainer.dataset)
    rollout = replace(rollout, rewards=scores.rewards, is_used=scores.is_used)
    known, _ = gather(trainer, rollout)
    # A mean over tokens becomes a sum over completions that counts each as likely as it is.
    likely = len(rollout.logprobs) * probabilities.repeat_interleave(rollout.lengths)
    got = []
    trainer.optimizer.register_step_pre_hook(
        lambda *_: got.extend(
            torch.zeros_like(p) if p.grad is None else p.grad.clone()
            for p in trainer.model.parameters()
        )
    )
    learn(trainer, replace(known, weights=likely))
    assert max(g.abs().max() for g in wanted) > 0.1
    assert_same(got, wanted, atol=1e-5)
