"""Rollouts from elsewhere: other engines, whose tokens are weighed with their importance."""

import math
from dataclasses import replace

import pytest
import torch
from hand_losses import (
    assert_same,
    clipped,
    gae_of,
    gradient_of,
    move,
    returns_of,
    scored,
)

from fastrl.layout import PackedBatch
from fastrl.rollout import Rollout, generate
from fastrl.trainers.engines import rollout_of

PROMPTS = [torch.tensor([1, 2, 3]), torch.tensor([4]), torch.tensor([2, 5])]
IDS = [[[1, 2, 7], [3], [4, 4, 4, 4]], [[5, 7]], [[0, 1, 7], [6, 6]]]
OFFSETS = [
    [[0.2, -0.9, 0.0], [1.5], [0.1, -0.1, 0.3, -2.0]],
    [[0.0, 0.4]],
    [[-0.3, 0.7, 0.2], [0, 0]],
]
MASK = [[[True, False, True], [True], [True] * 4], [[True, True]], [[True] * 3, [False, True]]]
STILL = {"max_grad_norm": None, "max_new_tokens": 6, "eos_token_id": 7}
IN_ORDER = {"prompts_per_step": 3, "seed": 0}


def flat(groups):
    return [entry for group in groups for entry in group]


def engine(logprobs=True, mask=None, ended=None, calls=None):
    """Another engine: the policy's log-probs, each off by what OFFSETS says; never above 0."""

    def rollout_function(prompts, policy, **rest):
        if calls is not None:
            calls.append({"prompts": prompts, "policy": policy, **rest})
        assert sorted(map(tuple, prompts)) == sorted(tuple(p.tolist()) for p in PROMPTS)
        order = [[p.tolist() for p in PROMPTS].index(prompt) for prompt in prompts]
        given = []
        for g in order:
            rows = []
            for ids, offsets in zip(IDS[g], OFFSETS[g], strict=True):
                with torch.no_grad():
                    own = scored(policy, PROMPTS[g], torch.tensor(ids))[0].tolist()
                rows.append([min(0.0, x + o) for x, o in zip(own, offsets, strict=True)])
            given.append(rows)
        result = {"completion_ids": [IDS[g] for g in order], "logprobs": given}
        if mask is not None:
            result["loss_mask"] = [mask[g] for g in order]
        if ended is not None:
            result["ended"] = [ended[g] for g in order]
        return result

    return rollout_function


def by_token(prompts, completion_ids, **_):
    return [
        [(sum(p) + t + i) % 5 / 2 for i, t in enumerate(ids)]
        for p, ids in zip(prompts, completion_ids, strict=True)
    ]


def engine_rows(trainer, mask):
    """Of each completion: own log-probs, entropies, capped weights, rewards, values; by hand."""
    rows = []
    for g, prompt in enumerate(PROMPTS):
        for ids, offsets, own in zip(IDS[g], OFFSETS[g], mask[g], strict=True):
            at = torch.tensor(own)
            logprobs, entropies, hidden = scored(trainer.policy, prompt, torch.tensor(ids))
            given = (logprobs.detach() + torch.tensor(offsets)).clamp(max=0.0)
            weights = (logprobs.detach() - given).exp().clamp(max=2.0)
            rewards = torch.tensor(by_token([prompt.tolist()], [ids])[0])
            values = trainer.model.values(hidden)[at] if hasattr(trainer.model, "values") else None
            rows.append(
                (logprobs[at], entropies[at], weights[at], rewards[at], values, g, given[at])
            )
    return rows


def one_step(trainer):
    """A step of training: its record, and the gradients before the step is taken."""
    gradients = []
    trainer.optimizer.register_step_pre_hook(
        lambda *_: gradients.append(
            [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in trainer.parameters]
        )
    )
    return trainer.train(max_steps=1)[0], gradients[0]


