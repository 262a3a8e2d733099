"""A training step with `fastrl.ops` against the same step with `fastrl.reference`, in one run."""

import copy
import statistics
from collections.abc import Callable
from dataclasses import replace
from types import ModuleType

import torch
from torch import Tensor

import fastrl.ops
import fastrl.reference
from fastrl.models import LSTMLanguageModel
from fastrl.rollout import Rollout, completion_seeds, generate
from fastrl.trainers import PolicyGradientTrainer
from fastrl.trainers.experience import gather
from fastrl.trainers.losses import micro_loss, token_weights

ROUNDS = 5
IMPLEMENTATIONS: dict[str, ModuleType] = {"ops": fastrl.ops, "reference": fastrl.reference}


def compare_steps(
    model: LSTMLanguageModel,
    make_trainer: Callable[[LSTMLanguageModel, ModuleType], PolicyGradientTrainer],
) -> dict[str, float]:
    """Time both, taking turns, and compare the gradients of one policy-gradient step.

    Args:
        model: what each trainer gets its own copy of.
        make_trainer: makes a trainer of a model and a namespace.
    Returns:
        "time/ops" and "time/reference" (s, medians), and "gradient/absolute" and
        "gradient/relative": the largest difference of any gradient entry, and that difference
        over the largest entry.
    """
    trainers = {
        name: make_trainer(copy.deepcopy(model), ops) for name, ops in IMPLEMENTATIONS.items()
    }
    gradients = {name: _gradient(trainer) for name, trainer in trainers.items()}
    times: dict[str, list[float]] = {name: [] for name in trainers}
    for round_number in range(ROUNDS + 1):
        for name, trainer in trainers.items():
            (record,) = trainer.train(max_steps=round_number + 1)
            times[name].append(record["time/step"])
    difference = float((gradients["ops"] - gradients["reference"]).abs().max())
    largest = float(gradients["reference"].abs().max())
    return {
        # The first round warms up.
        **{f"time/{name}": statistics.median(values[1:]) for name, values in times.items()},
        "gradient/absolute": difference,
        "gradient/relative": difference / largest if largest else 0.0,
    }


def _gradient(trainer: PolicyGradientTrainer) -> Tensor:
    """The gradient of the policy-gradient loss on a batch that is the same for every trainer."""
    known, _ = gather(trainer, _rewarded_rollout(trainer))
    weights = token_weights(trainer, known, known.is_learned)
    known = replace(known, token_weights=weights)
    micro_loss(trainer, known.rollout.batch, known).loss.backward()
    gradients = [weight.grad for weight in trainer.parameters]
    gradient = torch.cat([grad.flatten() for grad in gradients if grad is not None])
    trainer.optimizer.zero_grad()
    return gradient


def _rewarded_rollout(trainer: PolicyGradientTrainer) -> Rollout:
    """A batch, sampled and rewarded by the reference whoever the trainer is."""
    config, dataset = trainer.config, trainer.dataset
    examples = [dataset[i % len(dataset)] for i in range(config.prompts_per_step)]
    rollout = generate(
        trainer.policy,
        [example.token_ids.to(trainer.device) for example in examples],
        completions_per_prompt=config.completions_per_prompt,
        max_new_tokens=config.max_new_tokens,
        seeds=completion_seeds(
            config.seed, 0, torch.arange(len(examples)), config.completions_per_prompt
        ),
        temperature=config.temperature,
        eos_token_id=trainer.eos_token_ids,
        ops=fastrl.reference,
    )
    scores = trainer.scorer(examples, rollout, dataset, trainer.eos_token_ids)
    return replace(
        rollout,
        rewards=scores.rewards.to(trainer.device),
        is_used=scores.is_used.to(trainer.device),
    )
