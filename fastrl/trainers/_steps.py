"""The steps of a run one after the other, and who is told of each."""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from fastrl._transfer import on_device
from fastrl.rollout import Rollout
from fastrl.trainers import checkpoint, sampling
from fastrl.trainers._attachments import Part, Record, StopTraining
from fastrl.trainers.experience import gather
from fastrl.trainers.health import TrainingDivergedError, warn_of_16_bit_weights
from fastrl.trainers.metrics import Samples, metrics_of_given_rewards, rollout_metrics
from fastrl.trainers.prompts import Example
from fastrl.trainers.schedules import learning_rate
from fastrl.trainers.scoring import Scores
from fastrl.trainers.update import learn

if TYPE_CHECKING:
    from fastrl.trainers.trainer import Trainer


def make_steps(trainer: "Trainer", max_steps: int, callbacks: list[Part]) -> list[Record]:
    """See `Trainer.train`."""
    folder, every = trainer.checkpoint_folder, trainer.config.save_every
    trainer.processes.check_equal("step and max_steps", (trainer.step, max_steps))
    trainer.processes.check_weights(trainer)
    if folder is not None and folder.resolve() not in trainer.own_checkpoints:
        checkpoint.check_unused(folder)
    if trainer.step < max_steps:
        warn_of_16_bit_weights(trainer)
    records: list[Record] = []
    is_stopped = trainer.step < max_steps and _tell(trainer, trainer.attachments.starts)
    while trainer.step < max_steps and not is_stopped:
        record, problem = _make_step(trainer)
        records.append(record)
        is_stopped = _tell(trainer, [*trainer.attachments, *callbacks], record)
        if trainer.bad_steps >= trainer.config.max_bad_steps:
            raise TrainingDivergedError(
                f"{type(trainer).__name__}: no update in {trainer.bad_steps} steps in a row, the "
                f"last one (step {trainer.step}) because of {problem}. Check the reward "
                "functions or lower learning_rate, and resume from the last checkpoint."
            )
        is_last = is_stopped or trainer.step == max_steps
        if folder is not None and (is_last or (every > 0 and trainer.step % every == 0)):
            trainer.save(folder)
    return records


def _tell(trainer: "Trainer", listeners: Sequence[Callable[..., None]], *news: Record) -> bool:
    """Call all of them; whether one wants to stop, in this process or another."""
    is_stopped = False
    for listener in listeners:
        try:
            listener(*news)
        except StopTraining:  # those behind it are told as well
            is_stopped = True
    return trainer.processes.any("callbacks", is_stopped)


def _make_step(trainer: "Trainer") -> tuple[Record, str | None]:
    """One step; returns its record, and why an update was skipped if one was."""
    started = time.perf_counter()
    first = trainer.step * trainer.config.prompts_per_step
    positions = range(first, first + trainer.config.prompts_per_step)
    indices = [trainer.order(position) for position in positions]
    examples = trainer.processes.examples(trainer.dataset, indices)
    rollout = sampling.collect(trainer, examples, torch.tensor(positions))
    sampled = time.perf_counter()
    given = rollout
    scores, rollout = _score(trainer, examples, given)
    scored = time.perf_counter()
    metrics, problem = _update(trainer, rollout)
    ended = time.perf_counter()

    trainer.step += 1
    trainer.bad_steps = trainer.bad_steps + 1 if problem else 0
    trainer.skipped_updates += bool(problem)
    trainer.num_tokens += rollout.batch.layout.num_tokens
    trainer.last_samples = Samples(trainer, examples, rollout, scores)
    record = {
        "step": trainer.step,
        **(metrics_of_given_rewards(given, rollout) if scores is None else scores.metrics),
        **metrics,
        **rollout_metrics(rollout),
        "epoch": trainer.epoch,
        "num_tokens": trainer.num_tokens,
        "bad_steps": trainer.bad_steps,
        "skipped_updates": trainer.skipped_updates,
        "tokens_per_second": rollout.token_ids.numel() / (ended - started),
        "time/rollout": sampled - started,
        "time/reward": scored - sampled,
        "time/update": ended - scored,
        "time/step": ended - started,
    }
    record = trainer.processes.on_first("the record", lambda: record)  # others' clocks differ
    return record, problem


def _score(
    trainer: "Trainer", examples: list[Example], rollout: Rollout
) -> tuple[Scores | None, Rollout]:
    if rollout.rewards is not None:  # who made the rollout has rewarded it
        return None, sampling.with_usable_rewards(rollout)
    scores = trainer.scored(examples, rollout, trainer.dataset)
    rewards, is_used = on_device([scores.rewards, scores.is_used], trainer.device)
    return scores, replace(rollout, rewards=rewards, is_used=is_used)


def _update(trainer: "Trainer", rollout: Rollout) -> tuple[Record, str | None]:
    """Learn from a rollout; returns metrics, and why an update was skipped if one was."""
    rate = learning_rate(trainer.config, trainer.step)
    for group in trainer.optimizer.param_groups:
        group["lr"] = rate
    numbers: Record = {
        "learning_rate": rate, "temperature": trainer.temperature, "kl_coef": trainer.kl.coef,
        "entropy_coef": trainer.entropy.coef,
    }  # fmt: skip
    known, metrics = gather(trainer, rollout)
    trainer.truncation.look(trainer, known)
    learned, problem = learn(trainer, known, metrics)
    numbers |= learned
    if "kl" in numbers:
        trainer.kl.update(numbers["kl"], len(rollout.ended))
    trainer.entropy.update(numbers["entropy"])
    return numbers, problem