@pytest.mark.parametrize("mask", [None, MASK])
def test_an_engines_tokens_are_weighed_with_their_importance(make_trainer, mask):
    calls = []
    trainer = make_trainer(
        reward_functions=by_token, rollout_function=engine(mask=mask, calls=calls), gamma=0.8,
        entropy_coef=0.1, temperature=1.0, **STILL, **IN_ORDER,
    )  # fmt: skip
    every = [[[True] * len(ids) for ids in group] for group in IDS]
    rows = engine_rows(trainer, mask or every)
    losses = torch.cat([-w * x * returns_of(r, 0.8) - 0.1 * h for x, h, w, r, *_ in rows])
    wanted = gradient_of(trainer, losses.mean())
    record, gradient = one_step(trainer)
    assert record["loss"] == pytest.approx(losses.mean().item(), rel=1e-5)
    assert_same(gradient, wanted)
    weights = torch.cat([w for _, _, w, *_ in rows])
    assert weights.max() == 2 and weights.min() < 0.5
    gaps = torch.cat([(x - given).abs().detach() for x, *_, given in rows])
    name = "sampling/importance_sampling_ratio"
    assert record[f"{name}/min"] == pytest.approx(weights.min().item(), rel=1e-5)
    assert record[f"{name}/mean"] == pytest.approx(weights.mean().item(), rel=1e-5)
    assert record[f"{name}/max"] == pytest.approx(2.0)
    assert record["logprob_gap"] == pytest.approx(gaps.max().item(), rel=1e-4)
    name = "sampling/sampling_logp_difference"
    assert record[f"{name}/mean"] == pytest.approx(gaps.mean().item(), rel=1e-4)
    assert record[f"{name}/max"] == pytest.approx(gaps.max().item(), rel=1e-4)
    assert record["completions/clipped_ratio"] == pytest.approx(3 / 6)  # the last id is no EOS
    [call] = calls
    assert call["policy"] is trainer.policy and call["eos_token_ids"] == [7]
    assert (call["completions_per_prompt"], call["max_new_tokens"]) == (4, 6)
    assert call["temperature"] == 1.0 and len(set(call["seeds"])) == 12


def test_a_cap_without_tokens_to_weigh_is_an_error(make_trainer):
    with pytest.raises(ValueError, match="expected importance_cap 2.0 without .*, got 3.0"):
        make_trainer(importance_cap=3.0)
    make_trainer("actor_critic", algorithm="vtrace", replay_size=1, importance_cap=3.0)
    make_trainer(rollout_function=engine(), importance_cap=3.0)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_the_gradient_of_k2_is_that_of_the_divergence_whoever_samples(make_trainer, temperature):
    """All eight next tokens, once each: what an engine that takes each as often samples."""
    prompt = torch.tensor([1, 2])

    def uniform(**_):
        ids = [[[token] for token in range(8)]]
        return {"completion_ids": ids, "logprobs": [[[-math.log(8)]] * 8]}

    trainer = make_trainer(
        reward_functions=lambda completion_ids, **_: [0.0] * len(completion_ids),
        rollout_function=uniform, dataset=[prompt], prompts_per_step=1, completions_per_prompt=8,
        kl_coef=1.0, importance_cap=1e3, temperature=temperature, **STILL,
    )  # fmt: skip
    move(trainer.policy, 0.5)
    ours, theirs = (
        (policy.lm_head(policy.hidden_states(prompt[None])[0][0, -1]) / temperature).log_softmax(-1)
        for policy in (trainer.policy, trainer.reference)
    )
    wanted = gradient_of(trainer, (ours.exp() * (ours - theirs.detach())).sum())
    assert_same(one_step(trainer)[1], wanted)


