"""Training of preference models on pairs."""

import math
import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastrl.ops._checks import fail
from fastrl.rewards.preference.calibration import Calibration
from fastrl.rewards.preference.config import PreferenceConfig
from fastrl.rewards.preference.evaluation import evaluate_preferences
from fastrl.rewards.preference.loss import pair_passes, pass_loss
from fastrl.rewards.preference.model import (
    PreferenceModel,
    as_preference_model,
    without_dropout,
)
from fastrl.rewards.preference.pairs import Pair, checked_pairs, encoded_pairs

_OP = "train_preference_model"


@dataclass(frozen=True)
class PreferenceResult:
    """What training made.

    Attributes:
        model: the trained model, the one that was given.
        records: one a step: step, loss, accuracy, margin, grad_norm, learning_rate, skipped (1
            where the step was left out), time (seconds). Accuracy and margin are those of the
            step's pairs before the step, ties left out.
        evaluation: of eval_pairs, as `evaluate_preferences` gives it; None without them.
    """

    model: PreferenceModel
    records: list[dict[str, float]]
    evaluation: dict[str, Any] | None = None

    @property
    def accuracy(self) -> float | None:
        """On eval_pairs."""
        return None if self.evaluation is None else self.evaluation["accuracy"]

    @property
    def calibration(self) -> Calibration:
        """The model's: none, until `calibrate` is called."""
        return self.model.calibration

    @property
    def skipped(self) -> int:
        """Steps that were left out."""
        return int(sum(record["skipped"] for record in self.records))


def train_preference_model(
    model: Any,
    pairs: Iterable[Any],
    config: PreferenceConfig | None = None,
    *,
    tokenizer: Any = None,
    eval_pairs: Iterable[Any] | None = None,
    on_step: Callable[[dict[str, float]], None] | None = None,
) -> PreferenceResult:
    """Train a model to score the preferred completion of each pair higher.

    A step's loss is the mean over its pairs of

        -log sigmoid(s_chosen - s_rejected - m) + c (s_chosen + s_rejected)^2

    with the changes that `PreferenceConfig` lists, s the raw score V_T - V_0 of a completion. No
    dropout; AdamW; the value head's bias, which no score sees, is left alone. A step whose loss
    or gradient is not finite is left out and counted. The same seed makes the same model.

    Args:
        model: a PreferenceModel, or what makes one; trained in place. Weights that are frozen
            stay. A calibration that it has is dropped: its scores change.
        pairs: dicts with "prompt", "chosen" and "rejected": text, chat messages (one in each
            completion) or token ids; perhaps "margin" (a number >= 0) and "tie" (true or false).
        config: None: the defaults.
        tokenizer: for text and messages, where model is not a PreferenceModel with its own.
        eval_pairs: held-out pairs, scored after the last step.
        on_step: called with each step's record.
    Raises:
        ValueError: no pairs, or broken ones; nothing to train.
        FloatingPointError: max_bad_steps steps in a row were not finite.
    References: Christiano et al. 2017, arXiv:1706.03741; Touvron et al. 2023, arXiv:2307.09288
        (margin); Eisenstein et al. 2023, arXiv:2312.09244 (centering).
    """
    config = config or PreferenceConfig()
    model = as_preference_model(_OP, model, tokenizer)
    held_out = None if eval_pairs is None else checked_pairs(_OP, eval_pairs)
    encoded = encoded_pairs(_OP, pairs, model.encoder)
    if config.ties == "drop":
        encoded = [pair for pair in encoded if not pair.is_tie]
        if not encoded:
            raise fail(_OP, 'pairs beside ties with ties="drop"', "none", 'Set ties="half".')
    steps = config.max_steps
    if steps is None:
        steps = config.epochs * math.ceil(len(encoded) / config.pairs_per_step)
    model.calibration = Calibration()
    learner = _Learner(model, config)
    records: list[dict[str, float]] = []
    batches = _batches(encoded, config)
    with without_dropout(model.model):
        for step in range(steps):
            rate = config.learning_rate_at(step, steps)
            records.append({"step": step, **learner.step(next(batches), rate)})
            learner.check(records[-1])
            if on_step is not None:
                on_step(records[-1])
    evaluation = None if held_out is None else evaluate_preferences(model, held_out)
    return PreferenceResult(model, records, evaluation)


