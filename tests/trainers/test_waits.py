"""A GPU works through what it was given while the host goes on: until the host wants to see some of
it. How often that is follows from the code alone, so it is counted on a CPU. What our ops look at
where that is free, on a CPU, is left out; that they do not on a GPU is shown there."""

from types import SimpleNamespace

import pytest
import torch
from waits import counted_waits

from fastrl import ops, reference
from fastrl.ops import _checks
from fastrl.rollout import completion_seeds, generate
from fastrl.trainers import _steps, update

PROMPTS = [torch.arange(1, 4 + i) for i in range(4)]


def all_logprobs(hidden, weight, token_ids, *, bias, temperature, softcap, return_entropy=True):
    assert softcap is None
    every = ((hidden @ weight.T + bias) / temperature).log_softmax(-1)
    return every.gather(-1, token_ids[:, None])[:, 0], -(every.exp() * every).sum(-1)


def all_losses(hidden, weight, token_ids, loss_fn, **options):
    logprobs, entropy = all_logprobs(hidden, weight, token_ids, **options)
    rows = torch.arange(len(token_ids))
    return loss_fn(logprobs, entropy, rows).sum(), logprobs.detach(), entropy.detach()


# These two leave out rows that are ignored, for which they count them on a CPU.
OPS = SimpleNamespace(
    **vars(ops) | {"linear_token_logprobs": all_logprobs, "linear_token_loss": all_losses}
)


@pytest.fixture(autouse=True)
def checks_as_on_a_gpu(monkeypatch):
    monkeypatch.setattr(_checks, "contents_are_known", lambda *tensors: False)


def updates(make_trainer, monkeypatch, kind, micro_batch_tokens, **config):
    """The waits of one step's update, and its micro-batches."""
    trainer = make_trainer(
        kind, dataset=PROMPTS, prompts_per_step=4, max_new_tokens=5, eos_token_id=None,
        micro_batch_tokens=micro_batch_tokens, ops=OPS, **config,
    )  # fmt: skip
    count, found, own, loss = [], {}, _steps._update, update.micro_loss

    def micro_loss(*arguments):
        count.append(1)
        return loss(*arguments)

    def counted(trainer, rollout):
        tensors = [x for x in vars(rollout).values() if isinstance(x, torch.Tensor)]
        tensors += [*trainer.parameters, rollout.batch.token_ids, rollout.batch.target_ids]
        with pytest.MonkeyPatch.context() as patch, counted_waits(patch, *tensors) as waits:
            result = own(trainer, rollout)
        found.update(waits.counts)
        return result

    monkeypatch.setattr(update, "micro_loss", micro_loss)
    monkeypatch.setattr(_steps, "_update", counted)
    trainer.train(max_steps=1)
    return found, len(count)


@pytest.mark.parametrize(
    "kind, config",
    [
        ("policy_gradient", {"algorithm": "grpo", "kl_coef": 0.1}),
        ("policy_gradient", {"algorithm": "reinforce"}),
        ("actor_critic", {"algorithm": "ppo"}),
    ],
    ids=["grpo", "reinforce", "ppo"],
)
def test_an_update_waits_as_often_whatever_the_number_of_micro_batches(
    make_trainer, monkeypatch, kind, config
):
    whole, one = updates(make_trainer, monkeypatch, kind, None, **config)
    parts, several = updates(make_trainer, monkeypatch, kind, 26, **config)
    assert one == 1 and several >= 3
    assert parts == whole
    # Whether there is something to learn, what is active, the loss with the gradient's norm, and
    # the metrics. (How long the longest completion is comes from the batch, which is not counted.)
    assert sum(whole.values()) <= 4, whole


def rollout_waits(make_trainer, max_new_tokens, **options):
    policy = make_trainer().policy
    seeds = completion_seeds(0, 0, torch.arange(len(PROMPTS)), 2)
    device = [*policy.parameters(), *PROMPTS]
    with pytest.MonkeyPatch.context() as patch, counted_waits(patch, *device) as waits:
        generate(
            policy, PROMPTS, completions_per_prompt=2, max_new_tokens=max_new_tokens, seeds=seeds,
            ops=reference, **options,
        )  # fmt: skip
    return waits.counts


def test_a_rollout_looks_once_at_each_token_and_only_for_an_end(make_trainer):
    assert not rollout_waits(make_trainer, 6)
    several = [rollout_waits(make_trainer, n, eos_token_id=[6, 7]) for n in (3, 6)]
    assert several == [{"cpu": 3}, {"cpu": 6}]
    text = {"stop_strings": ["never"], "decode": str}
    assert rollout_waits(make_trainer, 6, eos_token_id=7, **text).total() == 6


def test_what_waits_is_counted(monkeypatch):
    x = torch.tensor([1.0, -1.0, 2.0])
    with counted_waits(monkeypatch, x) as waits:
        y = (x * 2).exp()  # nothing is looked at
        assert not waits.counts
        y.tolist(), bool(y.any()), y[y > 0], y.cpu() + 1
        other = torch.arange(3)  # of the host
        other[other > 1], other.tolist()
    assert waits.counts == {"tolist": 1, "_local_scalar_dense": 1, "index by a mask": 1, "cpu": 1}
