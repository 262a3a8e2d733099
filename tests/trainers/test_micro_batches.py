"""An update in parts: micro-batches, completions with nothing to learn, minibatches, bfloat16."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hand_losses import (
    USED,
    assert_learns,
    assert_same,
    clipped,
    move,
    rollout_with_rewards,
    rows_of,
    updates,
)

from fastrl import ops
from fastrl.layout import PackedBatch, pack_groups
from fastrl.models import LSTMLanguageModel
from fastrl.trainers.micro_batches import micro_batches

STILL = {"max_grad_norm": None, "max_new_tokens": 6, "eos_token_id": 7}


def batches_read(trainer):
    """The list of the batches that the policy will read for an update."""
    read, packed_hidden = [], trainer.policy.packed_hidden

    def spy(batch):
        read.append(batch)
        return packed_hidden(batch)

    trainer.policy.packed_hidden = spy
    return read


@pytest.mark.parametrize("max_tokens", [1, 9, 18])
@pytest.mark.parametrize(
    "kind, config",
    [
        ("policy_gradient", {"algorithm": "grpo", "reduction": "token_mean"}),
        ("policy_gradient", {"algorithm": "grpo", "reduction": "sequence_mean"}),
        ("policy_gradient", {"algorithm": "rloo", "reduction": "sequence_mean_token_sum"}),
        ("policy_gradient", {"algorithm": "dr_grpo", "reduction": "token_sum"}),
        ("policy_gradient", {"algorithm": "gspo", "clip_low": 0.05, "clip_high": 0.05}),
        ("policy_gradient", {"algorithm": "dapo", "kl_coef": 0.3, "entropy_coef": 0.1}),
        ("actor_critic", {"algorithm": "ppo", "kl_coef": 0.3, "kl_in": "reward"}),
        ("actor_critic", {"algorithm": "vtrace", "entropy_coef": 0.1}),
    ],
)
def test_the_gradients_of_micro_batches_add_up_to_the_wholes(
    make_trainer, kind, config, max_tokens
):
    results, reads = [], []
    for limit in (None, max_tokens):
        trainer = make_trainer(kind, micro_batch_tokens=limit, **config, **STILL)
        move(trainer.model, 0.2)
        rollout = rollout_with_rewards(trainer, USED[1])
        move(trainer.model, 0.2, seed=4)
        reads.append(batches_read(trainer))
        numbers, gradients = updates(trainer, rollout)
        results.append((numbers, gradients[0]))
    whole, parts = results
    assert max(g.abs().max() for g in whole[1]) > 1e-2
    assert_same(parts[1], whole[1], atol=3e-7, rtol=1e-5)
    assert parts[0] == pytest.approx(whole[0], rel=1e-5, abs=1e-6)
    assert len(reads[1]) > len(reads[0])
    for batch in reads[1]:
        assert batch.layout.num_tokens <= max_tokens or len(batch.completion_segments) == 1


def test_each_target_is_in_one_part_and_the_parts_are_not_too_large():
    """Prompts whose completions fit, one whose do not, and a completion that fits nowhere."""
    torch.manual_seed(0)

    def ids(n):
        return torch.randint(0, 9, (n,))

    prompts = [ids(3), ids(5), ids(2), ids(4)]
    completions = [
        [ids(2), ids(0), ids(3)],
        [ids(6), ids(4), ids(7), ids(1)],
        [ids(40)],
        [ids(2), ids(2)],
    ]
    batch = pack_groups(prompts, completions)
    parts = micro_batches(batch, 16)
    at = torch.cat([at for _, at in parts])
    assert torch.equal(at.sort().values, torch.arange(len(batch.target_ids)))
    for micro, at in parts:
        assert torch.equal(micro.target_ids, batch.target_ids[at])
        assert micro.layout.num_tokens <= 16 or len(micro.completion_segments) == 1
    # 5 + 6 + 4 <= 16 and 5 + 7 + 1 <= 16; that the prompt is read twice is what it costs.
    tokens = sum(micro.layout.num_tokens for micro, _ in parts)
    assert tokens == batch.layout.num_tokens + 5
    (whole, at), *none = micro_batches(batch, batch.layout.num_tokens)
    assert whole is batch and not none and torch.equal(at, torch.arange(len(batch.target_ids)))


def test_a_conversation_of_several_turns_is_not_cut():
    turns = [torch.tensor([1, 2]), torch.tensor([3, 4]), torch.tensor([5]), torch.tensor([6])]
    batch = PackedBatch.from_segments(turns, [-1, 0, 1, 1])
    assert [m.layout.num_tokens for m, _ in micro_batches(batch, 6)] == [6]
    with pytest.raises(ValueError, match="expected max_tokens >= 6, .*got 5"):
        micro_batches(batch, 5)


def totals_as_rewards(rollout, totals):
    """Each completion's total stands at its last token."""
    rewards = torch.zeros_like(rollout.logprobs)
    rewards[rollout.cu_seqlens[1:].long() - 1] = torch.tensor(totals)
    return replace(rollout, rewards=rewards)


