"""Runs on a GPU against the same on the CPU: models, caches, batches and optimizers lie there."""

import copy
import math

import pytest
import torch

from fastrl.models import ActorCritic, LSTMLanguageModel

pytestmark = pytest.mark.gpu

VOCAB_SIZE = 8
PROMPTS = [torch.tensor([1, 2, 3]), torch.tensor([4]), torch.tensor([2, 5])]


def lstm():
    torch.manual_seed(0)
    return LSTMLanguageModel(VOCAB_SIZE, 8, 24, 1)


def llama():
    pytest.importorskip("transformers")
    from hf_models import build

    return build("llama", vocab_size=VOCAB_SIZE, pad_token_id=None)


RUNS = {
    "grpo": (llama, dict(kl_coef=0.1, micro_batch_tokens=24, max_steps=1)),
    "reinforce": (lstm, dict(gamma=0.9)),
    "ppo": (llama, dict(minibatches=2, max_steps=1)),
    "a2c": (lstm, dict(eos_token_id=7)),
    "vtrace": (lstm, {}),
}
TIMES = ("time", "tokens_per_second")


def numbers(record):
    """But for what differs from one device to the other."""
    names = [x for x in record if not x.startswith((*TIMES, "logprob_gap"))]
    return {x: record[x] for x in names if isinstance(record[x], float)}


@pytest.mark.parametrize("name", RUNS)
def test_steps_are_those_of_the_cpu(make_trainer, name):
    family, options = RUNS[name]
    model, kind = family().eval(), "policy_gradient"  # as transformers loads one
    if name not in ("grpo", "reinforce"):
        model, kind = ActorCritic(model), "actor_critic"
    options = dict(algorithm=name, max_steps=2) | options
    runs = []
    for device in ("cuda", "cpu"):
        trainer = make_trainer(kind, model=copy.deepcopy(model).to(device), **options)
        runs.append(trainer.train())
        assert {x.device.type for x in trainer.model.parameters()} == {device}
    # Adam divides gradients of next to nothing by themselves: the second step is another one.
    there, here = (numbers(run[0]) for run in runs)
    assert len(there) > 15
    assert there == pytest.approx(here, rel=2e-4, abs=2e-4)
    assert max(record["logprob_gap"] for record in runs[0]) < 1e-4


def test_autocast(make_trainer):
    """Other roundings draw other tokens now and then: what one run says of itself."""
    trainer = make_trainer(model=llama().to("cuda"), max_steps=1, precision="bfloat16")
    (record,) = trainer.train()
    assert math.isfinite(record["loss"]) and record["grad_norm"] > 0
    assert record["logprob_gap"] < 0.1
    assert all(p.dtype == torch.float32 for p in trainer.model.parameters())


def test_a_checkpoint_goes_on_on_another_device(make_trainer, tmp_path):
    """To the numbers that the first device would have come to, or next to them."""
    model, options = lstm(), dict(learning_rate=1e-3, save_every=1)
    first = make_trainer(model=copy.deepcopy(model).to("cuda"), max_steps=1, output_dir=tmp_path,
                         **options)  # fmt: skip
    first.train()
    on = {"cuda": [], "cpu": []}
    for device, weights in on.items():
        trainer = make_trainer(model=copy.deepcopy(model).to(device), max_steps=2, **options)
        trainer.resume(tmp_path / "checkpoint")
        trainer.train()
        weights += [p.detach().cpu() for p in trainer.model.parameters()]
    for there, here in zip(*on.values(), strict=True):
        torch.testing.assert_close(there, here, rtol=0, atol=2e-3)  # two steps of Adam at most


def test_an_evaluation_is_that_of_the_cpu(make_trainer):
    found = [
        numbers(make_trainer(model=lstm().to(device)).evaluate(PROMPTS))
        for device in ("cuda", "cpu")
    ]
    assert len(found[0]) > 5
    assert found[0] == pytest.approx(found[1], rel=1e-4, abs=1e-4)
