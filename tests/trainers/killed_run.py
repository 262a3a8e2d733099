"""Runs that are killed with SIGKILL and resumed; test_killed.py starts this and reads its report.

A process of one thread that has imported torch forks each attempt: an attempt costs milliseconds.
"""

import io
import json
import mmap
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import numpy as np
import torch
from replaced_os import replace

from fastrl.models import ActorCritic, LSTMLanguageModel
from fastrl.trainers import (
    ActorCriticConfig,
    ActorCriticTrainer,
    PolicyGradientConfig,
    PolicyGradientTrainer,
    checkpoint,
)

NUM_KILLS = 20
MAX_STEPS = 30
PHASES = ["start", "rollout", "update", "save"]
START, ROLLOUT, UPDATE, SAVE = range(4)
phase, found_step = mmap.mmap(-1, 1), mmap.mmap(-1, 1)  # shared with the attempts


class Noisy:
    """A reward function that remembers, and draws from every global generator."""

    def __init__(self):
        self.calls, self.total = 0, torch.zeros((), dtype=torch.float64)

    def __call__(self, completion_ids, **_):
        self.calls += 1
        noise = random.gauss(0, 1) + np.random.randn() + float(torch.rand(()))
        self.total += noise
        phase[0] = UPDATE
        return [[token / 8 + noise / self.calls for token in ids] for ids in completion_ids]

    def state_dict(self):
        return {"calls": self.calls, "total": self.total.clone()}

    def load_state_dict(self, state):
        self.calls = state["calls"]
        self.total.copy_(state["total"])


def seed_all(seed):
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def build(kind, folder):
    """A small trainer whose state is more than its step."""
    sizes = {"prompts_per_step": 2, "completions_per_prompt": 2, "max_new_tokens": 4}
    options = {"output_dir": folder, "save_every": 1, "max_steps": MAX_STEPS, **sizes}
    model, prompts = LSTMLanguageModel(8, 4, 8), [[1, 2], [3], [4, 5, 6]]
    if kind == "reinforce":
        config = PolicyGradientConfig(
            baseline="running_mean", kl_coef=0.1, kl_target=0.01, **options
        )
        return PolicyGradientTrainer(model, Noisy(), prompts, config)
    config = ActorCriticConfig(algorithm=kind, replay_size=2 if kind == "vtrace" else 0, **options)
    return ActorCriticTrainer(ActorCritic(model), Noisy(), prompts, config)


def attempt(kind, folder, seed, max_steps=MAX_STEPS):
    """Go on with the run in a folder, or start it."""
    seed_all(0)
    trainer = build(kind, folder)
    if checkpoint.exists(trainer.checkpoint_folder):
        seed_all(seed)  # where a resumed process happens to stand
        trainer.resume(trainer.checkpoint_folder)
    found_step[0] = trainer.step
    save = trainer.save

    def marked_save(path):
        phase[0] = SAVE
        save(path)
        phase[0] = ROLLOUT

    trainer.save = marked_save
    phase[0] = ROLLOUT
    trainer.train(max_steps=max_steps)


def fork(function, *arguments):
    """The child's process id; it ends with status 0 if the function returned."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            function(*arguments)
            status = 0
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            os._exit(status)
    return pid


def finish(function, *arguments):
    """Run in a child to its end; whether it was killed."""
    return was_killed(fork(function, *arguments))


def was_killed(pid):
    """Wait for a child's end, which is that of its function or SIGKILL."""
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if code not in (0, -signal.SIGKILL):
        raise SystemExit(f"an attempt ended with {code}")
    return code != 0


def kill_at_random_moments(kind, root):
    """Kill at least NUM_KILLS times, and in every phase; the phases that were hit."""
    started = time.perf_counter()
    finish(attempt, kind, root / "whole", 0)
    step = (time.perf_counter() - started) / MAX_STEPS
    delays, hits, runs = random.Random(7), [], 0
    while len(hits) < NUM_KILLS or (len(set(hits)) < len(PHASES) and len(hits) < 10 * NUM_KILLS):
        phase[0] = START
        pid = fork(attempt, kind, root / f"killed{runs}", len(hits) + 1)
        time.sleep(delays.uniform(0, 5 * step))
        os.kill(pid, signal.SIGKILL)
        if was_killed(pid):
            hits.append(phase[0])
        else:
            runs += 1  # it was at its end before
    finish(attempt, kind, root / f"killed{runs}", len(hits) + 1)
    return {"hits": [PHASES[hit] for hit in hits], "runs": runs + 1}


def kill_at_operation(number):
    """Kill this process before its `number`-th operation on files from now on."""
    done = 0

    def counted(function):
        def call(*arguments, **options):
            nonlocal done
            done += 1
            if done == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **options)

        return call

    for name in ("mkdir", "rename", "open", "fsync", "unlink", "rmdir"):
        replace(os, name, counted(getattr(os, name)))
    replace(io, "open", counted(io.open))


def save_and_die(kind, folder, number, step):
    """The step up to `step`, and die at an operation of its save."""
    seed_all(0)
    trainer = build(kind, folder)
    if step > 1:
        trainer.resume(trainer.checkpoint_folder)
    save = trainer.save

    def deadly_save(path):
        kill_at_operation(number)
        save(path)

    trainer.save = deadly_save
    trainer.train(max_steps=step)


def kill_at_every_operation(kind, root, step):
    """Die before each operation of the save of one step; which steps were found afterwards."""
    for name, steps in (("before", step - 1), ("whole", step + 1)):
        (root / name).mkdir(parents=True)
        if steps:
            finish(attempt, kind, root / name, 0, steps)
    found: list[int] = []
    is_alive = False
    while not is_alive:
        folder = root / f"killed{len(found)}"
        shutil.copytree(root / "before", folder)
        is_alive = not finish(save_and_die, kind, folder, len(found) + 1, step)
        attempt(kind, folder, len(found) + 1, step + 1)  # here: a fork costs more than that
        found.append(found_step[0])
    return {"operations": len(found) - 1, "found": found}


def main():
    torch.set_num_threads(1)
    root, report = Path(sys.argv[1]), {}
    for kind in ("reinforce", "vtrace"):
        attempt(kind, root / kind / "warm_up", 0, 1)  # what its children need not do again
        report[kind] = {"random": kill_at_random_moments(kind, root / kind / "random")}
    report["reinforce"] |= {
        "first": kill_at_every_operation("reinforce", root / "reinforce" / "first", 1),
        "later": kill_at_every_operation("reinforce", root / "reinforce" / "later", 3),
    }
    (root / "report.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main()
