"""`fastrl sample MODEL`: completions, with their log-probabilities."""

import argparse
import json
import math
import sys
from typing import Any

MODEL_HELP = "a run's folder, a checkpoint's, or a name or folder for AutoModelForCausalLM"
COLUMN_HELP = 'of {}, that is the prompt; default: that of the run, or else "prompt"'
_SAMPLE = 3  # a stream of random numbers apart from those of training and evaluation


def main(argv: list[str]) -> int:
    """Exit status: 0; 2 for bad input."""
    from fastrl.cli.recipes.command import explains, fail
    from fastrl.cli.recipes.toml import RecipeError

    try:
        return _sample(parser().parse_args(argv))
    except SystemExit as error:  # of argparse
        return error.code if isinstance(error.code, int) else 2
    except (RecipeError, ValueError, TypeError) as error:
        if not explains(error):
            raise
        return fail(str(error).replace("train: ", "sample: ", 1))


def parser() -> argparse.ArgumentParser:
    from fastrl.cli.recipes.sampled_as import add_sampling

    result = argparse.ArgumentParser(
        prog="fastrl sample",
        description="Sample completions of prompts: of a run's model as the run has sampled them.",
        allow_abbrev=False,
    )
    result.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    result.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="repeatable")
    result.add_argument("--file", metavar="FILE", help="of prompts: .txt, .jsonl or .json")
    result.add_argument("--column", help=COLUMN_HELP.format("the file"))
    result.add_argument("--limit", type=int, help="the file's first so many prompts alone")
    result.add_argument("--chat", action="store_true", help="prompts are a user's messages")
    result.add_argument("-n", type=int, default=1, metavar="N", help="completions of each prompt")
    add_sampling(result)
    result.add_argument("--top-k", type=int, help="from the k likeliest tokens")
    result.add_argument("--top-p", type=float, help="from the likeliest tokens of this share")
    result.add_argument("--json", action="store_true", help="a JSON object a line, on stdout")
    return result


def _sample(options: argparse.Namespace) -> int:
    import torch

    from fastrl.cli.recipes.loading import open_model
    from fastrl.cli.recipes.models import end_ids
    from fastrl.cli.recipes.sampled_as import DEFAULTS, said, trained_with
    from fastrl.rollout import completion_seeds, generate
    from fastrl.trainers.prompts import PromptDataset, decode_all
    from fastrl.trainers.tokens import autocast

    entries = _prompts(options)
    policy, tokenizer = open_model(
        options.model, tokenizer=options.tokenizer, dtype=options.dtype, device=options.device
    )
    of_training = trained_with(options.model)
    how = {name: of_training.get(name, value) for name, value in DEFAULTS.items()} | said(options)
    dataset = PromptDataset(
        entries, policy.vocab_size, tokenizer, chat_template_kwargs=how["chat_template_kwargs"]
    )
    device = policy.head.weight.device
    ends = end_ids(policy, tokenizer, how["eos_token_id"])
    examples = [dataset[index] for index in range(len(dataset))]
    with autocast(device, how["precision"]):
        rollout = generate(
            policy,
            [example.token_ids.to(device) for example in examples],
            completions_per_prompt=options.n,
            max_new_tokens=how["max_new_tokens"],
            seeds=completion_seeds(options.seed, _SAMPLE, torch.arange(len(examples)), options.n),
            temperature=how["temperature"],
            top_k=options.top_k,
            top_p=options.top_p,
            eos_token_id=ends or None,
            stop_strings=how["stop_strings"],
            decode=decode_all(tokenizer),
            max_rows=64,
        )
    logprobs = rollout.logprobs.cpu().split(rollout.lengths.tolist())
    completions = [ids.tolist() for ids in rollout.completion_ids]
    groups, ended = rollout.group_ids.tolist(), rollout.ended.tolist()
    found = [
        {
            "prompt": examples[group].prompt,
            "completion": dataset.decode(ids, ends),
            "logprob": math.fsum(row.tolist()) / max(1, row.numel()),
            "ended": end,
            "token_ids": ids,
            "logprobs": row.tolist(),
        }
        for group, ids, end, row in zip(groups, completions, ended, logprobs, strict=True)
    ]
    _show(found, options, how)
    return 0


def _prompts(options: argparse.Namespace) -> list[dict[str, Any]]:
    from fastrl.cli.recipes.prompts import load_prompts
    from fastrl.cli.recipes.sampled_as import column_of
    from fastrl.cli.recipes.toml import RecipeError

    for name in ("n", "max_new_tokens"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            option = "-n" if name == "n" else "--max-new-tokens"
            raise RecipeError(f"sample: expected {option} >= 1, got {getattr(options, name)}.")
    for name in ("column", "limit"):
        if getattr(options, name) is not None and options.file is None:
            raise RecipeError(f"sample: expected --file with --{name}, got none. Name the file.")
    check_limit(options, "sample")
    entries = [{"prompt": text} for text in options.prompt]
    if options.file is not None:
        column = options.column or column_of(options.model)
        entries += load_prompts(options.file, key="--file", column=column, limit=options.limit)
    if not entries:
        raise RecipeError("sample: expected --prompt TEXT or --file FILE, got neither. Pass one.")
    if options.chat:
        for entry in entries:
            if not isinstance(entry["prompt"], str):
                raise RecipeError(
                    f"sample: expected texts with --chat, got {entry['prompt']!r}. Leave --chat "
                    "out for messages."
                )
        entries = [{"prompt": [{"role": "user", "content": e["prompt"]}]} for e in entries]
    return entries


def check_limit(options: argparse.Namespace, command: str) -> None:
    """Raise a RecipeError for a --limit below 1: of a list, -1 would be all but the last."""
    from fastrl.cli.recipes.toml import RecipeError

    if options.limit is not None and options.limit < 1:
        raise RecipeError(
            f"{command}: expected --limit >= 1, got {options.limit}. Leave it out for all of them."
        )


def _show(found: list[dict[str, Any]], options: argparse.Namespace, how: dict[str, Any]) -> None:
    if options.json:
        is_utf8 = (sys.stdout.encoding or "utf-8").lower() in ("utf-8", "utf8")
        for entry in found:
            print(json.dumps(entry, ensure_ascii=not is_utf8))
        return
    from rich.console import Console
    from rich.markup import escape

    from fastrl.cli.console import say
    from fastrl.trainers.prompts import is_chat

    console = Console(highlight=False, file=sys.stdout)
    for index, entry in enumerate(found):
        if index % options.n == 0:
            prompt = entry["prompt"]
            text = str(prompt[-1].get("content", "")) if is_chat(prompt) else str(prompt)
            console.print(f"\n[bold]{escape(text)}[/bold]", soft_wrap=True)
        tokens, end = len(entry["token_ids"]), "ended" if entry["ended"] else "cut"
        console.print(
            f"[dim]{index % options.n + 1}. log-prob {entry['logprob']:.3f} a token, "
            f"{tokens} tokens, {end}[/dim]",
            soft_wrap=True,
        )
        say(console, entry["completion"])
    temperature, stops = how["temperature"], ", ".join(map(repr, how["stop_strings"]))
    scale = (
        "of greedy sampling at temperature 1"
        if temperature == 0
        else f"at temperature {temperature:g}"
    )
    until = f", or up to {escape(stops)}" if stops else ""
    console.print(
        f"\n[dim]Log-probabilities {scale}, in nats. At most {how['max_new_tokens']} tokens{until}."
        "[/dim]",
        soft_wrap=True,
    )
