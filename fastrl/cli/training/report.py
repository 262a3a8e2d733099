"""What a run shows at its end: a table, samples, and the time of a step."""

from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fastrl.cli.console import say
from fastrl.cli.intervals import INTERVAL_NOTE, gain_interval, mean_interval
from fastrl.cli.training.held_out import distinct_n
from fastrl.cli.training.stages import (
    ACTOR_CRITIC,
    POLICY_GRADIENT,
    STEP_TIMING,
    TITLES,
    WARM_UP,
)
from fastrl.cli.training.text_data import TextData

TRAINED = (POLICY_GRADIENT, ACTOR_CRITIC)


def show_report(console: Console, results: dict[str, Any], data: TextData) -> None:
    """Print everything that results.json says."""
    console.print(_table(results, data))
    say(
        console,
        f"{len(data.held_out_prompts)} held-out prompts, the same for all, sampled with the same "
        f"random numbers.\n{INTERVAL_NOTE}\n"
        "The reward of the true continuation is 1. Entropy and KL are per token, of the policy at "
        "its temperature; distinct-n is over words.",
    )
    _show_samples(console, results, data)
    timing = results[STEP_TIMING]
    say(
        console,
        f"\nA policy-gradient step takes {1e3 * timing['time/ops']:.0f} ms with fastrl.ops and "
        f"{1e3 * timing['time/reference']:.0f} ms with fastrl.reference (medians, taking turns); "
        f"their gradients differ by at most {timing['gradient/absolute']:.1e}, "
        f"{timing['gradient/relative']:.1e} of the largest entry.",
    )


def _table(results: dict[str, Any], data: TextData) -> Table:
    table = Table(title="Held-out text", title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("after", no_wrap=True)
    for stage in (WARM_UP, *TRAINED):
        table.add_column(TITLES[stage], justify="right", no_wrap=True)
    table.add_column("truth", justify="right")
    stages = [results[stage] for stage in (WARM_UP, *TRAINED)]
    before = results[WARM_UP]["prompt_rewards"]
    truth = [prompt["reference"] for prompt in data.held_out_prompts]

    def row(name: str, cells: list[str], true: str = "") -> None:
        table.add_row(name, *cells, true)

    def interval(mean: float, half: float, sign: str = "") -> str:
        return f"{mean:{sign}.3f} ± {half:.3f}"

    rewards = [interval(*mean_interval(stage["prompt_rewards"])) for stage in stages]
    row("reward", rewards, "1")
    gains = [interval(*gain_interval(before, s["prompt_rewards"]), "+") for s in stages[1:]]
    row("gain", ["", *gains])
    row("F1 in it", [f"{stage['overlap']:.3f}" for stage in stages], "1")
    row("perplexity", [f"{stage['perplexity']:.1f}" for stage in stages])
    row("entropy, nats", [f"{stage['entropy']:.2f}" for stage in stages])
    for n in (1, 2):
        row(
            f"distinct-{n}",
            [f"{stage[f'distinct_{n}']:.3f}" for stage in stages],
            f"{distinct_n(truth, n):.3f}",
        )
    row("KL from warm-up", [f"{stage['kl']:.3f}" for stage in stages])
    row("tokens/s", [f"{stage['tokens_per_second']:,.0f}" for stage in stages])
    return table


def _show_samples(console: Console, results: dict[str, Any], data: TextData) -> None:
    count = len(data.held_out_prompts)
    for index in (count // 3, 2 * count // 3):  # fixed places, not picked by how they look
        example = data.held_out_prompts[index]
        prompt = data.tokenizer.decode(example["prompt"].tolist())
        console.print(f"\n[bold]prompt[/bold]  …{escape(_line(prompt))}", soft_wrap=True)
        console.print(f"  {'true':<22} {escape(_line(example['reference']))}", soft_wrap=True)
        for stage in (WARM_UP, *TRAINED):
            name = "before" if stage == WARM_UP else f"after {TITLES[stage]}"
            sample = escape(_line(results[stage]["samples"][index]))
            console.print(f"  {name:<22} {sample}", soft_wrap=True)


def _line(text: str) -> str:
    return " ".join(text.split())
