"""One GRPO update of a small Llama: each prompt once for all its completions, beside padded copies.

    python -m bench.grpo_update     # 4 layers, 4 prompts x 16 completions, 256 + 64 tokens, V 8192
    python -m bench.grpo_update --device cuda --dtype bfloat16 --layers 16 --hidden 2048 \
        --key-heads 8 --vocab 128256 --prompts 1 --prompt-tokens 4096 --tokens 1024 --rows 2

Four do the same update, in turns. Three have a copy of every prompt for each of its completions,
padded, through torch's attention: with log_softmax over all logits that the model gives; over those
of the completions alone, as the better trainers do; and with `linear_token_loss`. The fourth is the
packed batch through `fastrl.hf`. All start from the same weights; their gradients are compared. One
that does not fit into a GPU's memory is listed with that reason, and the others go on.
"""

import argparse
import math
import random
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import fastrl
from bench import memory
from bench.environment import cpu_name
from bench.peers import version_of
from fastrl.layout import PackedBatch, pack_groups

Update = Callable[[], Tensor]  # the loss, its gradients being in the model's parameters
ALL_LOGITS, NEEDED_LOGITS, OUR_HEAD = PADDED = (
    "padded copies, all logits",
    "padded copies, no other logits",
    "padded copies, our head",
)
PACKED = "fastrl, packed"


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m bench.grpo_update")
    p.add_argument("--prompts", type=int, default=4)
    p.add_argument("--completions", type=int, default=16, help="of each prompt")
    p.add_argument("--prompt-tokens", type=int, default=256)
    p.add_argument("--tokens", type=int, default=64, help="of a completion")
    p.add_argument("--ragged", action="store_true", help="lengths from half of these up to them")
    p.add_argument(
        "--rows", type=int, metavar="N",
        help="padded copies at a time, their gradients added up; default: all of them",
    )  # fmt: skip
    p.add_argument("--vocab", type=int, default=8192)
    p.add_argument("--hidden", type=int, default=256)
    p.add_argument("--head-size", type=int, default=64)
    p.add_argument("--key-heads", type=int, help="default: as many as heads")
    p.add_argument("--layers", type=int, default=4)
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    p.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    return p


def main(argv: list[str] | None = None) -> None:
    options = parser().parse_args(argv)
    fastrl.hf.register()
    prompts, completions = tokens(options)
    batch = pack_groups(prompts, completions).to(options.device)
    advantages, old = (torch.randn(len(batch.target_ids), device=options.device) for _ in range(2))
    old = 0.1 * old - math.log(options.vocab)  # as of a fresh model: some ratios are clipped
    updates = {
        name: padded(name, options, prompts, completions, advantages, old) for name in PADDED
    }
    updates[PACKED] = packed(options, batch, advantages, old)
    show(measure(updates, options), options)


