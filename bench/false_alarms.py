"""How often the over-optimisation monitor is wrong, and how soon it is right.

    python -m bench.false_alarms                    # on made-up rewards: 1000 streams of each kind
    python -m bench.false_alarms --runs 100         # and on whole training runs of a small model

A false alarm is a run with one alarm or more in which gold never falls while the proxy rises; the
monitor promises that at most a share alpha of such runs has one. Kinds and runs are those of the
tests (tests/reward_streams.py, tests/gamed_runs.py). Behind each share stands its exact binomial
interval (Clopper and Pearson, 95 %).
"""

import argparse
import importlib.util
import math
import statistics
import warnings
from pathlib import Path
from types import ModuleType

import torch

from fastrl.trainers.over_optimization import PartingTest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--streams", type=int, default=1000, help="of each kind")
    parser.add_argument("--runs", type=int, default=0, help="training runs of each kind")
    parser.add_argument("--prompts", type=int, default=32, help="held out, in the streams")
    parser.add_argument("--evaluations", type=int, default=20, help="planned, in the streams")
    parser.add_argument("--alpha", type=float, default=0.05)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"alpha = {options.alpha:g}")
    _streams(options)
    if options.runs:
        _runs(options)


def _streams(options: argparse.Namespace) -> None:
    made_up = _of_the_tests("reward_streams")
    print(f"\n{options.prompts} prompts, {options.evaluations} evaluations")
    sizes = {"prompts": options.prompts, "evaluations": options.evaluations}
    total = 0
    for kind in (*made_up.HONEST, *made_up.GAMED):
        firsts = []
        for seed in range(options.streams):
            test = PartingTest(options.alpha, options.evaluations)
            firsts.append(next(iter(made_up.alarms(test, kind, seed, **sizes)), None))
        caught = [first for first in firsts if first is not None]
        total += len(caught) if kind in made_up.HONEST else 0
        _report("honest" if kind in made_up.HONEST else "gamed", kind, caught, options.streams)
    print(f"all honest: {_share(total, options.streams * len(made_up.HONEST))}")


def _runs(options: argparse.Namespace) -> None:
    small = _of_the_tests("gamed_runs")
    kinds = {
        "honest": {
            "gold = proxy + noise": small.share_and_noise,
            "gold = proxy up to a half + noise": small.half_of_it_and_noise,
        },
        "gamed": {"gold falls above a half": small.up_to_a_half},
    }
    print("\nwhole runs: 32 held-out prompts, 20 evaluations in 60 steps; when: at which step")
    for which, golds in kinds.items():
        for name, gold in golds.items():
            caught = []
            for seed in range(options.runs):
                monitor = {"action": "stop", "alpha": options.alpha}
                trainer, watching = small.make_run(gold, seed=seed, monitor=monitor)
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    trainer.train()
                if watching.evaluations[-1]["gold/alarm"]:
                    caught.append(trainer.step)
            _report(which, name, caught, options.runs)


def _report(which: str, name: str, caught: list[int], count: int) -> None:
    when = f"  when: median {statistics.median(caught):g}" if which == "gamed" and caught else ""
    print(f"{which:7} {name:45} {_share(len(caught), count)}{when}", flush=True)


def _share(hits: int, count: int) -> str:
    low, high = interval(hits, count)
    return f"{hits:5} of {count} = {hits / count:7.2%}  [{low:.2%}, {high:.2%}]"


def interval(hits: int, count: int, confidence: float = 0.95) -> tuple[float, float]:
    """The rates with which so few, and so many, are not too unlikely (Clopper and Pearson)."""
    tail = (1 - confidence) / 2
    low = 0.0 if hits == 0 else _rate(lambda rate: 1 - _at_most(hits - 1, count, rate) < tail)
    high = 1.0 if hits == count else _rate(lambda rate: _at_most(hits, count, rate) >= tail)
    return low, high


def _rate(is_below) -> float:
    """Where a condition that holds for small rates ends, by bisection."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if is_below(middle) else (low, middle)
    return low


def _at_most(hits: int, count: int, rate: float) -> float:
    """P(Binomial(count, rate) <= hits)."""
    logs = (
        math.lgamma(count + 1) - math.lgamma(k + 1) - math.lgamma(count - k + 1)
        + k * math.log(rate) + (count - k) * math.log1p(-rate)
        for k in range(hits + 1)
    )  # fmt: skip
    return math.fsum(map(math.exp, logs))


def _of_the_tests(name: str) -> ModuleType:
    path = Path(__file__).parents[1] / "tests" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"fastrl_tests_{name}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    main()