@pytest.mark.parametrize(
    "kind, config",
    [
        ("policy_gradient", {"algorithm": "grpo", "importance_cap": 2.0}),
        ("actor_critic", {"algorithm": "ppo", "whiten_advantages": False}),
        ("actor_critic", {"algorithm": "vtrace", "gae_lambda": 1.0}),
    ],
)
def test_importance_in_other_losses(make_trainer, kind, config):
    """Beside the ratio of PPO, which starts at 1; V-trace has its own."""
    trainer = make_trainer(
        kind, by_token, rollout_function=engine(mask=MASK), **config, **STILL, **IN_ORDER
    )
    if kind == "actor_critic":
        torch.nn.init.normal_(trainer.model.value_head.weight)
    rows = engine_rows(trainer, MASK)
    totals = [r.sum() for _, _, _, r, *_ in rows]
    losses = []
    for i, (x, _, w, r, v, g, given) in enumerate(rows):
        ratio = (x - x.detach()).exp()
        if kind == "policy_gradient":
            group = torch.stack([t for t, row in zip(totals, rows, strict=True) if row[5] == g])
            a = (
                (totals[i] - group.mean()) / (group.std() + 1e-4)
                if len(group) > 1
                else torch.zeros(())
            )
            losses.append((-w * clipped(ratio, a, 0.2, 0.2)).mean())
            continue
        old = v.detach()
        if config["algorithm"] == "ppo":
            a = gae_of(r, old, 1.0, 0.95)
            losses.append(-w * clipped(ratio, a, 0.2, 0.2) + 0.5 * (a + old - v).square())
            continue
        rho = (x.detach() - given).exp().clamp(max=1.0)
        after, vs = torch.cat([old[1:], torch.zeros(1)]), torch.zeros(len(r) + 1)
        for t in reversed(range(len(r))):
            behind = vs[t + 1] - after[t]
            vs[t] = old[t] + rho[t] * (r[t] + after[t] - old[t]) + rho[t] * behind
        a = rho * (r + vs[1:] - old)
        losses.append(-x * a + 0.5 * (vs[:-1] - v).square())
    loss = torch.stack(losses).mean() if kind == "policy_gradient" else torch.cat(losses).mean()
    wanted = gradient_of(trainer, loss)
    record, gradient = one_step(trainer)
    assert record["loss"] == pytest.approx(loss.item(), rel=1e-5, abs=1e-6)
    assert_same(gradient, wanted)


def test_ended_is_as_told_or_by_the_last_id():
    result = {"completion_ids": IDS, "logprobs": [[[-1.0] * len(c) for c in g] for g in IDS]}
    cpu = torch.device("cpu")
    assert rollout_of(result, PROMPTS, [7], cpu).ended.tolist() == [1, 0, 0, 1, 1, 0]
    assert rollout_of(result, PROMPTS, [7, 6], cpu).ended.tolist() == [1, 0, 0, 1, 1, 1]
    told = result | {"ended": [[False, True, False], [True], [False, False]]}
    rollout = rollout_of(told, PROMPTS, [7], cpu)
    assert rollout.ended.tolist() == [0, 1, 0, 1, 0, 0]
    assert rollout.group_ids.tolist() == [0, 0, 0, 1, 2, 2]
    assert [c.tolist() for c in rollout.completion_ids] == flat(IDS)


def test_tokens_that_the_policy_did_not_write_need_no_logprob():
    result = {
        "completion_ids": [[[1, 2, 7]]],
        "logprobs": [[[-1.0, math.nan, -0.5]]],
        "loss_mask": [[[True, False, True]]],
    }
    rollout = rollout_of(result, PROMPTS[:1], [7], torch.device("cpu"))
    assert rollout.token_ids.tolist() == [1, 7] and rollout.logprobs.tolist() == [-1.0, -0.5]
    assert rollout.is_target[0].tolist() == [True, False, True]


