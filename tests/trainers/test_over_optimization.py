"""The monitor on whole runs: a gamed reward is caught, an honest one left alone, and what it does.

The p-values have tests of their own in test_over_optimization_test.py.
"""

import re
import warnings
from types import SimpleNamespace

import pytest
import torch
from gamed_runs import (
    HELD_OUT,
    TRAINED_ON,
    half_of_it_and_noise,
    make_run,
    share,
    share_and_noise,
    up_to_a_half,
)

from fastrl.layout import pack_groups
from fastrl.models.protocol import Head
from fastrl.rewards import NormalizedSum
from fastrl.rollout import completion_seeds
from fastrl.trainers import PolicyGradientTrainer, StopTraining
from fastrl.trainers.over_optimization import OverOptimizationMonitor, measures

pytestmark = pytest.mark.filterwarnings("ignore:Reward (falling|stalled)")
SEEDS = [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2))]


def gold_of(trainer, gold=up_to_a_half):
    """The mean gold reward of fresh completions."""
    trainer.scorer = type(trainer.scorer)(gold)
    return trainer.evaluate(HELD_OUT, completions_per_prompt=16, seed=99)["reward"]


@pytest.mark.parametrize("seed", SEEDS)
def test_a_gamed_reward_is_caught_and_the_best_checkpoint_kept(tmp_path, seed):
    """Gold rises from 0.12 to 0.25 or so and would fall to -0.5."""
    trainer, monitor = make_run(
        up_to_a_half, seed=seed, monitor={"action": "stop"}, output_dir=tmp_path
    )
    with pytest.warns(RuntimeWarning, match="gold falls while the proxy rises.* Training stops."):
        records = trainer.train()
    assert 12 < len(records) < 30
    assert [r["gold/alarm"] for r in records if "gold/alarm" in r].count(1) == 1
    assert records[-1]["gold/alarm"] == 1
    assert records[-1]["gold/p_value"] <= records[-1]["gold/threshold"] == 0.05 / 40

    stopped, _ = make_run(up_to_a_half, seed=seed)
    stopped.resume(tmp_path / "checkpoint")
    best, watching = make_run(up_to_a_half, seed=seed)
    best.resume(tmp_path / "best")
    assert stopped.step == len(records) > best.step == watching.evaluations[-1]["step"]
    golds = {e["step"]: e["gold/gold"] for e in monitor.evaluations}
    assert golds[best.step] == max(golds.values())
    assert gold_of(best) > gold_of(stopped) + 0.1
    start, _ = make_run(up_to_a_half, seed=seed)
    assert gold_of(best) > gold_of(start) + 0.05


@pytest.mark.parametrize("seed", SEEDS[:2])
@pytest.mark.parametrize("gold, end", [(share_and_noise, 0.8), (half_of_it_and_noise, 0.45)])
def test_an_honest_reward_is_not_stopped(gold, end, seed):
    """Gold is the proxy, or comes to rest where the proxy goes on, but for noise."""
    trainer, monitor = make_run(gold, seed=seed, monitor={"action": "stop"})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "Reward stalled")  # as the second gold does
        records = trainer.train()
    assert len(records) == 60 and len(monitor.evaluations) == 21
    assert not any(e["gold/alarm"] or e["gold/falling"] for e in monitor.evaluations)
    assert monitor.evaluations[-1]["gold/gold"] > end
    assert monitor.evaluations[-1]["gold/proxy"] > 0.9


def test_each_alarm_warns_and_the_run_goes_on():
    trainer, monitor = make_run(up_to_a_half, max_steps=24)
    with pytest.warns(RuntimeWarning, match="Over-optimisation") as warned:
        records = trainer.train()
    alarms = [record["step"] for record in records if record.get("gold/alarm")]
    said = [str(w.message) for w in warned if "Over-optimisation" in str(w.message)]
    assert len(records) == 24 and len(said) == len(alarms) >= 2
    assert all(f"to {step}" in text for step, text in zip(alarms, said, strict=True))
    assert re.search(r"from step \d+ to \d+ gold falls .* \(gold from 0\.2\d+ to", said[0])


def test_lower_raises_the_kl_coefficient_and_halves_the_weights(tmp_path):
    options = {"monitor": {"action": "lower", "kl_start": 0.02}, "reward_weights": (2.0,)}
    trainer, monitor = make_run(up_to_a_half, max_steps=24, **options)
    with pytest.warns(RuntimeWarning, match="The KL coefficient rises"):
        records = trainer.train()
    alarms = [record["step"] for record in records if record.get("gold/alarm")]
    assert len(alarms) >= 2
    coefs = [record["kl_coef"] for record in records]
    assert coefs[alarms[0] - 1] == 0 and coefs[alarms[0]] == 0.02 and coefs[alarms[1]] == 0.04
    assert trainer.scorer.weights == [2 * 0.5 ** len(alarms)]
    for record in records:  # the proxy is what it was, so that it can be compared
        if "gold/proxy" in record and record["gold/proxy"] > 0.9:
            assert record["gold/proxy"] <= 2
    assert records[-1]["gold/proxy"] > 1.5 > 0.6 > records[-1]["reward"]
    trainer.save(tmp_path / "run")
    again, _ = make_run(up_to_a_half, **options)
    again.resume(tmp_path / "run")
    assert again.scorer.weights == trainer.scorer.weights and again.kl.coef == trainer.kl.coef