@pytest.mark.parametrize("max_tokens", [None, 12])
@pytest.mark.parametrize("algorithm", ["grpo", "gspo", "rloo", "dr_grpo", "dapo"])
def test_what_has_nothing_to_learn_is_not_read(make_trainer, algorithm, max_tokens):
    """The prompt whose completions are all alike; its tokens are in the denominators still."""
    config = {"micro_batch_tokens": max_tokens, "kl_every": 0, "mask_truncated": False}
    results, reads = [], []
    for teach_all in (False, True):
        trainer = make_trainer(algorithm=algorithm, **config, **STILL)
        rollout = totals_as_rewards(rollout_with_rewards(trainer), [1, 0, 2, 0, 1, 1, 1, 1.0])
        move(trainer.model, 0.2)
        if teach_all:
            trainer.teaches = lambda known: torch.ones_like(known.is_learned)
        reads.append(batches_read(trainer))
        numbers, gradients = updates(trainer, rollout)
        results.append((numbers["loss"], gradients[0]))
    assert_same(results[0][1], results[1][1], atol=1e-7, rtol=1e-5)
    assert results[0][0] == pytest.approx(results[1][0], abs=1e-7)
    targets = [sum(len(batch.target_ids) for batch in read) for read in reads]
    assert targets == [int(rollout.lengths[:4].sum()), int(rollout.lengths.sum())]


def test_a_loss_with_an_entropy_bonus_has_something_to_learn_from_every_completion(make_trainer):
    trainer = make_trainer(algorithm="grpo", entropy_coef=0.1, **STILL)
    rollout = totals_as_rewards(rollout_with_rewards(trainer), [1, 0, 2, 0, 1, 1, 1, 1.0])
    losses = []
    for i, row in enumerate(rows_of(trainer, rollout)):
        totals = torch.tensor([1, 0, 2, 0.0])
        a = (totals[i] - totals.mean()) / (totals.std() + 1e-4) if i < 4 else torch.tensor(0.0)
        ratio = (row.logprobs - row.old_logprobs).exp()
        losses.append((-clipped(ratio, a, 0.2, 0.2) - 0.1 * row.entropies).mean())
    assert_learns(trainer, rollout, torch.stack(losses).mean())


def test_an_entropy_is_steered_by_that_of_every_completion(make_trainer):
    """Also of prompts whose completions are all alike, from a coefficient of 0."""
    trainer = make_trainer(algorithm="grpo", entropy_target=1.0, **STILL)
    rollout = totals_as_rewards(rollout_with_rewards(trainer), [1, 0, 2, 0, 1, 1, 1, 1.0])
    entropies = [row.entropies.detach() for row in rows_of(trainer, rollout)]
    every, learned = float(torch.cat(entropies).mean()), float(torch.cat(entropies[:4]).mean())
    assert trainer.entropy.coef == 0 and abs(every - learned) > 1e-3
    assert updates(trainer, rollout)[0]["entropy"] == pytest.approx(every, abs=1e-5)


