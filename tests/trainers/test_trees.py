"""Conversations that branch: shared turns are read once and count as their unshared copies."""

from dataclasses import replace

import pytest
import torch
from hand_losses import assert_same, gradient_of, move, updates

from fastrl.layout import PackedBatch
from fastrl.rollout import Rollout

STILL = {"max_grad_norm": None, "max_new_tokens": 6, "eos_token_id": 7}
# Prompts are roots; what continues what; which tokens the policy wrote.
TURNS = [
    ([1, 2, 3], -1, []),
    ([1, 5, 2], 0, [0, 1, 2]),  # shared by the next two
    ([6, 3, 7], 1, [1, 2]),  # a tool's token first
    ([4, 0, 2, 7], 1, [0, 1, 2, 3]),
    ([2, 2], 0, [0, 1]),
    ([4], -1, []),
    ([3, 1], 5, [0, 1]),  # shared by the next three, of which two share more
    ([6, 6], 6, []),  # a tool's
    ([0, 7], 7, [0, 1]),
    ([5], 7, [0]),
    ([1, 7], 6, [0, 1]),
]
TREE_REWARDS = torch.tensor(
    [0.3, -1, 2, 0.5, 1, -0.2, 0, 1.5, 0.7, 1, -2, 0.4, 0.9, -1, 1.3, 0, 2, 0.6]
)


def shared(trainer, bad=()):
    """The tree as one rollout, and its paths as one without sharing; segments `bad` are unused."""
    segments = [torch.tensor(ids) for ids, _, _ in TURNS]
    masks = [torch.tensor([i in own for i in range(len(ids))]) for ids, _, own in TURNS]
    parents = [parent for _, parent, _ in TURNS]
    counts = [len(own) for *_, own in TURNS]
    rewards = dict(enumerate(TREE_REWARDS.split(counts)))

    def made(segments, parents, masks, is_used, rewards, groups):
        rollout = Rollout(
            batch=PackedBatch.from_segments(segments, parents, masks),
            group_ids=torch.tensor(groups),
            ended=torch.ones(len(groups), dtype=torch.bool),
            logprobs=torch.zeros(sum(int(m.sum()) for m in masks)),
            rewards=torch.cat(rewards),
            is_used=torch.tensor(is_used),
        )
        assert rollout.batch.segment_order.tolist() == list(range(len(segments)))
        return replace(rollout, logprobs=policy_logprobs(trainer, rollout))

    turns = [s for s, parent in enumerate(parents) if parent >= 0]
    one = made(
        segments, parents, masks, [s not in bad for s in turns],
        [rewards[s] for s in turns], [0 if s < 5 else 1 for s in turns],
    )  # fmt: skip
    paths = []
    for leaf in (s for s in turns if s not in parents):
        path = [leaf]
        while parents[path[0]] >= 0:
            path.insert(0, parents[path[0]])
        paths.append(path)
    unshared, from_, own, used, r, groups = [], [], [], [], [], []
    for root in (0, 5):
        place = len(unshared)
        unshared.append(segments[root])
        from_.append(-1)
        own.append(masks[root])
        for path in (p for p in paths if p[0] == root):
            unshared.append(torch.cat([segments[s] for s in path[1:]]))
            from_.append(place)
            own.append(torch.cat([masks[s] for s in path[1:]]))
            used.append(not set(path) & set(bad))
            r.append(torch.cat([rewards[s] for s in path[1:]]))
            groups.append(0 if root == 0 else 1)
    return one, made(unshared, from_, own, used, r, groups)


def policy_logprobs(trainer, rollout):
    hidden = trainer.policy.packed_hidden(rollout.batch)
    log_p = trainer.policy.lm_head(hidden).log_softmax(-1)
    return log_p.gather(1, rollout.token_ids[:, None])[:, 0].detach()


@pytest.mark.parametrize("bad", [(), (3,), (1, 9)])
@pytest.mark.parametrize(
    "kind, config",
    [
        ("policy_gradient", {"gamma": 0.8, "entropy_coef": 0.1}),
        ("policy_gradient", {"baseline": "rloo", "entropy_coef": 0.1}),
        ("policy_gradient", {"algorithm": "grpo", "kl_coef": 0.2}),
        ("policy_gradient", {"algorithm": "rloo"}),
        ("policy_gradient", {"algorithm": "dr_grpo"}),
        ("policy_gradient", {"algorithm": "dapo", "minibatches": 2}),
        ("policy_gradient", {"algorithm": "cispo", "reduction": "sequence_mean"}),
        ("actor_critic", {"advantage": "returns", "gamma": 0.9}),
        ("actor_critic", {"advantage": "gae", "gae_lambda": 0.6, "whiten_advantages": True}),
        ("actor_critic", {"algorithm": "ppo", "entropy_coef": 0.1}),
        ("actor_critic", {"algorithm": "vtrace"}),
    ],
)
def test_shared_turns_have_the_gradient_of_their_unshared_copies(make_trainer, kind, config, bad):
    trainers = [
        make_trainer(kind, learning_rate=1e-12, **{**STILL, "max_new_tokens": 12}, **config)
        for _ in range(2)
    ]
    results = []
    for index, trainer in enumerate(trainers):
        if kind == "actor_critic":
            torch.manual_seed(2)
            torch.nn.init.normal_(trainer.model.value_head.weight)
        move(trainer.model, 0.1)
        rollout = shared(trainer, bad)[index]
        results.append(updates(trainer, rollout)[1])
    assert len(results[0]) == len(results[1]) == config.get("minibatches", 1)
    assert max(g.abs().max() for step in results[0] for g in step) > 1e-3
    for one, other in zip(*results, strict=True):
        assert_same(one, other)


def test_trees_of_one_prompt_are_compared_with_each_other(make_trainer):
    """Groups are as the rollout says, also where a prompt is the root of several trees."""
    trainer = make_trainer(algorithm="grpo", reduction="token_mean", **STILL)
    whole, _ = shared(trainer)
    rollout = replace(whole, group_ids=torch.zeros_like(whole.group_ids))
    paths, rewards = whole.batch.paths(), whole.rewards
    rows = paths.index.split(paths.cu_seqlens.diff().tolist())
    totals = torch.stack([rewards[row].sum() for row in rows])
    advantages = (totals - totals.mean()) / (totals.std() + 1e-4)
    hidden = trainer.policy.packed_hidden(whole.batch)
    log_p = trainer.policy.lm_head(hidden).log_softmax(-1)
    logprobs = log_p.gather(1, whole.token_ids[:, None])[:, 0]
    losses = torch.cat([-logprobs[row] * a for row, a in zip(rows, advantages, strict=True)])
    wanted = gradient_of(trainer, losses.mean())
    _, gradients = updates(trainer, rollout)
    assert_same(gradients[0], wanted)


def test_gspo_has_no_ratio_for_shared_turns(make_trainer):
    trainer = make_trainer(algorithm="gspo", **STILL)
    with pytest.raises(ValueError, match="expected completions without shared turns .*'gspo'"):
        updates(trainer, shared(trainer)[0])
