"""Maximum likelihood on prompts with references: what the algorithm starts from.

    loss = −Σ_t w_t log P(x_t | x_<t) / Σ_t w_t,   w_t = 1 in a reference, prompt_weight in a prompt

A reference ends with the token that ends completions. Steps are packed without padding, a prompt
with several references standing once. There is no dropout, and every random choice is a function
of seed and step, so an interrupted part goes on to the same weights. What is kept in the end are
the weights that were best on the validation rows. Several processes share out the rows of each
step and come to the same weights, up to the order of sums.
"""

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

import fastrl
from fastrl.cli.recipes.models import end_ids
from fastrl.cli.recipes.packing import Group, RowBatches, encoded, packed
from fastrl.cli.recipes.schema import Supervised
from fastrl.cli.recipes.toml import RecipeError
from fastrl.cli.training.progress_file import load_progress, save_progress
from fastrl.layout import PackedBatch
from fastrl.trainers.health import without_dropout
from fastrl.trainers.processes import Processes
from fastrl.trainers.tokens import token_scores

T = TypeVar("T")
LAST_RATE = 0.1  # of the learning rate, at the end


class SupervisedTraining:
    """The supervised part of a run; trains the policy in place.

    Args:
        policy: with the weights that it begins with.
        rows, validation: dicts with texts "prompt" and "reference".
        settings: [supervised] of the recipe.
    """

    def __init__(
        self,
        policy: Any,
        tokenizer: Any,
        rows: Sequence[dict[str, Any]],
        validation: Sequence[dict[str, Any]],
        settings: Supervised,
        seed: int,
    ) -> None:
        self.policy, self.settings = policy, settings
        self.device = policy.head.weight.device
        self.processes = Processes(None)
        self.processes.device = self.device
        without_dropout(policy)
        ends = end_ids(policy, tokenizer)[:1]
        self.batches, checked = (
            RowBatches(_learnable(part, tokenizer, ends), settings.tokens_per_step, seed)
            for part in (rows, validation)
        )
        own = self._share(list(checked.epoch(0)))
        self.validation = [self._packed(groups, 0.0) for groups in own]
        self.parameters = [p for p in policy.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            lr=settings.learning_rate,
            betas=(0.9, 0.98),
            weight_decay=settings.weight_decay,
        )
        self.step = 0
        self.best_loss = math.inf
        self.best = self._weights()

    def train(self, on_step: Callable[[dict[str, float]], None]) -> None:
        """Run to the end; the policy then has the best weights.

        Args:
            on_step: called with "step", "loss", "grad_norm", "learning_rate", "epoch",
                "tokens_per_second", "time/step", and at some steps "validation_loss" (nats per
                token of a reference).
        Raises:
            FloatingPointError: a gradient is not finite.
        """
        total, every = self.settings.steps, self.settings.validate_every
        while self.step < total:
            started = time.perf_counter()
            record, tokens = self._train_step()
            self.step += 1
            if self.step == total or self.step % every == 0:
                record["validation_loss"] = self._validate()
            elapsed = time.perf_counter() - started
            timing = {"tokens_per_second": tokens / elapsed, "time/step": elapsed}
            on_step({"step": self.step, **record, **timing})
        self.policy.load_state_dict(self.best)

    def save(self, path: Path) -> None:
        """One file, so that it is whole or not there."""
        progress = {"step": self.step, "best_loss": self.best_loss, **self.batches.state_dict()}
        save_progress(path, self.policy, self.best, self.optimizer, progress)

    def resume(self, path: Path) -> None:
        """Go on from a file that `save` wrote.

        Raises:
            RunFolderError: it is damaged or of another model; nothing was changed.
        """
        part = "the supervised part"
        self.best, progress = load_progress(path, self.policy, self.optimizer, part)
        self.step, self.best_loss = progress["step"], progress["best_loss"]
        self.batches.load_state_dict(progress)

    def _train_step(self) -> tuple[dict[str, float], int]:
        """What is logged of one step, and how many tokens it read."""
        rate = self._learning_rate()
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        groups = self.batches.next()
        self.optimizer.zero_grad()
        loss, num_tokens = self._backward(self._share(groups))
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        if not bool(norm.isfinite()):
            raise FloatingPointError(
                f"train: expected finite gradients in [supervised], got {float(norm)} at step "
                f"{self.step + 1}. Lower supervised.learning_rate {self.settings.learning_rate}."
            )
        self.optimizer.step()
        record = {
            "loss": loss,
            "grad_norm": float(norm),
            "learning_rate": rate,
            "epoch": self.batches.epochs,
        }
        return record, num_tokens

    def _backward(self, groups: list[Group]) -> tuple[float, int]:
        """The loss of all processes' groups, with its gradients, and how many tokens they have.

        Args:
            groups: this one's.
        """
        part = self._packed(groups, self.settings.prompt_weight) if groups else None
        sums = torch.zeros(2, dtype=torch.float64, device=self.device)
        if part is not None:
            sums += torch.tensor([float(part[1].sum()), part[0].layout.num_tokens]).to(sums)
        self._add(sums)
        total, num_tokens = sums.tolist()
        loss = torch.zeros(1, dtype=torch.float64, device=self.device)
        if part is not None:
            loss += self._loss(*part, total)
        self._add(loss)
        self.processes.add_gradients(self.parameters)
        return float(loss), int(num_tokens)

    def _loss(self, batch: PackedBatch, weights: Tensor, total: float) -> Tensor:
        """A batch's part of the loss; adds its gradients to the parameters'."""
        weights = weights / total

        def loss_fn(logprobs: Tensor, entropy: Tensor, rows: Tensor) -> Tensor:
            return -logprobs * weights[rows]

        hidden, head = self.policy.packed_hidden(batch), self.policy.head
        # The gradients form in the forward pass: three products, no logits kept.
        loss, _, _ = fastrl.linear_token_loss(
            hidden.to(head.weight.dtype),
            head.weight,
            batch.target_ids,
            loss_fn,
            **head.arguments(1.0),
        )
        loss.backward()
        return loss.detach()

    def _share(self, items: list[T]) -> list[T]:
        """This process's of them."""
        return items[self.processes.rank :: self.processes.count]

    def _add(self, sums: Tensor) -> None:
        """Over all processes."""
        self.processes.meet("the supervised part")
        self.processes.add(sums)

    def _packed(self, groups: list[Any], prompt_weight: float) -> tuple[PackedBatch, Tensor]:
        batch, weights = packed(groups, prompt_weight)
        return batch.to(self.device), weights.to(self.device)

    def _learning_rate(self) -> float:
        """Of the step that is next."""
        settings = self.settings
        rising = min(1.0, (self.step + 1) / max(1, settings.warmup))
        done = self.step / settings.steps
        falling = LAST_RATE + (1 - LAST_RATE) * (1 + math.cos(math.pi * done)) / 2
        return settings.learning_rate * rising * falling

    def _validate(self) -> float:
        """Nats per token of the validation rows' references; remembers the best weights."""
        sums = torch.zeros(2, dtype=torch.float64, device=self.device)
        for batch, _ in self.validation:
            logprobs, _ = token_scores(self.policy, batch, temperature=1.0, ops=fastrl.ops)
            sums[0] -= logprobs.double().sum()
            sums[1] += len(logprobs)
        self._add(sums)
        total, count = sums.tolist()
        loss = total / max(1, count)
        if loss < self.best_loss:
            self.best_loss, self.best = loss, self._weights()
        return loss

    def _weights(self) -> dict[str, Tensor]:
        return {name: tensor.clone() for name, tensor in self.policy.state_dict().items()}


def _learnable(rows: Sequence[dict[str, Any]], tokenizer: Any, ends: list[int]) -> list[Group]:
    groups = encoded(rows, tokenizer, ends)
    if not groups:
        raise RecipeError(
            f"train: expected rows of [supervised] with prompts that have tokens, got {len(rows)} "
            "without any. Begin prompts with a text, or take a tokenizer that puts a BOS first."
        )
    return groups
