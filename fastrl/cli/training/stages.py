"""The stages of a run: warm-up, policy gradient and actor-critic from there, step timing.

A stage that is finished has its result in results.json and is not run again. One that was
interrupted has a checkpoint in its folder and goes on from it.
"""

import copy
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from rich.console import Console

from fastrl.cli.training.held_out import evaluate
from fastrl.cli.training.interruption import Interrupted, StopRequest
from fastrl.cli.training.run_folder import MetricsLog, RunFolder, RunFolderError
from fastrl.cli.training.settings import TrainSettings
from fastrl.cli.training.step_timing import compare_steps
from fastrl.cli.training.text_data import TextData
from fastrl.cli.training.warm_up import WarmUp
from fastrl.models import ActorCritic, LSTMLanguageModel
from fastrl.rewards import ContinuationReward
from fastrl.trainers import (
    ActorCriticConfig,
    ActorCriticTrainer,
    PolicyGradientConfig,
    PolicyGradientTrainer,
    checkpoint,
)
from fastrl.trainers.loggers import ProgressBar
from fastrl.trainers.trainer import Trainer

WARM_UP, POLICY_GRADIENT, ACTOR_CRITIC = "warm_up", "policy_gradient", "actor_critic"
STEP_TIMING = "step_timing"
TITLES = {
    WARM_UP: "warm-up",
    POLICY_GRADIENT: "policy gradient",
    ACTOR_CRITIC: "actor-critic",
}


@dataclass(kw_only=True)
class Run:
    """One run: what it works with, and where it stands.

    Attributes:
        ops: `fastrl.ops` or `fastrl.reference`.
        results: of the stages that are finished; results.json.
        stage: the one that is running, for whoever interrupts it.
    """

    settings: TrainSettings
    data: TextData
    reward: ContinuationReward
    folder: RunFolder
    log: MetricsLog
    results: dict[str, Any]
    ops: ModuleType
    device: torch.device
    console: Console
    stop: StopRequest
    stage: str = WARM_UP

    def go_on(self) -> None:
        """Run what is left of the stages.

        Raises:
            Interrupted: a stop was asked for; everything up to then is saved.
            RunFolderError: a checkpoint is damaged.
        """
        model = self._warm_up()
        self._reinforce(POLICY_GRADIENT, model)
        self._reinforce(ACTOR_CRITIC, model)
        if STEP_TIMING not in self.results:
            self.stage = STEP_TIMING
            self.stop.check()
            timing = compare_steps(
                model, lambda model, ops: self._policy_gradient(model, ops=ops, output_dir=None)
            )
            self._finish(STEP_TIMING, timing)

    def _warm_up(self) -> LSTMLanguageModel:
        settings = self.settings
        torch.manual_seed(settings.seed)
        vocab_size = self.data.tokenizer.get_vocab_size()
        model = LSTMLanguageModel(
            vocab_size, settings.embed_dim, settings.hidden_dim, settings.num_layers
        ).to(self.device)
        warm_up = WarmUp(model, self.data.train, self.data.validation, settings, self.ops)
        path = self.folder.path / WARM_UP / "state.safetensors"
        if path.exists():
            warm_up.resume(path)
        self.log.begin_stage(WARM_UP, warm_up.step)
        with self._progress(WARM_UP, settings.warmup_steps, warm_up.step) as progress:

            def on_step(record: dict[str, float]) -> None:
                self.log.add(WARM_UP, record)
                progress.update(warm_up.step, f"loss {record['loss']:.3f} nats/token")
                if warm_up.step % settings.save_every == 0:
                    warm_up.save(path)
                self.stop.check()

            try:
                warm_up.train(on_step)
            except Interrupted:
                warm_up.save(path)
                raise
        if WARM_UP not in self.results:
            warm_up.save(path)
            self._evaluate(WARM_UP, self._policy_gradient(copy.deepcopy(model), output_dir=None))
        return model

    def _reinforce(self, stage: str, model: LSTMLanguageModel) -> None:
        if stage in self.results:
            return
        make = self._policy_gradient if stage == POLICY_GRADIENT else self._actor_critic
        trainer = make(copy.deepcopy(model), output_dir=self.folder.path / stage)
        place = trainer.checkpoint_folder
        assert place is not None
        if checkpoint.exists(place):
            try:
                trainer.resume(place)
            except ValueError as error:
                raise RunFolderError(
                    f"{error} Or delete {place} to repeat the stage, and resume again."
                ) from error
        self.log.begin_stage(stage, trainer.step)
        with self._progress(stage, self.settings.steps, trainer.step) as progress:

            def on_step(record: dict[str, float]) -> None:
                self.log.add(stage, record)
                progress.update(
                    trainer.step, f"reward {record['reward']:+.3f}, entropy {record['entropy']:.2f}"
                )
                self.stop.check()

            try:
                trainer.train(on_step=on_step)
            except Interrupted:
                trainer.save(place)
                raise
        self._evaluate(stage, trainer)

    @contextmanager
    def _progress(self, stage: str, total: int, done: int) -> Iterator[ProgressBar]:
        self.stage = stage
        self.stop.check()
        with ProgressBar(total, title=TITLES[stage], done=done, console=self.console) as progress:
            yield progress

    def _evaluate(self, stage: str, trainer: Trainer) -> None:
        result = evaluate(trainer, self.data, self.reward, self.settings.evaluation_completions)
        rates = [record["tokens_per_second"] for record in self.log.of_stage(stage)]
        self._finish(stage, {**result, "tokens_per_second": statistics.median(rates)})

    def _finish(self, stage: str, result: dict[str, Any]) -> None:
        self.results[stage] = result
        self.folder.write_json(self.folder.results, self.results)

    def _policy_gradient(
        self, model: LSTMLanguageModel, *, output_dir: Path | None, ops: ModuleType | None = None
    ) -> PolicyGradientTrainer:
        config = PolicyGradientConfig(baseline="rloo", **self._config(output_dir))
        return PolicyGradientTrainer(
            model,
            self.reward,
            self.data.train_prompts,
            config,
            tokenizer=self.data.tokenizer,
            ops=self.ops if ops is None else ops,
        )

    def _actor_critic(
        self, model: LSTMLanguageModel, *, output_dir: Path | None
    ) -> ActorCriticTrainer:
        config = ActorCriticConfig(advantage="gae", **self._config(output_dir))
        return ActorCriticTrainer(
            ActorCritic(model),
            self.reward,
            self.data.train_prompts,
            config,
            tokenizer=self.data.tokenizer,
            ops=self.ops,
        )

    def _config(self, output_dir: Path | None) -> dict[str, Any]:
        settings = self.settings
        return {
            "temperature": settings.temperature,
            "gamma": settings.gamma,
            "prompts_per_step": settings.prompts_per_step,
            "completions_per_prompt": settings.completions_per_prompt,
            "max_new_tokens": settings.completion_tokens,
            "eos_token_id": self.data.eos_token_id,
            "kl_coef": settings.kl_coef,
            "entropy_coef": settings.entropy_coef,
            "learning_rate": settings.learning_rate,
            "max_steps": settings.steps,
            "seed": settings.seed,
            "output_dir": None if output_dir is None else str(output_dir),
            "save_every": settings.save_every,
        }