class _Learner:
    """Gradient steps on a model, and how many in a row were left out."""

    def __init__(self, model: PreferenceModel, config: PreferenceConfig) -> None:
        self.model, self.config = model, config
        head = model.model.value_head
        trunk = [] if config.freeze_trunk else list(model.trunk.parameters())
        self.parameters = [x for x in (*trunk, head.weight) if x.requires_grad]
        if not self.parameters:
            raise fail(_OP, "a model with weights to train", "frozen ones", "Set requires_grad.")
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=config.learning_rate, weight_decay=config.weight_decay
        )
        self.num_bad = 0

    def step(self, pairs: list[Pair], rate: float) -> dict[str, float]:
        """One step on these pairs; its record without its number."""
        began, config = time.perf_counter(), self.config
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        loss, margins = gradients(self.model, pairs, config, self.parameters)
        limit = math.inf if config.max_grad_norm is None else config.max_grad_norm
        norm = float(nn.utils.clip_grad_norm_(self.parameters, limit))
        is_bad = not (math.isfinite(loss) and math.isfinite(norm))
        if not is_bad:
            self.optimizer.step()
        self.optimizer.zero_grad()
        self.num_bad = self.num_bad + 1 if is_bad else 0
        is_tie = torch.tensor([pair.is_tie for pair in pairs])
        judged = margins[~is_tie]
        return {
            "loss": loss,
            "accuracy": float((0.5 * (1 + judged.sign())).mean()),
            "margin": float(judged.mean()),
            "grad_norm": norm,
            "learning_rate": rate,
            "skipped": float(is_bad),
            "time": time.perf_counter() - began,
        }

    def check(self, record: dict[str, float]) -> None:
        """Raise an error where max_bad_steps in a row were left out."""
        if self.num_bad >= self.config.max_bad_steps:
            raise FloatingPointError(
                f"{_OP}: expected a finite loss and gradient within max_bad_steps = "
                f"{self.config.max_bad_steps} steps, got loss {record['loss']:g} with gradient "
                f"norm {record['grad_norm']:g}. Lower learning_rate, and look for weights that "
                "are not finite."
            )


def gradients(
    model: PreferenceModel,
    pairs: Sequence[Pair],
    config: PreferenceConfig,
    parameters: Sequence[nn.Parameter],
) -> tuple[float, Tensor]:
    """The mean loss of the pairs, whose gradients are left in the parameters, and their margins.

    Returns:
        loss: as a float.
        margins: [n] float64 on the CPU.
    """
    for parameter in parameters:
        parameter.grad = None
    total, margins = 0.0, torch.empty(len(pairs), dtype=torch.float64)
    for part in pair_passes(pairs, config.micro_batch_tokens, model.device):
        summed, found = pass_loss(model, part, pairs, config)
        loss = summed / len(pairs)
        of_part = torch.autograd.grad(loss, parameters, allow_unused=True)
        for parameter, gradient in zip(parameters, of_part, strict=True):
            if gradient is not None:
                so_far = parameter.grad
                parameter.grad = gradient if so_far is None else so_far + gradient
        total += float(loss.detach())
        margins[part.items] = found.double().cpu()
    return total, margins


def _batches(pairs: list[Pair], config: PreferenceConfig) -> Iterator[list[Pair]]:
    """Pairs of each step, without end: all of them once an epoch, each prompt's in a row."""
    by_prompt: dict[Any, list[Pair]] = {}
    for pair in pairs:
        by_prompt.setdefault(pair.prompt, []).append(pair)
    epoch = 0
    while True:
        order = random.Random(f"{config.seed}/{epoch}")
        groups = [order.sample(group, len(group)) for group in by_prompt.values()]
        order.shuffle(groups)
        shuffled = [pair for group in groups for pair in group]
        for start in range(0, len(shuffled), config.pairs_per_step):
            yield shuffled[start : start + config.pairs_per_step]
        epoch += 1