GOOD = {"completion_ids": [[[1, 2]], [[3]]], "logprobs": [[[-1.0, -2.0]], [[-3.0]]]}


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda r: [r], 'a dict with "completion_ids" and "logprobs", or a Rollout, got list'),
        (lambda r: {"completion_ids": r["completion_ids"]}, r"got \['completion_ids'\]"),
        (lambda r: r | {"completion_ids": [[[1, 2]]]}, "each of the 2 prompts, got 1"),
        (lambda r: r | {"logprobs": None}, "each of the 2 prompts, got NoneType"),
        (lambda r: r | {"logprobs": [[[-1.0, -2.0]], []]}, r"logprobs of \[1, 1\] .* got \[1, 0\]"),
        (lambda r: r | {"logprobs": [[[-1.0]], [[-3.0]]]}, "2 logprobs for completion 0, .* got 1"),
        (lambda r: r | {"logprobs": [[[-1.0, 0.5]], [[-3.0]]]}, "logprobs <= 0 .* got 0.5"),
        (lambda r: r | {"logprobs": [[[-1.0, math.nan]], [[-3.0]]]}, "logprobs <= 0 .* got nan"),
        (lambda r: r | {"loss_mask": [[[True]], [[True]]]}, "2 loss_mask for .* 0, .* got 1"),
        (lambda r: r | {"rewards": [[1.0], [0.0]]}, "loss_mask, ended alone, got rewards"),
        (lambda r: r | {"ended": [[True], []]}, r"ended of \[1, 1\] completions, .* got \[1, 0\]"),
    ],
)  # fmt: skip
def test_what_is_malformed_is_an_error(change, message):
    with pytest.raises(ValueError, match=f"^rollout_function: expected .*{message}"):
        rollout_of(change(dict(GOOD)), PROMPTS[:2], [7], torch.device("cpu"))


ROLLOUT = Rollout(
    batch=PackedBatch.from_segments([PROMPTS[0], torch.tensor([1, 7])], [-1, 0]),
    group_ids=torch.tensor([1]),
    ended=torch.tensor([True]),
    logprobs=torch.tensor([-1.0, -2.0]),
)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"logprobs": torch.tensor([-1.0])}, r"logprobs \[2\], got \(1,\)"),
        ({"logprobs": torch.tensor([-1.0, math.nan])}, "logprobs <= 0, got nan"),
        ({"ended": torch.tensor(True)}, r"ended \[1\], got \(\)"),
        ({"rewards": torch.zeros(1)}, r"rewards \[2\], got \(1,\)"),
        ({"group_ids": torch.tensor([2])}, r"group_ids in \[0, 2\), got \[2\]"),
    ],
)
def test_a_rollout_that_does_not_fit_is_an_error(change, message):
    cpu = torch.device("cpu")
    assert rollout_of(ROLLOUT, PROMPTS[:2], [7], cpu) is ROLLOUT
    with pytest.raises(ValueError, match=f"^rollout_function: expected a Rollout with {message}"):
        rollout_of(replace(ROLLOUT, **change), PROMPTS[:2], [7], cpu)


def empty_engine(prompts, **_):
    return {"completion_ids": [[[], []]] * 3, "logprobs": [[[], []]] * 3}


def test_empty_completions_are_a_bad_step_and_no_completions_an_error(make_trainer):
    """Nothing was written that could be learned from; some empty ones are just left out."""
    record = make_trainer("actor_critic", rollout_function=empty_engine).train(max_steps=1)[0]
    assert record["bad_steps"] == 1 and record["completions/max_length"] == 0
    nothing = {"completion_ids": [[], []], "logprobs": [[], []]}
    with pytest.raises(ValueError, match="expected a completion at least, got none"):
        rollout_of(nothing, PROMPTS[:2], [7], torch.device("cpu"))
    ids = [[[], [3, 7], [1]], [], [[2]]]
    trainer = make_trainer(
        reward_functions=lambda completion_ids, **_: [1.0] * len(completion_ids),
        rollout_function=lambda **_: {
            "completion_ids": ids, "logprobs": [[[-2.0] * len(c) for c in g] for g in ids],
        },
        dataset=[[1, 2]], **STILL,
    )  # fmt: skip
    losses = []
    for c in ([3, 7], [1], [2]):
        logprobs, _, _ = scored(trainer.policy, torch.tensor([1, 2]), torch.tensor(c))
        weights = (logprobs.detach() + 2).exp().clamp(max=2.0)
        losses.append(-weights * logprobs)
    wanted = gradient_of(trainer, torch.cat(losses).mean())
    record, gradient = one_step(trainer)
    assert_same(gradient, wanted)
    assert record["completions/min_length"] == 0


def test_ids_that_are_not_in_the_vocabulary_are_an_error(make_trainer):
    def rollout_function(prompts, **_):
        return {"completion_ids": [[[8]]] * 3, "logprobs": [[[-1.0]]] * 3}

    trainer = make_trainer(rollout_function=rollout_function)
    with pytest.raises(ValueError, match=r"rollout_function: expected ids in \[0, 8\), got .* 8"):
        trainer.train(max_steps=1)


