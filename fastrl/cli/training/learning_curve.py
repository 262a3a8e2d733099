"""The run in one picture."""

import io
import math
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from fastrl.cli.intervals import mean_interval
from fastrl.cli.training.stages import ACTOR_CRITIC, POLICY_GRADIENT, TITLES, WARM_UP

COLORS = {WARM_UP: "0.35", POLICY_GRADIENT: "tab:blue", ACTOR_CRITIC: "tab:orange"}
SHIFT = {WARM_UP: 1.0, POLICY_GRADIENT: 0.99, ACTOR_CRITIC: 1.01}  # apart, to see both marks
WINDOW = 10  # steps in a running mean


def learning_curve(records: list[dict[str, Any]], results: dict[str, Any]) -> bytes:
    """A PNG: the loss of the warm-up, then reward, entropy and KL of both trainers by step.

    Args:
        records: of metrics.jsonl.
        results: of results.json; finished stages get a mark for their held-out reward.
    """
    figure = Figure(figsize=(11, 7), layout="constrained")
    FigureCanvasAgg(figure)
    loss, reward, entropy, kl = figure.subplots(2, 2).flat
    of_stage = {name: [r for r in records if r["stage"] == name] for name in COLORS}
    steps, losses = _series(of_stage[WARM_UP], "loss")
    loss.plot(steps, losses, color=COLORS[WARM_UP], alpha=0.3, linewidth=0.8)
    loss.plot(steps, _running_mean(losses), color=COLORS[WARM_UP], label="training, noisy input")
    _plot_validation(loss, of_stage[WARM_UP])
    loss.set(title="Warm-up", ylabel="−log P(token) (nats)", xlabel="step")
    loss.legend(frameon=False)

    for axes, key, title, unit in (
        (reward, "reward", "Reward", "score of a completion (true text: 1)"),
        (entropy, "entropy", "Entropy of the policy", "nats per token"),
        (kl, "kl", "KL from the warmed-up model", "nats per token"),
    ):
        for stage in (POLICY_GRADIENT, ACTOR_CRITIC):
            steps, values = _series(of_stage[stage], key)
            axes.plot(steps, values, color=COLORS[stage], alpha=0.25, linewidth=0.8)
            axes.plot(steps, _running_mean(values), color=COLORS[stage], label=TITLES[stage])
        axes.set(title=title, ylabel=unit, xlabel="step")
    _plot_held_out(reward, of_stage, results)
    reward.legend(frameon=False, fontsize="small")
    for axes in figure.axes:
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()


def _plot_validation(axes: Any, records: list[dict[str, Any]]) -> None:
    steps, perplexities = _series(records, "validation_perplexity")
    losses = [math.log(value) for value in perplexities]
    axes.plot(steps, losses, "o-", color="tab:green", markersize=3, label="validation")


def _plot_held_out(axes: Any, of_stage: dict[str, Any], results: dict[str, Any]) -> None:
    """Held-out rewards with their 95 % intervals, at the steps where they were taken."""
    for stage in COLORS:
        if stage in results:
            mean, half = mean_interval(results[stage]["prompt_rewards"])
            last = 0 if stage == WARM_UP else of_stage[stage][-1]["step"]
            step = last * SHIFT[stage]
            label = "held-out text, 95 %" if stage == WARM_UP else None
            axes.errorbar(
                [step], [mean], [half], fmt="s", color=COLORS[stage], capsize=4, label=label
            )


def _series(records: list[dict[str, Any]], key: str) -> tuple[list[int], list[float]]:
    pairs = [(r["step"], r[key]) for r in records if r.get(key) is not None]
    return [step for step, _ in pairs], [value for _, value in pairs]


def _running_mean(values: list[float]) -> list[float]:
    """The mean of each value and up to WINDOW - 1 before it."""
    means = []
    for end in range(1, len(values) + 1):
        window = values[max(0, end - WINDOW) : end]
        means.append(sum(window) / len(window))
    return means
