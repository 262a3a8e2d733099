"""What both trainers share: sample, score, update, and what happens when numbers go bad."""

import copy
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fastrl import ops as fast_ops
from fastrl.models.protocol import PolicyModel
from fastrl.rollout import Rollout, completion_seeds, generate
from fastrl.trainers import checkpoint
from fastrl.trainers.config import TrainerConfig
from fastrl.trainers.evaluation import evaluate
from fastrl.trainers.health import TrainingDivergedError, check_finite, without_dropout
from fastrl.trainers.prompts import PromptDataset, PromptOrder, Tokenizer
from fastrl.trainers.scoring import RewardFunction, RewardScorer
from fastrl.trainers.tokens import ScoredTokens, rollout_metrics, score_tokens, to_numbers

Record = dict[str, float]

_TRAINING = 0  # a stream of random numbers apart from the others


class Trainer(ABC):
    """One step: sample completions, reward them, take one gradient step on exactly these.

    A completion that reaches max_new_tokens has ended there like one that said EOS: the task has a
    finite horizon, and nothing is bootstrapped.

    A completion whose reward is NaN or infinite is masked and counted. A non-finite loss or
    gradient, or a step without a usable completion, skips the update and is counted; after
    `max_bad_steps` of these in a row training stops. A checkpoint is never written from a
    non-finite state.

    Every random number of ours is a function of the seed and of what it is drawn for, so neither
    an evaluation nor a resume changes those to come.

    Args:
        model: what is trained, in place, on its own device.
        reward_functions: one function, or a list; `fastrl.trainers.scoring.RewardScorer` says what
            they are given and may return.
        dataset: prompts; `fastrl.trainers.prompts.PromptDataset` says in which forms.
        config: of the trainer's own kind; None: the defaults.
        tokenizer: for prompts that are text; reward functions then get text. Without it they get
            lists of ids.
        ops: `fastrl.ops` or `fastrl.reference`.
    Raises:
        ValueError, TypeError: an argument does not fit.
    """

    config_class: ClassVar[type[TrainerConfig]]

    def __init__(
        self,
        model: nn.Module,
        reward_functions: RewardFunction | Sequence[RewardFunction],
        dataset: Any,
        config: TrainerConfig | None = None,
        *,
        tokenizer: Tokenizer | None = None,
        ops: ModuleType = fast_ops,
    ) -> None:
        self.model: Any = model
        self.policy = self._policy_of(model)
        self.config: Any = self._checked(self.config_class() if config is None else config)
        self.ops = ops
        self.device = next(model.parameters()).device
        self.tokenizer = tokenizer
        self.dataset = PromptDataset(dataset, self.policy.vocab_size, tokenizer)
        self.scorer = RewardScorer(reward_functions, self.config.reward_weights)
        without_dropout(model)
        self.reference: Any = copy.deepcopy(self.policy).requires_grad_(False)  # type: ignore
        self.optimizer = torch.optim.AdamW(
            model.parameters(),
            lr=self.config.learning_rate,
            weight_decay=self.config.weight_decay,
        )
        self.step = 0
        self.bad_steps = 0  # in a row
        self.skipped_updates = 0
        self.own_checkpoint: Path | None = None  # this run's, so free to be replaced
        self._order = PromptOrder(len(self.dataset), self.config.seed)

    @abstractmethod
    def _policy_of(self, model: nn.Module) -> PolicyModel:
        """The part of the model that samples; TypeError for a model of another kind."""

    @abstractmethod
    def _loss(
        self, rollout: Rollout, tokens: ScoredTokens
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """The loss, which tokens entered it ([N] bool), and metrics (0-d tensors)."""

    def state_tensors(self) -> dict[str, Tensor]:
        """What the algorithm remembers from step to step; a resume writes into these."""
        return {}

    @property
    def checkpoint_folder(self) -> Path | None:
        """Where `train` writes its checkpoints: `output_dir/checkpoint`."""
        output_dir = self.config.output_dir
        return None if output_dir is None else Path(output_dir) / "checkpoint"

    def train(
        self,
        *,
        max_steps: int | None = None,
        on_step: Callable[[Record], None] | None = None,
    ) -> list[Record]:
        """Train until the run has `max_steps` steps, those before a resume included.

        Args:
            max_steps: instead of the config's.
            on_step: called with each record as soon as it is there.
        Returns:
            One record for each step of this call: "step" (from 1), "reward" (mean over used
            completions of the sum over their tokens), "rewards/<function>", "rewards/bad" and
            "rewards/none" (counts of completions), "loss", "grad_norm" (before clipping),
            "entropy" (nats), "kl" (from the starting model, nats per token), "completion_length",
            "ended" (share that said EOS), "logprob_gap" (largest difference between sampling and
            update), "bad_steps" (in a row), "skipped_updates" (of the run), "tokens_per_second"
            (of completions), and "time/rollout", "time/reward", "time/update", "time/step" (s).
        Raises:
            TrainingDivergedError: max_bad_steps in a row without an update, or weights that are
                not finite when a checkpoint was due.
            ValueError: output_dir already holds the checkpoint of another run.
        """
        max_steps = self.config.max_steps if max_steps is None else max_steps
        folder, every = self.checkpoint_folder, self.config.save_every
        if folder is not None and folder.resolve() != self.own_checkpoint:
            checkpoint.check_unused(folder)
        records = []
        while self.step < max_steps:
            record, problem = self._train_step()
            records.append(record)
            if on_step is not None:
                on_step(record)
            if self.bad_steps >= self.config.max_bad_steps:
                raise TrainingDivergedError(
                    f"{type(self).__name__}: no update in {self.bad_steps} steps in a row, the "
                    f"last one (step {self.step}) because of {problem}. Check the reward "
                    "functions or lower learning_rate, and resume from the last checkpoint."
                )
            is_due = self.step == max_steps or (every > 0 and self.step % every == 0)
            if folder is not None and is_due:
                self.save(folder)
        return records

    def evaluate(
        self,
        dataset: Any,
        *,
        completions_per_prompt: int = 1,
        temperature: float | None = None,
        seed: int = 0,
    ) -> dict[str, Any]:
        """Sample from each prompt of a dataset and score what comes, without learning.

        Args:
            dataset: as for training.
            completions_per_prompt: of each prompt.
            temperature: of the sampling; None: the run's; 0: the likeliest tokens.
            seed: the same model and seed give the same result.
        Returns:
            "reward", "rewards/<function>", "rewards/bad", "rewards/none", "entropy", "kl",
            "completion_length" and "ended" as in `train`, over all completions;
            "prompt_rewards": each prompt's mean, NaN without a usable completion; "completions"
            and "completion_ids": for each prompt a list, as reward functions saw them.
        """
        return evaluate(
            self,
            dataset,
            completions_per_prompt=completions_per_prompt,
            temperature=self.config.temperature if temperature is None else temperature,
            seed=seed,
        )

    def save(self, folder: str | Path) -> None:
        """Write a checkpoint that `resume` goes on from; see `fastrl.trainers.checkpoint`.

        Raises:
            TrainingDivergedError: a weight or an optimizer moment is not finite.
            ValueError: the folder holds something other than a checkpoint.
        """
        check_finite(self)
        checkpoint.save(self, Path(folder))
        self.own_checkpoint = Path(folder).resolve()

    def resume(self, folder: str | Path) -> "Trainer":
        """Take over a checkpoint's weights, optimizer, step and random state; returns itself.

        Training then goes on to bitwise the weights of a run that was not interrupted (on a CPU).

        Raises:
            ValueError: not a checkpoint, cut short, or of another model, config or dataset; this
                trainer is then unchanged.
        """
        checkpoint.resume(self, Path(folder))
        self.own_checkpoint = Path(folder).resolve()
        return self

    def _train_step(self) -> tuple[Record, str | None]:
        """One step; returns its record, and why the update was skipped if it was."""
        config, started = self.config, time.perf_counter()
        first = self.step * config.prompts_per_step
        positions = range(first, first + config.prompts_per_step)
        examples = [self.dataset[self._order(position)] for position in positions]
        rollout = generate(
            self.policy,
            [example.token_ids.to(self.device) for example in examples],
            completions_per_prompt=config.completions_per_prompt,
            max_new_tokens=config.max_new_tokens,
            seeds=completion_seeds(
                config.seed, _TRAINING, torch.tensor(positions), config.completions_per_prompt
            ),
            temperature=config.temperature,
            eos_token_id=config.eos_token_id,
            ops=self.ops,
        )
        sampled = time.perf_counter()
        scores = self.scorer(examples, rollout, self.dataset, config.eos_token_id)
        rollout = replace(
            rollout,
            rewards=scores.rewards.to(self.device),
            is_used=scores.is_used.to(self.device),
        )
        scored = time.perf_counter()
        metrics, problem = self._update(rollout)
        ended = time.perf_counter()

        self.step += 1
        self.bad_steps = self.bad_steps + 1 if problem else 0
        self.skipped_updates += bool(problem)
        return {
            "step": self.step,
            **scores.metrics,
            **metrics,
            "bad_steps": self.bad_steps,
            "skipped_updates": self.skipped_updates,
            "tokens_per_second": rollout.token_ids.numel() / (ended - started),
            "time/rollout": sampled - started,
            "time/reward": scored - sampled,
            "time/update": ended - scored,
            "time/step": ended - started,
        }, problem

    def _update(self, rollout: Rollout) -> tuple[Record, str | None]:
        """One gradient step; returns its metrics, and why it was skipped if it was."""
        tokens = score_tokens(
            self.policy, self.reference, rollout, temperature=self.config.temperature, ops=self.ops
        )
        loss, is_learned, metrics = self._loss(rollout, tokens)
        self.optimizer.zero_grad()
        loss.backward()
        limit = math.inf if self.config.max_grad_norm is None else self.config.max_grad_norm
        grad_norm = nn.utils.clip_grad_norm_(self.model.parameters(), limit)
        numbers = to_numbers(
            {
                "num_learned": is_learned.sum(),
                "loss": loss,
                "grad_norm": grad_norm,
                **metrics,
                **rollout_metrics(rollout, tokens, self.ops),
                "logprob_gap": (tokens.logprobs - rollout.logprobs).abs().max(),
            }
        )
        problem = None
        if numbers.pop("num_learned") == 0:
            problem = "no completion with a usable reward"
        elif not (math.isfinite(numbers["loss"]) and math.isfinite(numbers["grad_norm"])):
            problem = f"loss {numbers['loss']:g} with gradient norm {numbers['grad_norm']:g}"
        else:
            self.optimizer.step()
        self.optimizer.zero_grad()
        return numbers, problem

    def _checked(self, config: TrainerConfig) -> TrainerConfig:
        name, vocab_size = type(self).__name__, self.policy.vocab_size
        if not isinstance(config, self.config_class):
            raise TypeError(
                f"{name}: expected config {self.config_class.__name__}, got "
                f"{type(config).__name__}. Each trainer has its own."
            )
        if config.eos_token_id is not None and config.eos_token_id >= vocab_size:
            raise ValueError(
                f"{name}: expected eos_token_id in [0, {vocab_size}), got {config.eos_token_id}. "
                "Use the tokenizer that the model was built for."
            )
        return config