@pytest.mark.parametrize(
    "kind, config",
    [
        ("policy_gradient", {"algorithm": "grpo"}),
        ("policy_gradient", {"algorithm": "gspo"}),
        ("actor_critic", {"algorithm": "ppo", "epochs": 2}),
        ("actor_critic", {"algorithm": "vtrace", "replay_size": 2}),
    ],
)
def test_an_engine_that_is_the_policy_changes_nothing(make_trainer, kind, config):
    def rollout_function(*, prompts, eos_token_ids, policy, seeds, **options):
        found = generate(
            policy, [torch.tensor(p) for p in prompts], eos_token_id=eos_token_ids,
            seeds=torch.tensor(seeds), **options,
        )  # fmt: skip
        count = options["completions_per_prompt"]
        columns = {
            "completion_ids": [c.tolist() for c in found.completion_ids],
            "logprobs": [x.tolist() for x in found.logprobs.split(found.lengths.tolist())],
            "ended": found.ended.tolist(),
        }
        return {
            name: [column[i : i + count] for i in range(0, len(column), count)]
            for name, column in columns.items()
        }

    trainers = [
        make_trainer(kind, max_steps=3, eos_token_id=7, temperature=0.8, **config, **options)
        for options in ({}, {"rollout_function": rollout_function})
    ]
    own, foreign = (trainer.train() for trainer in trainers)
    for one, other in zip(own, foreign, strict=True):
        assert other["logprob_gap"] < 1e-5
        assert other["sampling/importance_sampling_ratio/min"] == pytest.approx(1, abs=1e-5)
        assert other["sampling/importance_sampling_ratio/max"] == pytest.approx(1, abs=1e-5)
        for name in ("reward", "loss", "entropy", "kl", "completions/clipped_ratio"):
            assert other[name] == pytest.approx(one[name], rel=1e-4, abs=1e-5)
    weights = zip(trainers[0].parameters, trainers[1].parameters, strict=True)
    for one, other in weights:
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("is_used", [None, torch.tensor([True, True, True, False])])
def test_a_rollout_that_brings_rewards_is_taken_as_it_is(make_trainer, is_used):
    """A completion with a bad one is not used, nor one that is told so; no function is asked."""
    rewards = torch.tensor([1.0, -1.0, math.nan, 0.5, 2.0, 0.0, 9.0, 9.0])
    count = 3 if is_used is None else 4

    def rollout_function(prompts, policy, **_):
        ids = [torch.tensor(x) for x in ([3, 7], [1, 2], [4, 7], [5, 7])[:count]]
        segments = [torch.tensor(p) for p in prompts[:1]] + ids
        logprobs = torch.cat([scored(policy, segments[0], c)[0].detach() for c in ids])
        return Rollout(
            batch=PackedBatch.from_segments(segments, [-1] + [0] * count),
            group_ids=torch.zeros(count, dtype=torch.int64),
            ended=torch.tensor([True, False, True, True])[:count],
            logprobs=logprobs,
            rewards=rewards[: 2 * count],
            is_used=is_used,
        )

    def never(**_):
        raise AssertionError("not to be called")

    trainer = make_trainer(
        reward_functions=never, rollout_function=rollout_function, dataset=[[1, 2]], **STILL
    )
    losses = []
    for ids, index in (([3, 7], 0), ([4, 7], 4)):
        logprobs, _, _ = scored(trainer.policy, torch.tensor([1, 2]), torch.tensor(ids))
        losses.append(-logprobs * returns_of(rewards[index : index + 2], 1.0))
    wanted = gradient_of(trainer, torch.cat(losses).mean())
    record, gradient = one_step(trainer)
    assert_same(gradient, wanted)
    assert record["loss"] == pytest.approx(torch.cat(losses).mean().item(), rel=1e-5)
    assert (record["reward"], record["rewards/bad"]) == (1.0, 1)  # of 0 and 2
    assert record["reward_std"] == pytest.approx(math.sqrt(2))