def test_the_kl_budget_sets_off_the_same_action():
    trainer, monitor = make_run(share, monitor={"action": "stop", "kl_budget": 1.0})
    with pytest.warns(RuntimeWarning, match="KL budget: .* nats per completion at step"):
        records = trainer.train()
    last, before = monitor.evaluations[-1], monitor.evaluations[-2]
    assert last["gold/kl"] > 1 >= before["gold/kl"] and last["gold/over_budget"] == 1
    assert last["gold/alarm"] == 0 and len(records) == last["step"]


def test_a_budget_that_stays_exceeded_warns_once():
    trainer, monitor = make_run(share, max_steps=24, monitor={"kl_budget": 1.0})
    with pytest.warns(RuntimeWarning, match="KL budget") as warned:
        trainer.train()
    assert sum(e["gold/over_budget"] for e in monitor.evaluations) >= 3
    assert sum("KL budget" in str(w.message) for w in warned) == 1


def test_the_numbers_are_those_of_an_evaluation(tmp_path):
    """The same prompts, policy and seeds through the trainer's own evaluation."""
    trainer, monitor = make_run([up_to_a_half, share], max_steps=6)
    records = trainer.train()
    seed = int(completion_seeds(0, 5, torch.tensor([6]), 1))
    found = trainer.evaluate(HELD_OUT, completions_per_prompt=2, seed=seed)
    got = records[-1]
    assert monitor.evaluations[-1]["step"] == 6 and monitor.evaluations[0]["gold/kl"] == 0
    assert got["gold/proxy"] == pytest.approx(found["reward"], abs=1e-6)
    prompts = torch.tensor(found["prompt_rewards"], dtype=torch.float64)
    assert got["gold/proxy_stderr"] == pytest.approx(float(prompts.std()) / 32**0.5, abs=1e-6)
    completions = [ids for prompt in found["completion_ids"] for ids in prompt]
    golds = torch.tensor(up_to_a_half(completions))
    assert got["gold/gold/up_to_a_half"] == pytest.approx(float(golds.mean()), abs=1e-6)
    assert got["gold/gold"] == pytest.approx(float(golds.mean()) + found["reward"], abs=1e-6)
    assert got["gold/entropy"] == pytest.approx(found["entropy"], rel=1e-5)
    pairs = [pair for ids in completions for pair in zip(ids, ids[1:], strict=False)]
    assert got["gold/distinct_2"] == len(set(pairs)) / len(pairs)
    assert got["gold/length"] == 8


def test_the_divergence_is_that_of_whole_completions():
    """Against the sum over all 8^3 completions, from the model's own forward pass."""
    trainer, _ = make_run(share, max_steps=12, max_new_tokens=3, learning_rate=0.02)
    trainer.train()
    prompt = torch.tensor([1, 2])
    every = torch.cartesian_prod(*[torch.arange(8)] * 3)
    ids = torch.cat([prompt.expand(512, 2), every], 1)

    def logprob(model):
        with torch.no_grad():
            logits = model(ids[:, :-1])[0][:, 1:].double()
        return logits.log_softmax(-1).gather(2, every[:, :, None]).sum((1, 2))

    ours, theirs = logprob(trainer.policy), logprob(trainer.reference)
    exact = float((ours.exp() * (ours - theirs)).sum())
    drawn = measures.draw(trainer, trainer.prompts([prompt]), None, 2000, 1.0, 0)
    got = measures.divergence(trainer, trainer.reference, drawn.rollout.batch).view(2000, 3).sum(1)
    assert exact > 0.5
    assert abs(float(got.mean()) - exact) < 4 * float(got.std()) / 2000**0.5
    assert float(got.std()) / 2000**0.5 < 0.02 * exact


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_divergence_of_16_bit_weights_is_of_float32_logits(dtype):
    """Of large logits, close together: in 16 bits they lie on a grid coarser than what differs."""
    batch = pack_groups([torch.tensor([1])], [[torch.arange(6)]])
    torch.manual_seed(0)
    weight, bias = torch.randn(32, 16) / 2, 10 + torch.randn(32)
    hidden = torch.randn(len(batch.target_ids), 16).to(dtype)

    def policy(states):
        head = Head(weight.to(dtype), bias.to(dtype))
        return SimpleNamespace(head=head, vocab_size=32, packed_hidden=lambda _: states)

    ours, theirs = policy(hidden), policy((1.05 * hidden.float()).to(dtype))
    config = SimpleNamespace(temperature=0.8, precision="float32", micro_batch_tokens=None)
    trainer = SimpleNamespace(policy=ours, config=config)
    got = measures.divergence(trainer, theirs, batch)
    p, q = (
        (states.double() @ weight.to(dtype).double().t() + bias.to(dtype).double()).div(0.8)
        for states in (ours.packed_hidden(batch), theirs.packed_hidden(batch))
    )
    p, q = p.log_softmax(-1), q.log_softmax(-1)
    exact = (p.exp() * (p - q)).sum(-1)
    assert exact.min() > 1e-4
    torch.testing.assert_close(got, exact, rtol=0.01, atol=1e-7)