def test_a_step_in_which_nothing_can_be_learned_changes_nothing(make_trainer):
    """Not even by the optimizer's momentum; it is no bad step."""
    rewards = iter([float(i) for i in range(12)] + [1.0] * 12)
    trainer = make_trainer(
        reward_functions=lambda completion_ids, **_: [next(rewards) for _ in completion_ids],
        algorithm="rloo",
    )
    trainer.train(max_steps=1)
    before = [p.detach().clone() for p in trainer.model.parameters()]
    record = trainer.train(max_steps=2)[0]
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.model.parameters(), strict=True))
    assert record["loss"] == record["grad_norm"] == record["bad_steps"] == 0
    assert record["frac_reward_zero_std"] == 1


def epochs_of(make_trainer, **options):
    """For each gradient step of two steps of training the completions that were learned from."""
    trainer = make_trainer(
        "actor_critic", algorithm="ppo", dataset=[[token] for token in range(5)],
        prompts_per_step=5, completions_per_prompt=3, epochs=3, minibatches=2,
        micro_batch_tokens=9, eos_token_id=7, kl_every=0, **options,
    )  # fmt: skip
    read, steps = batches_read(trainer), []

    def close(*_):
        found = []
        for batch in read:
            segments = batch.layout.unpack(batch.token_ids)
            parents = batch.layout.prefix.tolist()
            found += [
                (segments[parents[s]].item(), tuple(segments[s].tolist()))
                for s in batch.completion_segments.tolist()
            ]
        steps.append(sorted(found))
        read.clear()

    trainer.optimizer.register_step_pre_hook(close)
    trainer.train(max_steps=2)
    return steps


def test_minibatches_are_of_whole_prompts_and_every_completion_is_once_in_an_epoch(make_trainer):
    steps = epochs_of(make_trainer)
    assert len(steps) == 2 * 3 * 2
    epochs = [sorted(steps[i] + steps[i + 1]) for i in range(0, 12, 2)]
    assert epochs[0] == epochs[1] == epochs[2] != epochs[3] == epochs[4] == epochs[5]
    assert all(len(epoch) == 15 for epoch in epochs)
    prompts = [tuple(sorted({prompt for prompt, _ in step})) for step in steps]
    for one, other in zip(prompts[::2], prompts[1::2], strict=True):
        assert sorted(one + other) == [0, 1, 2, 3, 4] and {len(one), len(other)} == {2, 3}
    assert len(set(prompts)) > 4  # another partition in another epoch


def test_minibatches_are_a_function_of_the_seed(make_trainer):
    one, again, other = (epochs_of(make_trainer, seed=seed) for seed in (0, 0, 1))
    assert one == again and one != other


def test_minibatches_weigh_what_they_hold(make_trainer):
    """The second minibatch's loss is a mean over its own tokens, of a policy that has moved."""
    options = {"algorithm": "grpo", "minibatches": 2, "learning_rate": 1e-12, **STILL}
    trainer = make_trainer(reduction="token_mean", **options)
    rollout = rollout_with_rewards(trainer, USED[1])
    rows = [row for row in rows_of(trainer, rollout) if row.is_used]
    _, gradients = updates(trainer, rollout)
    wanted = []
    for group in (0, 1):
        totals = torch.stack([row.rewards.sum() for row in rows if row.group == group])
        advantages = (totals - totals.mean()) / (totals.std() + 1e-4)
        of_group = [row for row in rows if row.group == group]
        losses = [-row.logprobs * a for row, a in zip(of_group, advantages, strict=True)]
        wanted.append(
            torch.autograd.grad(torch.cat(losses).mean(), list(trainer.model.parameters()))
        )
    if not torch.allclose(gradients[0][0], wanted[0][0], atol=1e-5):  # the other prompt came first
        wanted = wanted[::-1]
    for got, expected in zip(gradients, wanted, strict=True):
        assert_same(got, expected)


