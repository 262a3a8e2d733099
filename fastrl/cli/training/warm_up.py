"""Maximum likelihood: the language model that both reinforcement stages start from.

    loss = −1/n Σ log P(w_i | w_<i)

Every random choice is a function of seed and step, so an interrupted warm-up goes on to the same
weights. What is kept in the end is the model that was best on the validation text.
"""

import math
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from fastrl.cli.training.perplexity import perplexity
from fastrl.cli.training.progress_file import load_progress, save_progress
from fastrl.cli.training.settings import TrainSettings
from fastrl.models import LSTMLanguageModel

CHECKS = 14  # validations in a warm-up
RISING_STEPS = 20  # of the learning rate, at the start
# Replacing some of the tokens read, never those predicted, is the regulariser: the text is short.
NOISE = 0.1


class WarmUp:
    """The warm-up of a model, in place.

    Args:
        model: freshly initialised.
        train, validation: token ids of blocks of text.
        settings: the run's.
        ops: `fastrl.ops` or `fastrl.reference`.
    """

    def __init__(
        self,
        model: LSTMLanguageModel,
        train: list[Tensor],
        validation: list[Tensor],
        settings: TrainSettings,
        ops: ModuleType,
    ) -> None:
        self.model, self.settings, self.ops = model, settings, ops
        self.device = next(model.parameters()).device
        self.text = torch.cat(train)
        self.validation = validation
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=settings.warmup_learning_rate, weight_decay=0.05
        )
        self.step = 0
        self.best_perplexity = math.inf
        self.best = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def train(self, on_step: Callable[[dict[str, float]], None]) -> None:
        """Run to the end of the warm-up; the model then is the best one."""
        total = self.settings.warmup_steps
        while self.step < total:
            started = time.perf_counter()
            loss, grad_norm = self._train_step()
            self.step += 1
            record = {"step": self.step, "loss": loss, "grad_norm": grad_norm}
            if self.step == total or self.step % max(1, total // CHECKS) == 0:
                record["validation_perplexity"] = self._validate()
            elapsed = time.perf_counter() - started
            tokens = self.settings.warmup_batch * self.settings.warmup_length
            on_step({**record, "tokens_per_second": tokens / elapsed, "time/step": elapsed})
        self.model.load_state_dict(self.best)

    def save(self, path: Path) -> None:
        """One file, so that it is whole or not there."""
        progress = {"step": self.step, "best_perplexity": self.best_perplexity}
        save_progress(path, self.model, self.best, self.optimizer, progress)

    def resume(self, path: Path) -> None:
        """Go on from a file that `save` wrote.

        Raises:
            RunFolderError: it is damaged or of another model; nothing was changed.
        """
        self.best, progress = load_progress(path, self.model, self.optimizer, "the warm-up")
        self.step, self.best_perplexity = progress["step"], progress["best_perplexity"]

    def _train_step(self) -> tuple[float, float]:
        settings = self.settings
        inputs, targets = self._batch()
        for group in self.optimizer.param_groups:
            group["lr"] = self._learning_rate()
        logits, _ = self.model(inputs)
        loss = -self.ops.token_logprobs(logits, targets, inplace_backward=True).mean()
        self.optimizer.zero_grad()
        loss.backward()
        grad_norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        if not bool(grad_norm.isfinite()):
            raise FloatingPointError(
                f"train: expected finite gradients in the warm-up, got {float(grad_norm)} at step "
                f"{self.step + 1}. Lower --warmup-learning-rate {settings.warmup_learning_rate}."
            )
        self.optimizer.step()
        return float(loss.detach()), float(grad_norm)

    def _batch(self) -> tuple[Tensor, Tensor]:
        """Inputs and targets [B, T] of this step."""
        settings = self.settings
        generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + self.step)
        shape = (settings.warmup_batch, settings.warmup_length)
        starts = torch.randint(
            self.text.numel() - settings.warmup_length, shape[:1], generator=generator
        )
        windows = self.text[starts[:, None] + torch.arange(settings.warmup_length + 1)]
        noise = torch.randint(self.model.vocab_size, shape, generator=generator)
        is_noise = torch.rand(shape, generator=generator) < NOISE
        inputs = torch.where(is_noise, noise, windows[:, :-1])
        return inputs.to(self.device), windows[:, 1:].contiguous().to(self.device)

    def _learning_rate(self) -> float:
        rising = min(1.0, (self.step + 1) / RISING_STEPS)
        falling = 1.0 - 0.95 * self.step / self.settings.warmup_steps
        return self.settings.warmup_learning_rate * rising * falling

    def _validate(self) -> float:
        result = perplexity(self.model, self.validation, self.ops)
        if result < self.best_perplexity:
            self.best_perplexity = result
            self.best = {name: t.clone() for name, t in self.model.state_dict().items()}
        return result