def test_the_answers_of_an_environment_are_not_the_policys_variety():
    rollout = SimpleNamespace(
        completion_ids=[torch.tensor([1, 2, 9, 9, 9, 1, 2]), torch.tensor([3])],
        is_target=[torch.tensor([1, 1, 0, 0, 0, 1, 1]).bool(), torch.tensor([True])],
    )
    assert measures.distinct_2(rollout) == 1 / 2  # of (1, 2) and (1, 2)


def test_disagreement_is_recorded():
    trainer, monitor = make_run(share, max_steps=3, monitor={"disagreement": up_to_a_half})
    trainer.train()
    last = monitor.evaluations[-1]
    assert 0 < last["gold/disagreement"] <= last["gold/proxy"]


def test_prompts_without_a_reward_are_left_out():
    """The gold function has no opinion on prompts that begin with 0, and NaN for others."""

    def picky(prompts, completion_ids, **_):
        values = zip(prompts, share(completion_ids), strict=True)
        return [None if p[0] == 0 else float("nan") if p[0] == 1 else s for p, s in values]

    trainer, monitor = make_run(picky, max_steps=6)
    trainer.train()
    gold = torch.stack(monitor.state_dict()["test"]["gold"])
    assert gold.shape == (3, 32)
    assert gold.isnan().sum(1).tolist() == [16, 16, 16] and not gold[:, 16:].isnan().any()


def test_by_hand_as_a_part():
    """It stops by an exception; outside of its steps it leaves a record as it is."""
    trainer, monitor = make_run(share, monitor={"action": "stop", "kl_budget": 1e-9})
    record = {}
    monitor(record)
    assert record["gold/kl"] == 0
    trainer.step, record = 1, {}
    monitor(record)
    assert record == {}
    with torch.no_grad():
        next(iter(trainer.model.parameters())).add_(0.1)
    trainer.step = 3
    with pytest.warns(RuntimeWarning, match="KL budget"), pytest.raises(StopTraining, match="KL"):
        monitor(record)
    assert record["gold/over_budget"] == 1


@pytest.mark.parametrize(
    "options, config, message",
    [
        ({"every": 0}, {}, "every a whole number >= 1, got 0"),
        ({"completions_per_prompt": True}, {}, "completions_per_prompt a whole number >= 1"),
        ({"alpha": 1.0}, {}, "alpha in (0, 1), got 1.0"),
        ({"action": "pause"}, {}, "action one of 'warn', 'lower', 'stop', got 'pause'"),
        ({"kl_budget": 0}, {}, "kl_budget above 0 nats, got 0"),
        ({"kl_start": 0}, {}, "kl_start above 0, got 0"),
        ({"action": "lower"}, {"kl_every": 0}, 'a trainer with a reference for action "lower"'),
        ({"alpha": 1e-9}, {}, "at least 38 held-out prompts for alpha = 1e-09 over 20"),
    ],
)
def test_arguments_that_do_not_fit(options, config, message):
    with pytest.raises(
        ValueError, match="^OverOptimizationMonitor: expected " + re.escape(message)
    ):
        make_run(share, monitor=options, **config)


def test_a_normalised_reward_is_watched_by_its_parts():
    """Over a group its mean is 0 for each prompt, at every step: such a proxy never rises."""
    trainer, _ = make_run(share, max_steps=24)
    normalised = NormalizedSum({"share": share}, over="group")
    trainer = PolicyGradientTrainer(trainer.model, normalised, TRAINED_ON, trainer.config)
    options = {"every": 3, "completions_per_prompt": 2}
    blind = OverOptimizationMonitor(trainer, up_to_a_half, HELD_OUT, **options)
    seeing = OverOptimizationMonitor(trainer, up_to_a_half, HELD_OUT, proxy=share, **options)
    trainer.attach("blind", blind)
    trainer.attach("seeing", seeing)
    with pytest.warns(RuntimeWarning, match="Over-optimisation"):
        trainer.train()
    assert max(e["gold/alarm"] for e in seeing.evaluations) == 1
    assert max(e["gold/alarm"] for e in blind.evaluations) == 0
    assert abs(blind.evaluations[-1]["gold/proxy"]) < 1e-5 < seeing.evaluations[-1]["gold/proxy"]


def test_gold_that_is_no_function_is_refused():
    trainer, _ = make_run(share)
    with pytest.raises(TypeError, match="expected reward_functions to be callable, got 3"):
        OverOptimizationMonitor(trainer, [3], HELD_OUT)


def test_an_actor_critic_is_watched_too(make_trainer):
    trainer = make_trainer("actor_critic", share, max_steps=2)
    monitor = OverOptimizationMonitor(trainer, up_to_a_half, HELD_OUT, every=2)
    trainer.attach("over_optimization", monitor)
    records = trainer.train()
    assert "gold/kl" not in records[0] and records[1]["gold/kl"] > 0
    assert monitor.evaluations[0]["gold/kl"] == 0
