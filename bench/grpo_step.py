"""Whole training steps: fastrl's trainers beside TRL's GRPOTrainer, and the rollouts alone.

    python -m bench.grpo_step --case long       # prompts of 256 tokens, 4 x 16 completions of 64
    python -m bench.grpo_step --case short      # prompts of 30 tokens, 8 x 8 completions of 64
    python -m bench.grpo_step --case long --only trl grpo --rounds 5 --json long.json

One random Llama, one dataset of texts, one reward function, in float32 on the CPU. A step's time is
the wall clock around the whole `train()` call, rewards and logging included, over its steps. The
contestants take turns; each turn has a new trainer, built outside the clock. Peak memory is that of
a process of its own, beyond what it held with the trainer built.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from bench import memory, trainings
from bench.environment import ROOT, describe
from bench.trl_step import quiet

CASES = {
    "long": {"prompts": 4, "completions": 16, "prompt_tokens": 256, "tokens": 64},
    "short": {"prompts": 8, "completions": 8, "prompt_tokens": 30, "tokens": 64},
}
CONTESTANTS = {
    "trl": ("TRL GRPOTrainer", trainings.trl_grpo),
    "grpo": ("fastrl GRPO", trainings.fastrl_grpo),
    "ppo": ("fastrl PPO, value head", trainings.fastrl_ppo),
    "generate": ("transformers generate", trainings.sampled_by_transformers),
    "rollout": ("fastrl rollout", trainings.sampled_by_fastrl),
}
_PARTS = ("time/rollout", "time/reward", "time/update")


@dataclass
class Run:
    """What one contestant gave.

    first: seconds of its first call in this process, of one step: what is loaded and compiled then.
    seconds: of a step, for each turn.
    records: what it logged of the steps that were timed.
    peak: MiB; None where the system does not tell.
    """

    first: float = 0.0
    seconds: list[float] = field(default_factory=list)
    records: list[dict[str, float]] = field(default_factory=list)
    peak: float | None = None

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def mean(self, key: str) -> float | None:
        """Of a figure that was logged; None where it was not."""
        found = [record[key] for record in self.records if key in record]
        return statistics.mean(found) if found else None


@dataclass(frozen=True)
class Target:
    """A ratio or a figure that was promised.

    at_most: whether the promise is an upper bound.
    """

    name: str
    value: float
    bound: float
    at_most: bool
    unit: str = "x"

    def __str__(self) -> str:
        kept = self.value <= self.bound if self.at_most else self.value >= self.bound
        promise = f"{'<=' if self.at_most else '>='} {self.bound:g}{self.unit}"
        verdict = "kept" if kept else "MISSED"
        shown = f"{self.value:.2f}" if self.unit else f"{self.value:.1e}"
        return f"{self.name:44}{shown + self.unit:>10}   {promise:9} {verdict}"


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m bench.grpo_step", description=__doc__.split("\n")[0]
    )
    p.add_argument("--case", choices=tuple(CASES), default="long")
    p.add_argument("--only", nargs="+", choices=tuple(CONTESTANTS), default=list(CONTESTANTS))
    p.add_argument("--vocab", type=int, default=8192)
    p.add_argument("--hidden", type=int, default=256)
    p.add_argument("--head-size", type=int, default=64)
    p.add_argument("--layers", type=int, default=4)
    p.add_argument("--prompts", type=int, help="a step; default: the case's, like the next three")
    p.add_argument("--completions", type=int, help="of each prompt")
    p.add_argument("--prompt-tokens", type=int)
    p.add_argument("--tokens", type=int, help="of a completion")
    p.add_argument("--checkpointing", action="store_true", help="gradient checkpointing, for all")
    p.add_argument("--steps", type=int, default=4, help="of a turn")
    p.add_argument("--rounds", type=int, default=3, help="turns of each")
    p.add_argument("--json", type=Path, metavar="FILE", help="write what was measured")
    p.add_argument("--peak-of", choices=tuple(CONTESTANTS), help=argparse.SUPPRESS)
    return p


def main(argv: list[str] | None = None) -> None:
    options = parser().parse_args(argv)
    for name, value in CASES[options.case].items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    if options.peak_of is not None:
        with quiet():
            print(peak_of(options.peak_of, options))
        return
    runs = measure(options)
    targets = targets_of(runs, options.case)
    show(runs, targets, options)
    if options.json is not None:
        write(runs, targets, options)


def measure(options: argparse.Namespace) -> dict[str, Run]:
    runs = {name: Run() for name in options.only}
    with quiet():
        for name, run in runs.items():
            run.first, _ = timed(name, options, 1)
        for _ in range(options.rounds):
            for name, run in runs.items():
                seconds, records = timed(name, options, options.steps)
                run.seconds.append(seconds / options.steps)
                run.records += records
    if memory.can_measure(torch.device("cpu")):
        for name, run in runs.items():
            run.peak = peak_in_a_process(name, options)
    return runs


def timed(
    name: str, options: argparse.Namespace, steps: int
) -> tuple[float, list[trainings.Record]]:
    """Seconds of the whole call, and what was logged of each step."""
    with tempfile.TemporaryDirectory() as folder:
        call = CONTESTANTS[name][1](options, steps, folder)
        memory.release(torch.device("cpu"))
        start = time.perf_counter()
        records = call()
        seconds = time.perf_counter() - start
    print(f"{name}: {steps} steps in {seconds:.1f} s", file=sys.stderr, flush=True)
    return seconds, records


def peak_of(name: str, options: argparse.Namespace) -> float:
    """MiB beyond what this process holds once everything is loaded and the trainer is built."""
    timed(name, options, 1)
    with tempfile.TemporaryDirectory() as folder:
        call = CONTESTANTS[name][1](options, options.steps, folder)
        return memory.peak_extra_mib(call, torch.device("cpu"))


def peak_in_a_process(name: str, options: argparse.Namespace) -> float:
    given = ["--peak-of", name, "--case", options.case, "--steps", str(options.steps)]
    for size in ("vocab", "hidden", "head_size", "layers", *CASES[options.case]):
        given += [f"--{size.replace('_', '-')}", str(getattr(options, size))]
    given += ["--checkpointing"] * options.checkpointing
    done = subprocess.run(
        [sys.executable, "-m", "bench.grpo_step", *given],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode != 0:
        raise RuntimeError(f"grpo_step: expected the peak memory of {name}, got:\n{done.stderr}")
    return float(done.stdout.split()[-1])


def targets_of(runs: dict[str, Run], case: str) -> list[Target]:
    """What the project promised, of the contestants that ran."""

    def seconds(a: str, b: str) -> float | None:
        return runs[a].median / runs[b].median if a in runs and b in runs else None

    def peaks(a: str, b: str) -> float | None:
        one, other = (runs[name].peak if name in runs else None for name in (a, b))
        return None if one is None or other is None else one / max(other, 1e-9)

    gaps = [r["logprob_gap"] for run in runs.values() for r in run.records if "logprob_gap" in r]
    step, rollout = (6.0, 5.0) if case == "long" else (2.5, 2.5)
    gap = float(torch.tensor(gaps).max()) if gaps else None  # NaN where one is
    found = [
        ("step, TRL / fastrl GRPO", seconds("trl", "grpo"), step, False, "x"),
        ("peak memory, fastrl GRPO / TRL", peaks("grpo", "trl"), 0.5, True, "x"),
        ("rollout, transformers / fastrl", seconds("generate", "rollout"), rollout, False, "x"),
        ("step, fastrl PPO / fastrl GRPO", seconds("ppo", "grpo"), 1.3, True, "x"),
        ("largest log-prob gap, rollout to update", gap, 1e-5, True, ""),
    ]
    return [Target(name, x, *promise) for name, x, *promise in found if x is not None]


def show(runs: dict[str, Run], targets: Iterable[Target], options: argparse.Namespace) -> None:
    where = describe(torch.device("cpu"))
    versions = ", ".join(f"{n} {where['peers'][n]}" for n in ("trl", "transformers"))
    print(
        f"Whole steps of a Llama of {options.layers} layers, hidden {options.hidden}, "
        f"V {options.vocab}, float32: {options.prompts} prompts x {options.completions} "
        f"completions, {options.prompt_tokens} + {options.tokens} tokens"
        f"{', gradient checkpointing' if options.checkpointing else ''}\n"
        f"{where['cpu']}, {where['threads']} threads, load {where['load_1min']:.1f}, "
        f"torch {where['torch']}, {versions}, commit {where['commit']}\n"
        f"{options.rounds} turns of {options.steps} steps each, wall clock of the whole call / "
        f"steps; medians\n"
    )
    print(
        f"{'':28}{'s / step':>10}{'least':>9}{'first, s':>10}{'peak MiB':>10}"
        f"{'tokens':>8}{'reward':>9}"
    )
    for name, run in runs.items():
        peak = "?" if run.peak is None else f"{run.peak:.0f}"
        print(
            f"{CONTESTANTS[name][0]:28}{run.median:10.3f}{min(run.seconds):9.3f}{run.first:10.2f}"
            f"{peak:>10}{run.mean('completions/mean_length'):8.1f}{run.mean('reward'):9.3f}"
        )
    for name, run in runs.items():
        parts = [f"{key[5:]} {run.mean(key):.3f} s" for key in _PARTS if run.mean(key) is not None]
        if parts:
            print(f"of a step of {CONTESTANTS[name][0]}: {', '.join(parts)}")
    print(
        "\nfirst: the first call in this process, one step; tokens: mean length of a completion\n"
    )
    for target in targets:
        print(target)


def write(runs: dict[str, Run], targets: Iterable[Target], options: argparse.Namespace) -> None:
    given = {name: x for name, x in vars(options).items() if name not in ("json", "peak_of")}
    text = json.dumps(
        {
            "environment": describe(torch.device("cpu")),
            "options": given,
            "runs": {name: {**asdict(run), "median": run.median} for name, run in runs.items()},
            "targets": [asdict(target) for target in targets],
        },
        indent=1,
    )
    options.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
