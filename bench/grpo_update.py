"""One GRPO update of a small Llama: each prompt once for all its completions, beside padded copies.

    python -m bench.grpo_update     # 4 layers, 4 prompts x 16 completions, 256 + 64 tokens, V 8192
    python -m bench.grpo_update --one-billion --device cuda --dtype bfloat16

Four do the same update, in turns. Three have a copy of every prompt for each of its completions,
padded, through torch's attention: with log_softmax over all logits that the model gives; over those
of the completions alone, as the better trainers do; and with `linear_token_loss`. The fourth is the
packed batch through `fastrl.hf`. All have the same weights; their gradients are compared.
"""

import argparse
import functools
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fastrl
from bench import memory, update_table
from bench.environment import cpu_name, process_age
from bench.llama_updates import PADDED, language_model, packed, padded, padded_rows, tokens
from bench.peers import version_of
from bench.update_table import PACKED
from fastrl.layout import pack_groups

Update = Callable[[], Tensor]  # the loss, its gradients being in the model's parameters
# 1.14e9 weights. Copies of 4 rows have as many tokens at once as the packed batch has in all.
ONE_BILLION: dict[str, Any] = {
    "layers": 16, "hidden": 2048, "head_size": 128, "key_heads": 8, "vocab": 32000, "prompts": 1,
    "completions": 16, "prompt_tokens": 4096, "tokens": 1024, "copies": 4,
}  # fmt: skip


@dataclass
class Run:
    """What one way took: peak MiB, and the largest difference of a parameter's gradient from the
    packed one's, relative. reason: why it has no figures."""

    seconds: list[float] = field(default_factory=list)
    peak_mib: float | None = None
    loss: float | None = None
    grad_difference: float | None = None
    reason: str = ""


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m bench.grpo_update")
    p.add_argument("--prompts", type=int, default=4)
    p.add_argument("--completions", type=int, default=16, help="of each prompt")
    p.add_argument("--prompt-tokens", type=int, default=256)
    p.add_argument("--tokens", type=int, default=64, help="of a completion")
    p.add_argument("--ragged", action="store_true", help="lengths from half of these up to them")
    p.add_argument("--copies", type=int, help="padded rows at once (default: all)")
    p.add_argument("--vocab", type=int, default=8192)
    p.add_argument("--hidden", type=int, default=256)
    p.add_argument("--head-size", type=int, default=64)
    p.add_argument("--key-heads", type=int, help="default: as many as heads")
    p.add_argument("--layers", type=int, default=4)
    p.add_argument("--one-billion", action="store_true", help="other defaults: 1.14e9 weights")
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--seconds", type=float, default=math.inf, help="begin no round after these")
    p.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    p.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    p.add_argument("--json", type=Path, help="the figures, as far as they are known, after each")
    return p


def main(argv: list[str] | None = None) -> None:
    start = time.monotonic() - process_age()
    p = parser()
    if p.parse_args(argv).one_billion:
        p.set_defaults(**ONE_BILLION)
    options = p.parse_args(argv)
    fastrl.hf.register()
    prompts, completions = tokens(options)
    batch = pack_groups(prompts, completions).to(options.device)
    advantages, old = (torch.randn(len(batch.target_ids), device=options.device) for _ in range(2))
    old = 0.1 * old - math.log(options.vocab)  # as of a fresh model: some ratios are clipped
    ours, copies = (language_model(options, name) for name in ("fastrl", "sdpa"))
    rows = padded_rows(options, prompts, completions, advantages, old)
    updates = {PACKED: (ours, functools.partial(packed, ours, batch, advantages, old))}
    updates |= {way: (copies, functools.partial(padded, copies, way, rows)) for way in PADDED}
    record: dict[str, Any] = {}
    for runs in measure(updates, options, start + options.seconds):
        record = describe(options) | {"runs": {name: asdict(run) for name, run in runs.items()}}
        if options.json:
            half = options.json.with_suffix(".new")  # whoever kills this process finds a whole file
            half.write_text(json.dumps(record))
            half.replace(options.json)
    print("\n".join(update_table.lines(record)))


def measure(
    updates: dict[str, tuple[Any, Update]], options: argparse.Namespace, deadline: float
) -> Iterator[dict[str, Run]]:
    """What is known, after each call: the first of each, the packed one before the others, then
    rounds. A way that the memory has no room for is not asked again."""
    device = torch.device(options.device)
    runs = {name: Run() for name in updates}
    expected: list[Tensor] = []
    for turn in range(1 + options.rounds):
        began = time.monotonic()
        for name, (model, update) in updates.items():
            run = runs[name]
            if run.reason:
                continue
            try:
                if turn:
                    run.seconds.append(_seconds(update, device))
                else:
                    grads = _first(run, model, update, device)
                    expected = grads if name == PACKED else expected
                    if expected:  # else the packed one had no room, and there is nothing to compare
                        run.grad_difference = difference(grads, expected)
                    del grads
            except torch.OutOfMemoryError:
                run.reason = "out of memory"
            model.zero_grad()
            if turn == 0 or run.reason:
                memory.release(device)
            yield runs
        if turn and 2 * time.monotonic() - began > deadline:  # as long as the last one took
            return


def _first(run: Run, model: Any, update: Update, device: torch.device) -> list[Tensor]:
    """The gradients; loss and peak memory are entered. Off a GPU the memory is a second call's:
    what the first one loads is part of the process, and not of the update."""
    losses: list[Tensor] = []

    def call() -> None:
        losses.append(update())

    if device.type == "cuda":
        run.peak_mib = memory.peak_extra_mib(call, device)
    else:
        call()
    run.loss = float(losses[0])
    grads = [p.grad for p in model.parameters()]
    if device.type != "cuda" and memory.can_measure(device):
        model.zero_grad()
        run.peak_mib = memory.peak_extra_mib(update, device)
    return grads


def _seconds(update: Update, device: torch.device) -> float:
    start = now(device)
    update()
    return now(device) - start


def now(device: torch.device) -> float:
    if device.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter()


def difference(grads: list[Tensor], others: list[Tensor]) -> float:
    """The largest over the parameters of |a - b| over the largest |b|."""
    pairs = zip(grads, others, strict=True)
    return max(float((a - b).abs().max() / b.abs().max().clamp(min=1e-30)) for a, b in pairs)


def describe(options: argparse.Namespace) -> dict[str, Any]:
    is_cpu = options.device == "cpu"
    given = {k: v for k, v in vars(options).items() if k not in ("json", "seconds")}
    return {
        "options": given, "where": cpu_name() if is_cpu else torch.cuda.get_device_name(),
        "threads": torch.get_num_threads(), "torch": torch.__version__,
        "transformers": version_of("transformers"),
    }  # fmt: skip


if __name__ == "__main__":
    main()