def half_ended(policy):
    """A last layer that changes nothing, and is in bfloat16 where autocast has it so."""
    packed_hidden, one = policy.packed_hidden, torch.eye(policy.hidden_dim)
    policy.packed_hidden = lambda batch: torch.nn.functional.linear(packed_hidden(batch), one)


@pytest.mark.parametrize("kind, algorithm", [("policy_gradient", "gspo"), ("actor_critic", "ppo")])
def test_bfloat16_is_for_the_layers_and_not_for_the_head(make_trainer, kind, algorithm):
    seen = []

    def spy(name):
        def call(hidden, weight, *arguments, **options):
            found = getattr(ops, name)(hidden, weight, *arguments, **options)
            is_half = bool((hidden == hidden.bfloat16().float()).all())
            seen.append((hidden.dtype, weight.dtype, found[-1].dtype, is_half))
            return found

        return call

    names = {name: getattr(ops, name) for name in ops.__all__}
    names |= {name: spy(name) for name in ("linear_token_loss", "linear_token_logprobs")}
    results = []
    for precision in ("float32", "bfloat16"):
        trainer = make_trainer(
            kind,
            algorithm=algorithm,
            precision=precision,
            kl_every=0,
            ops=SimpleNamespace(**names),
            **STILL,
        )
        move(trainer.model, 0.1)
        half_ended(trainer.policy)
        rollout = rollout_with_rewards(trainer)
        seen.clear()
        _, gradients = updates(trainer, rollout)
        assert {entry[:3] for entry in seen} == {(torch.float32,) * 3}
        assert {entry[3] for entry in seen} == {precision == "bfloat16"}
        assert {g.dtype for g in gradients[0]} == {torch.float32}
        results.append(gradients[0])
    for one, other in zip(*results, strict=True):
        assert not torch.equal(one, other)
        torch.testing.assert_close(one, other, atol=2e-2, rtol=0.1)


@pytest.mark.parametrize("algorithm", ["ppo", "vtrace"])
def test_values_are_float32_in_bfloat16_too(make_trainer, algorithm):
    """While sampling, of replayed rollouts, and in the update."""
    replay = {"replay_size": 1} if algorithm == "vtrace" else {}
    trainer = make_trainer("actor_critic", algorithm=algorithm, precision="bfloat16", **replay)
    half_ended(trainer.policy)
    seen = set()
    trainer.model.value_head.register_forward_hook(
        lambda _, inputs, output: seen.add((inputs[0].dtype, output.dtype))
    )
    records = trainer.train(max_steps=2)
    assert seen == {(torch.float32, torch.float32)}
    assert records[-1]["skipped_updates"] == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_weights_sample_from_the_logits_that_are_learned_from(make_trainer, dtype):
    """Logits rounded to 16 bits would put sequences beyond GSPO's bounds before the first step.

    The head alone: how a 16-bit LSTM rounds, step by step and at once, is up to torch and the CPU.
    """
    torch.manual_seed(0)
    model = LSTMLanguageModel(8, 8, 24).to(dtype)
    hidden = torch.randn(5, 24, dtype=dtype)
    logits, head = model.head.for_sampling(5)(hidden), model.lm_head
    ids = logits.argmax(-1)
    sampled = ops.token_logprobs(logits, ids)
    learned = ops.linear_token_logprobs(hidden, head.weight, ids, bias=head.bias)
    torch.testing.assert_close(sampled, learned, rtol=1e-5, atol=1e-6)
    with pytest.warns(RuntimeWarning, match="weights of dtype .*float16 are trained"):
        (record,) = make_trainer(model=model, algorithm="gspo").train(max_steps=1)
    assert record["skipped_updates"] == 0


def test_bfloat16_samples_as_it_learns(make_trainer):
    trainer = make_trainer("actor_critic", algorithm="ppo", precision="bfloat16", eos_token_id=7)
    records = trainer.train(max_steps=2)
    assert all(0 <= record["logprob_gap"] < 0.05 for record in records)
    assert records[-1]["skipped_updates"] == 0
