"""What both trainers share: sample, score, update, and what happens when numbers go bad."""

import functools
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn

from fastrl import ops as fast_ops
from fastrl.models import reference_policy
from fastrl.rollout import Environment, Rollout
from fastrl.trainers import checkpoint, sampling
from fastrl.trainers._attachments import Attachments, Part, Record
from fastrl.trainers._objective import Objective
from fastrl.trainers._resume import frozen_weights
from fastrl.trainers._run_state import RunState
from fastrl.trainers._steps import make_steps
from fastrl.trainers.config import TrainerConfig
from fastrl.trainers.engines import RolloutFunction
from fastrl.trainers.evaluation import evaluate
from fastrl.trainers.health import (
    TruncationWatch,
    check_checkpointing,
    check_finite,
    check_importance,
    check_trainable,
    set_learning,
    without_dropout,
)
from fastrl.trainers.metrics import Samples
from fastrl.trainers.processes import Processes
from fastrl.trainers.prompts import Example, PromptDataset, PromptOrder, Tokenizer
from fastrl.trainers.schedules import EntropyController, KLController, temperature
from fastrl.trainers.scoring import RewardFunction, RewardScorer, Scores

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Trainer(RunState, Objective):
    """One step: sample completions, reward them, and learn from exactly these.

    A completion that reaches max_new_tokens has ended there like one that said EOS: the task has a
    finite horizon, and nothing is bootstrapped.

    A completion whose reward is NaN or infinite is masked and counted. A non-finite loss or
    gradient, or a step without a usable completion, skips the update and is counted; after
    `max_bad_steps` of these in a row training stops. A checkpoint is never written from a
    non-finite state.

    Every random number of ours is a function of the seed and of what it is drawn for, so neither
    an evaluation nor a resume changes those to come.

    Args:
        model: what is trained, in place, on its own device: an `LSTMLanguageModel`, a causal
            language model of transformers, bare or with a PEFT adapter, or its name or path (an
            `ActorCritic` around one of these for actor-critic).
        reward_functions: one function, or a list; `fastrl.trainers.scoring.RewardScorer` says what
            they are given and may return. Of several processes the first alone calls them.
        dataset: prompts; `fastrl.trainers.prompts.PromptDataset` says in which forms.
        config: of the trainer's own kind; None: the defaults.
        tokenizer: for prompts that are text; reward functions then get text. Without it they get
            lists of ids.
        rollout_function: samples in the policy's place; see `fastrl.trainers.engines`. Its tokens
            are weighed with their importance, at most config.importance_cap. It ends completions
            itself: stop_strings and environment are then those of `evaluate`, which samples from
            the policy.
        environment: answers completions that have ended, so that they go on; see
            `fastrl.rollout.generate`. Of several processes each asks its own.
        ops: `fastrl.ops` or `fastrl.reference`.
        process_group: of torch.distributed; see `fastrl.trainers.processes`.
    Raises:
        ValueError, TypeError: an argument does not fit.
    """

    config_class: ClassVar[type[TrainerConfig]]

    def __init__(
        self,
        model: nn.Module | str,
        reward_functions: RewardFunction | Sequence[RewardFunction],
        dataset: Any,
        config: TrainerConfig | None = None,
        *,
        tokenizer: Tokenizer | None = None,
        rollout_function: RolloutFunction | None = None,
        environment: Environment | None = None,
        ops: ModuleType = fast_ops,
        process_group: "ProcessGroup | None" = None,
    ) -> None:
        self.processes = Processes(process_group)
        with self.processes.together():
            config = self._checked_config(self.config_class() if config is None else config)
            self.config: Any = config
            self.model: Any = self._checked_model(model)
            self.policy: Any = getattr(self.model, "language_model", self.model)
            self.ops = ops
            self.parameters = [p for p in self.model.parameters() if p.requires_grad]
            check_trainable(self)
            self.device = self.policy.head.weight.device
            self.tokenizer = tokenizer
            self.rollout_function, self.environment = rollout_function, environment
            self.eos_token_ids = sampling.eos_token_ids(self)
            self.dataset = self.prompts(dataset)
            self.processes.begin(self)
            self.scorer = RewardScorer(
                reward_functions,
                config.reward_weights,
                timeout=config.reward_timeout,
                errors=config.reward_errors,
            )
            check_importance(self)
            check_checkpointing(self)
            without_dropout(self.model, will_learn_with_it=config.dropout)
            needs_reference = config.kl_coef > 0 or config.kl_every > 0
            self.reference: Any = reference_policy(self.policy) if needs_reference else None
            self.optimizer = torch.optim.AdamW(
                [{"params": self.processes.owned(self.parameters)}],
                lr=config.learning_rate,
                weight_decay=config.weight_decay,
                fused=True,
            )
            self.kl = KLController(config.kl_coef, config.kl_target, config.kl_horizon)
            self.entropy = EntropyController(
                config.entropy_coef, config.entropy_target, config.entropy_rate
            )
            self.own_checkpoints: set[Path] = set()  # this run's, so free to be replaced
            self.last_samples: Samples | None = None
            self.attachments = Attachments()
            self.truncation = TruncationWatch()
            self.order = PromptOrder(len(self.dataset), config.seed)

    def set_learning(self, learning: bool) -> None:
        """The model's mode while gradients are computed, or while it samples."""
        set_learning(self, learning)

    @property
    def temperature(self) -> float:
        """Of the step that is next, or under way."""
        return temperature(self.config, self.step)

    @property
    def epoch(self) -> float:
        """How often the run has seen the dataset."""
        return self.step * self.config.prompts_per_step / len(self.dataset)

    @functools.cached_property
    def frozen_weights(self) -> dict[str, str]:
        """By name, what tells those that no step changes from others; see `checkpoint`."""
        return frozen_weights(self.model)

    @property
    def checkpoint_folder(self) -> Path | None:
        """Where `train` writes its checkpoints: `output_dir/checkpoint`."""
        output_dir = self.config.output_dir
        return None if output_dir is None else Path(output_dir) / "checkpoint"

    def train(
        self, *, max_steps: int | None = None, on_step: Part | Sequence[Part] | None = None
    ) -> list[Record]:
        """Train until the run has `max_steps` steps, those before a resume included.

        Args:
            max_steps: instead of the config's.
            on_step: called with each record as soon as it is there, behind the attached parts;
                one function or several. One that raises `StopTraining` ends the run here.
        Returns:
            One record for each step of this call; `fastrl.trainers.metrics` lists what is in it.
        Raises:
            TrainingDivergedError: max_bad_steps in a row without an update, or weights that are
                not finite when a checkpoint was due.
            ValueError: output_dir already holds the checkpoint of another run.
        """
        max_steps = self.config.max_steps if max_steps is None else max_steps
        callbacks = [on_step] if callable(on_step) else list(on_step or ())
        with self.processes.together():
            return make_steps(self, max_steps, callbacks)

    def attach(self, name: str, part: Part) -> None:
        """Let a part ride along: part(record) is called right after each step.

        That is before the callbacks of `train` and before a checkpoint of the step is written. It
        may add floats to the record, and end the run by raising `StopTraining`. A part with a
        method `start` has it called when `train` is about to make steps, and may end the run there.
        The state of one with state_dict and load_state_dict is saved and resumed under its name; a
        checkpoint written without any such part leaves the parts as they are.

        Raises:
            ValueError: the name is taken.  TypeError: name is no string, or part no callable.
        """
        self.attachments.add(name, part)

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
            "reward", "rewards/...", "entropy", "kl" (NaN without a reference) and "completions/..."
            as in `train`, over all completions; "prompt_rewards": each prompt's mean, NaN without
            a usable completion; "completions" and "completion_ids": for each prompt a list, as
            reward functions saw them.
        """
        with self.processes.together():
            return evaluate(
                self,
                dataset,
                completions_per_prompt=completions_per_prompt,
                temperature=self.temperature if temperature is None else temperature,
                seed=seed,
            )

    def prompts(self, dataset: Any) -> PromptDataset:
        """A dataset as the trainer reads it."""
        return PromptDataset(
            dataset,
            self.policy.vocab_size,
            self.tokenizer,
            max_prompt_tokens=self.config.max_prompt_tokens,
            chat_template_kwargs=self.config.chat_template_kwargs,
        )

    def scored(
        self,
        examples: list[Example],
        rollout: Rollout,
        dataset: PromptDataset,
        scorer: RewardScorer | None = None,
        *,
        is_evaluation: bool = False,
    ) -> Scores:
        """The rewards of a rollout; functions of TRL's are told where the run stands."""
        run = SimpleNamespace(
            global_step=self.step, max_steps=self.config.max_steps, epoch=self.epoch,
            is_evaluation=is_evaluation,
        )  # fmt: skip
        scorer = self.scorer if scorer is None else scorer
        with self.processes.together():
            return self.processes.on_first(
                "rewards",
                lambda: scorer(examples, rollout, dataset, self.eos_token_ids, trainer_state=run),
            )

    def samples(self) -> list[dict[str, Any]]:
        """Of the last step's completions: prompt, completion, reward, and by function."""
        return [] if self.last_samples is None else self.last_samples.rows()

    def save(self, folder: str | Path) -> None:
        """Write a checkpoint that `resume` goes on from; see `fastrl.trainers.checkpoint`.

        A Hugging Face policy's loads in `AutoModelForCausalLM.from_pretrained`.

        Raises:
            TrainingDivergedError: a weight or an optimizer moment is not finite.
            ValueError: the folder holds something other than a checkpoint.
            OSError: it cannot be written; the one that was there stands.
        """
        with self.processes.together():
            check_finite(self)
            checkpoint.save(self, Path(folder))
        self.own_checkpoints.add(Path(folder).resolve())

    def resume(self, folder: str | Path) -> "Trainer":
        """Take over a checkpoint's weights, optimizer, step and random state; returns itself.

        Training then goes on to bitwise the weights of a run that was not interrupted (on a CPU).
        A RuntimeWarning says where the dataset has other prompts, as far as 100 of them tell.

        Raises:
            ValueError: not a checkpoint, cut short, or of another model (frozen weights are
                compared by digests of their bits), config or size of the dataset; this trainer is
                then unchanged.
        """
        with self.processes.together():
            checkpoint.resume(self, Path(folder))
        self.own_checkpoints.add(Path(folder).resolve())
        return self

    def _checked_config(self, config: TrainerConfig) -> TrainerConfig:
        if not isinstance(config, self.config_class):
            raise TypeError(
                f"{type(self).__name__}: expected config {self.config_class.__name__}, got "
                f"{type(config).__name__}. Each trainer has its own."
            )
        return config
