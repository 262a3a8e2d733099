"""Scoring a model on prompts, without learning and without touching the run."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastrl.rollout import Rollout, completion_seeds, generate
from fastrl.trainers.prompts import Example, PromptDataset
from fastrl.trainers.tokens import ScoredTokens, rollout_metrics, score_tokens, to_numbers

if TYPE_CHECKING:
    from fastrl.trainers.trainer import Trainer

_EVALUATION = 2  # a stream of random numbers apart from those of training


@torch.no_grad()
def evaluate(
    trainer: "Trainer",
    dataset: Any,
    *,
    completions_per_prompt: int,
    temperature: float,
    seed: int,
) -> dict[str, Any]:
    """See `Trainer.evaluate`."""
    config = trainer.config
    prompts = PromptDataset(dataset, trainer.policy.vocab_size, trainer.tokenizer)
    examples = [prompts[index] for index in range(len(prompts))]
    rows = config.prompts_per_step * config.completions_per_prompt  # as many as in training
    batch = max(1, rows // completions_per_prompt)
    sampled = [
        _sample(trainer, examples, keys, completions_per_prompt, temperature, seed)
        for keys in torch.arange(len(examples)).split(batch)
    ]
    rollout = _joined([rollout for rollout, _ in sampled])
    tokens = _joined_tokens([tokens for _, tokens in sampled])
    # A reward function may draw random numbers: ours to seed, and the run's to keep.
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        scores = trainer.scorer(examples, rollout, prompts, config.eos_token_id)

    totals = scores.totals.where(scores.is_used, torch.nan).view(len(examples), -1)
    ids = [completion.tolist() for completion in rollout.completion_ids]
    texts = [prompts.decode(completion, config.eos_token_id) for completion in ids]
    return {
        **scores.metrics,
        **to_numbers(rollout_metrics(rollout, tokens, trainer.ops)),
        "prompt_rewards": totals.nanmean(1).tolist(),
        "completions": _by_prompt(texts, completions_per_prompt),
        "completion_ids": _by_prompt(ids, completions_per_prompt),
    }


def _sample(
    trainer: "Trainer",
    examples: list[Example],
    keys: Tensor,
    completions_per_prompt: int,
    temperature: float,
    seed: int,
) -> tuple[Rollout, ScoredTokens]:
    """Completions of the examples that keys name, and what the models say of them."""
    rollout = generate(
        trainer.policy,
        [examples[key].token_ids.to(trainer.device) for key in keys.tolist()],
        completions_per_prompt=completions_per_prompt,
        max_new_tokens=trainer.config.max_new_tokens,
        seeds=completion_seeds(seed, _EVALUATION, keys, completions_per_prompt),
        temperature=temperature,
        eos_token_id=trainer.config.eos_token_id,
        ops=trainer.ops,
    )
    # Greedy tokens have the log-probabilities of temperature 1, as in sample_tokens.
    scale = temperature if temperature > 0 else 1.0
    tokens = score_tokens(
        trainer.policy, trainer.reference, rollout, temperature=scale, ops=trainer.ops
    )
    return rollout, tokens


def _joined(rollouts: list[Rollout]) -> Rollout:
    lengths = torch.cat([rollout.lengths for rollout in rollouts])
    prompts = [prompt for rollout in rollouts for prompt in rollout.prompts]
    count = lengths.numel() // len(prompts)
    return Rollout(
        prompts=prompts,
        token_ids=torch.cat([rollout.token_ids for rollout in rollouts]),
        cu_seqlens=torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int(),
        group_ids=torch.arange(len(prompts), device=lengths.device).repeat_interleave(count),
        ended=torch.cat([rollout.ended for rollout in rollouts]),
        logprobs=torch.cat([rollout.logprobs for rollout in rollouts]),
    )


def _joined_tokens(scored: list[ScoredTokens]) -> ScoredTokens:
    names = ("hidden", "logprobs", "entropy", "ref_logprobs")
    return ScoredTokens(*(torch.cat([getattr(s, name) for s in scored]) for name in names))


def _by_prompt(entries: list[Any], count: int) -> list[list[Any]]:
    return [entries[start : start + count] for start in range(0, len(entries), count)]
