"""The ways to do one GRPO update of a Llama that `bench.grpo_update` measures."""

import argparse
import random
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import fastrl
from fastrl.layout import PackedBatch

ALL_LOGITS, NEEDED_LOGITS, OUR_HEAD = PADDED = (
    "padded copies, all logits",
    "padded copies, no other logits",
    "padded copies, our head",
)


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
    with torch.device(options.device):  # a billion weights take a processor a minute to draw
        model = LlamaForCausalLM(config).to(getattr(torch, options.dtype))
    return model.train()


def learn_by_our_head(
    hidden: Tensor, weight: Tensor, ids: Tensor, old: Tensor, advantages: Tensor, total: int
) -> Tensor:
    def per_token(logprobs: Tensor, entropy: Tensor, rows: Tensor) -> Tensor:
        losses = fastrl.ppo_loss(logprobs, old[rows], advantages[rows], reduction="none")
        return losses / total

    loss, _, _ = fastrl.linear_token_loss(hidden, weight, ids, per_token)
    loss.backward()
    return loss.detach()


def packed(model: Any, batch: PackedBatch, advantages: Tensor, old: Tensor) -> Tensor:
    hidden = model.model(
        batch.token_ids[None], position_ids=batch.layout.position_ids[None], layout=batch.layout
    ).last_hidden_state[0]
    ids, weight = batch.target_ids, model.lm_head.weight
    rows = hidden[batch.predict_index]
    return learn_by_our_head(rows, weight, ids, old, advantages, len(ids))


@dataclass
class Rows:
    """Some of the padded rows: prompts end, and completions begin, at `before`. Where no row needs
    padding `given` has no mask, and torch's attention may take its quickest way."""

    ids: Tensor
    before: int
    is_target: Tensor
    advantages: Tensor
    old: Tensor
    given: dict[str, Tensor]
    total: int  # tokens of all completions of the update


def padded_rows(
    options: argparse.Namespace,
    prompts: list[Tensor],
    completions: list[list[Tensor]],
    advantages: Tensor,
    old: Tensor,
) -> list[Rows]:
    """Prompts padded on the left and completions on the right, as trainers do."""
    before, after = max(map(len, prompts)), max(len(c) for group in completions for c in group)
    rows = [(p, c) for p, group in zip(prompts, completions, strict=True) for c in group]
    ids = torch.zeros(len(rows), before + after, dtype=torch.int64)
    exists = torch.zeros_like(ids)
    for row, (prompt, completion) in enumerate(rows):
        at = slice(before - len(prompt), before + len(completion))
        ids[row, at], exists[row, at] = torch.cat([prompt, completion]), 1
    found, copies, begin = [], options.copies or len(rows), 0
    needs_mask = not bool(exists.all())
    for some in (slice(i, i + copies) for i in range(0, len(rows), copies)):
        own, there = ids[some].to(options.device), exists[some].to(options.device)
        end = begin + sum(len(completion) for _, completion in rows[some])
        given = {"attention_mask": there, "position_ids": (there.cumsum(1) - 1).clamp(min=0)}
        is_target, given = there[:, before:].bool(), given if needs_mask else {}
        per_token = advantages[begin:end], old[begin:end]
        found.append(Rows(own, before, is_target, *per_token, given, len(old)))
        begin = end
    return found


def padded(model: Any, way: str, batches: list[Rows]) -> Tensor:
    losses = [
        _by_our_head(model, rows) if way == OUR_HEAD else _by_logits(model, rows, way)
        for rows in batches
    ]
    return torch.stack(losses).sum()


def _by_our_head(model: Any, rows: Rows) -> Tensor:
    every = model.model(rows.ids, **rows.given).last_hidden_state
    hidden = every[:, rows.before - 1 : -1][rows.is_target]
    ids, weight = rows.ids[:, rows.before :][rows.is_target], model.lm_head.weight
    return learn_by_our_head(hidden, weight, ids, rows.old, rows.advantages, rows.total)


def _by_logits(model: Any, rows: Rows, way: str) -> Tensor:
    targets = rows.ids[:, rows.before :]
    kept = targets.shape[1] + 1 if way == NEEDED_LOGITS else 0  # 0: all
    logits = model(rows.ids, logits_to_keep=kept, **rows.given).logits
    every = logits[:, -targets.shape[1] - 1 : -1].float().log_softmax(-1)
    logprobs = every.gather(-1, targets[..., None])[..., 0][rows.is_target]
    losses = fastrl.ppo_loss(logprobs, rows.old, rows.advantages, reduction="none")
    loss = losses.sum() / rows.total
    loss.backward()
    return loss.detach()