def tokens(options: argparse.Namespace) -> tuple[list[Tensor], list[list[Tensor]]]:
    drawn, generator = random.Random(0), torch.Generator().manual_seed(0)

    def some(most: int) -> Tensor:
        length = drawn.randint(max(1, most // 2), most) if options.ragged else most
        return torch.randint(options.vocab, (length,), generator=generator)

    prompts = [some(options.prompt_tokens) for _ in range(options.prompts)]
    return prompts, [[some(options.tokens) for _ in range(options.completions)] for _ in prompts]


def language_model(options: argparse.Namespace, attention: str) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    heads = max(1, options.hidden // options.head_size)
    config = LlamaConfig(
        vocab_size=options.vocab, hidden_size=options.hidden, num_attention_heads=heads,
        num_key_value_heads=options.key_heads or heads, num_hidden_layers=options.layers,
        intermediate_size=4 * options.hidden, attn_implementation=attention, pad_token_id=0,
        max_position_embeddings=options.prompt_tokens + options.tokens, use_cache=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(options.device, getattr(torch, options.dtype))
    return model.train()


def learn_by_our_head(
    hidden: Tensor, weight: Tensor, ids: Tensor, old: Tensor, advantages: Tensor, count: int
) -> Tensor:
    """count: of the whole batch's targets, by which the loss is divided."""

    def per_token(logprobs: Tensor, entropy: Tensor, rows: Tensor) -> Tensor:
        losses = fastrl.ppo_loss(logprobs, old[rows], advantages[rows], reduction="none")
        return losses / count

    loss, _, _ = fastrl.linear_token_loss(hidden, weight, ids, per_token)
    loss.backward()
    return loss.detach()


def packed(
    options: argparse.Namespace, batch: PackedBatch, advantages: Tensor, old: Tensor
) -> tuple[Any, Update]:
    model = language_model(options, "fastrl")

    def update() -> Tensor:
        hidden = model.model(
            batch.token_ids[None], position_ids=batch.layout.position_ids[None], layout=batch.layout
        ).last_hidden_state[0]
        rows, weight = hidden[batch.predict_index], model.lm_head.weight
        return learn_by_our_head(rows, weight, batch.target_ids, old, advantages, len(old))

    return model, update


def padded(
    name: str,
    options: argparse.Namespace,
    prompts: list[Tensor],
    completions: list[list[Tensor]],
    advantages: Tensor,
    old: Tensor,
) -> tuple[Any, Update]:
    """Prompts padded on the left and completions on the right, as trainers do; where no row needs
    padding there is no mask, and torch's attention may take its quickest way."""
    model = language_model(options, "sdpa")
    before, after = max(map(len, prompts)), max(len(c) for group in completions for c in group)
    rows = [(p, c) for p, group in zip(prompts, completions, strict=True) for c in group]
    ids = torch.zeros(len(rows), before + after, dtype=torch.int64)
    exists = torch.zeros_like(ids)
    for row, (prompt, completion) in enumerate(rows):
        at = slice(before - len(prompt), before + len(completion))
        ids[row, at], exists[row, at] = torch.cat([prompt, completion]), 1
    ids, exists = ids.to(options.device), exists.to(options.device)
    every: dict[str, Tensor] = {} if bool(exists.all()) else {"attention_mask": exists}
    if every:
        every["position_ids"] = (exists.cumsum(1) - 1).clamp(min=0)
    step = options.rows or len(ids)
    parts = [slice(i, i + step) for i in range(0, len(ids), step)]
    ends = [0, *exists[:, before:].sum(1).cumsum(0).tolist()]  # of each row's targets

    def learn(part: slice) -> Tensor:
        at = slice(ends[part.start], ends[min(part.stop, len(ids))])
        known = old[at], advantages[at]
        given = {key: x[part] for key, x in every.items()}
        targets, is_target = ids[part, before:], exists[part, before:].bool()
        if name == OUR_HEAD:
            hidden = model.model(ids[part], **given).last_hidden_state[:, before - 1 : -1]
            weight, chosen = model.lm_head.weight, targets[is_target]
            return learn_by_our_head(hidden[is_target], weight, chosen, *known, len(old))
        kept = after + 1 if name == NEEDED_LOGITS else 0  # 0: all
        logits = model(ids[part], logits_to_keep=kept, **given).logits[:, -after - 1 : -1]
        each = logits.float().log_softmax(-1)
        logprobs = each.gather(-1, targets[..., None])[..., 0][is_target]
        loss = fastrl.ppo_loss(logprobs, *known, normalizer=len(old))
        loss.backward()
        return loss.detach()

    return model, lambda: torch.stack([learn(part) for part in parts]).sum()


def measure(updates: dict[str, tuple[Any, Update]], options: argparse.Namespace) -> dict[str, Any]:
    """Of each: seconds of its rounds, peak MiB, its loss and its gradients from the first call; or
    why it is missing, and then it is out of `updates`, which holds its weights."""
    device = torch.device(options.device)
    found: dict[str, Any] = {}

    def attempt(name: str, part: Callable[..., None]) -> None:
        try:
            part(*updates[name])
        except torch.OutOfMemoryError as error:
            found[name] = {"missing": str(error).split(". ")[0]}
        if name in updates:
            updates[name][0].zero_grad()
        if "missing" in found[name]:  # and the frames that held what did not fit are gone
            del updates[name]
            memory.release(device)

    for name in list(updates):

        def first(model: Any, update: Update, name: str = name) -> None:
            loss = float(update())
            grads = [p.grad.cpu().clone() for p in model.parameters()]
            model.zero_grad()
            peak = memory.peak_extra_mib(update, device) if memory.can_measure(device) else None
            found[name] = {"seconds": [], "loss": loss, "grads": grads, "peak": peak}

        attempt(name, first)
    for _ in range(options.rounds):
        for name in list(updates):

            def once(model: Any, update: Update, name: str = name) -> None:
                start = now(options.device)
                update()
                found[name]["seconds"].append(now(options.device) - start)

            attempt(name, once)
    return found


def now(device: str) -> float:
    if device != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter()


def difference(grads: list[Tensor], others: list[Tensor]) -> float:
    """The largest over the parameters of |a - b| over the largest |b|."""
    pairs = zip(grads, others, strict=True)
    return max(float((a - b).abs().max() / b.abs().max().clamp(min=1e-30)) for a, b in pairs)


def show(found: dict[str, Any], options: argparse.Namespace) -> None:
    where = cpu_name() if options.device == "cpu" else torch.cuda.get_device_name()
    lengths = "up to " if options.ragged else ""
    print(
        f"GRPO update of a Llama of {options.layers} layers, hidden {options.hidden}, "
        f"V {options.vocab}, {options.dtype}: {options.prompts} prompts x {options.completions} "
        f"completions, {lengths}{options.prompt_tokens} + {options.tokens} tokens\n"
        f"{where}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"transformers {version_of('transformers')}; median of {options.rounds} rounds, in turns\n"
    )
    print(f"{'':32}{'s':>9}{'/ packed':>10}{'peak MiB':>10}{'/ packed':>10}{'loss':>12}{'grad':>9}")
    ours = found[PACKED]
    for name, run in found.items():
        if "missing" in run:
            print(f"{name:32}  {run['missing']}")
            continue
        seconds, peak = statistics.median(run["seconds"]), run["peak"]
        if "missing" in ours:
            print(f"{name:32}{seconds:9.3f}")
            continue
        mine = statistics.median(ours["seconds"])
        memories = f"{'?':>10}{'?':>10}"
        if peak is not None:
            memories = f"{peak:10.0f}{peak / max(ours['peak'], 1e-9):9.2f}x"
        print(
            f"{name:32}{seconds:9.3f}{seconds / mine:9.2f}x{memories}{run['loss']:12.7f}"
            f"{difference(run['grads'], ours['grads']):9.1e}"
        )
    print("\ngrad: largest difference of a parameter's gradient from the packed one, relative")


if __name__ == "__main__":
    main()
