"""Rollouts from elsewhere: an inference engine, an agent's own loop, or recorded conversations."""

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from fastrl._sampling import pack_written
from fastrl._transfer import on_device
from fastrl.layout import PackedBatch, pack_groups
from fastrl.rollout import Rollout

RolloutFunction = Callable[..., "Mapping[str, Any] | Rollout"]
"""Called once a step, in several processes by each that has a share of the step's prompts, as

    rollout_function(prompts=, completions_per_prompt=, max_new_tokens=, temperature=,
                     eos_token_ids=, seeds=, policy=)

prompts: P lists of ids, the caller's share; seeds: [P * completions_per_prompt], one for each
completion; policy: what is trained, for whoever has to hand its weights on. It returns a dict of
lists with one entry for each prompt, each a list with one entry for each completion (any number of
them):

    "completion_ids": lists of ids, EOS included
    "logprobs": lists of floats, nats, of each id at the temperature of sampling, as vLLM gives them
    "loss_mask": optional, lists of bools: False where the policy did not write the token
    "ended": optional, bools; without it a completion has ended if its last id is an EOS

or a whole Rollout, for trees of conversations; its rewards, if it has some, are taken as they are.
"""

_KEYS = ("completion_ids", "logprobs", "loss_mask", "ended")


def rollout_of(
    result: Any, prompts: list[Tensor], eos_token_ids: Sequence[int], device: torch.device
) -> Rollout:
    """What a rollout function returned, checked, as a Rollout.

    Raises:
        ValueError, TypeError: lists of the wrong lengths or types, ids without a log-probability,
            a key that means nothing here.
    """
    if isinstance(result, Rollout):
        return _checked(result, len(prompts))
    if not isinstance(result, Mapping) or not {"completion_ids", "logprobs"} <= result.keys():
        got = sorted(result) if isinstance(result, Mapping) else type(result).__name__
        raise _wrong('a dict with "completion_ids" and "logprobs", or a Rollout', got)
    if unknown := sorted(map(str, result.keys() - set(_KEYS))):
        raise _wrong(f"a dict of {', '.join(_KEYS)} alone", ", ".join(unknown))
    ids = _groups(result, "completion_ids", len(prompts))
    counts = [len(group) for group in ids]
    if not any(counts):
        raise _wrong("a completion at least", "none")
    logprobs = _like(result, "logprobs", ids)
    masks = _like(result, "loss_mask", ids) if result.get("loss_mask") is not None else None
    ended = result.get("ended")
    flat = [completion for group in ids for completion in group]
    if ended is None:
        stops = set(eos_token_ids)
        ended = [bool(len(c)) and int(c[-1]) in stops for c in flat]
    else:
        ended = [bool(x) for group in _groups(result, "ended", len(prompts), counts) for x in group]
    moved = iter(on_device([torch.as_tensor(c, dtype=torch.int64) for c in flat], device))
    batch = _batch(prompts, [list(islice(moved, count)) for count in counts], masks)
    given = torch.tensor([x for row in logprobs for x in row], dtype=torch.float32)
    if masks is not None:
        given = given[torch.tensor([bool(x) for row in masks for x in row], dtype=torch.bool)]
    if not bool((given <= 0).all()):  # NaN too
        bad = float(given[~(given <= 0)][0])
        raise _wrong("logprobs <= 0 of the ids that the policy wrote", bad)
    groups = torch.arange(len(prompts)).repeat_interleave(torch.tensor(counts))
    per_completion = [groups, torch.tensor(ended, dtype=torch.bool), given.clamp(min=-1e30)]
    group_ids, is_ended, sampled = on_device(per_completion, device)
    return Rollout(batch=batch, group_ids=group_ids, ended=is_ended, logprobs=sampled)


def _checked(rollout: Rollout, num_prompts: int) -> Rollout:
    count, num_targets = len(rollout.lengths), len(rollout.token_ids)
    sizes = {"group_ids": count, "ended": count, "logprobs": num_targets}
    sizes |= {"rewards": num_targets, "is_used": count, "values": num_targets}
    for name, size in sizes.items():
        x = getattr(rollout, name)
        if x is not None and x.shape != (size,):
            raise _wrong(f"a Rollout with {name} [{size}]", tuple(x.shape))
    if not count:
        raise _wrong("a completion at least", "none")
    groups = rollout.group_ids
    if int(groups.min()) < 0 or int(groups.max()) >= num_prompts:
        raise _wrong(f"a Rollout with group_ids in [0, {num_prompts})", groups.unique().tolist())
    if not bool((rollout.logprobs <= 0).all()):  # NaN too
        bad = float(rollout.logprobs[~(rollout.logprobs <= 0)][0])
        raise _wrong("a Rollout with logprobs <= 0", bad)
    return rollout


def check_ids(rollout: Rollout, vocab_size: int) -> None:
    """Raise a ValueError for an id outside the vocabulary: on a GPU it would end the process."""
    ids = rollout.batch.token_ids
    if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < vocab_size:
        raise _wrong(f"ids in [0, {vocab_size})", f"ids from {int(ids.min())} to {int(ids.max())}")


def _batch(
    prompts: list[Tensor], completions: list[list[Tensor]], masks: list[list[bool]] | None
) -> PackedBatch:
    if masks is None:
        return pack_groups(prompts, completions)
    rest = iter(masks)
    written = [
        [torch.tensor([bool(x) for x in next(rest)], dtype=torch.bool) for _ in group]
        for group in completions
    ]
    return pack_written(prompts, completions, written)


def _groups(
    result: Mapping[str, Any], name: str, count: int, counts: list[int] | None = None
) -> list[Any]:
    groups = result[name]
    if not isinstance(groups, Sequence) or len(groups) != count:
        got = len(groups) if isinstance(groups, Sequence) else type(groups).__name__
        raise _wrong(f"{name} a list with one entry for each of the {count} prompts", got)
    found = [len(group) for group in groups]
    if counts is not None and found != counts:
        raise _wrong(f"{name} of {counts} completions, like completion_ids", found)
    return list(groups)


def _like(result: Mapping[str, Any], name: str, ids: list[Any]) -> list[Any]:
    """One list per completion, as long as its ids."""
    groups = _groups(result, name, len(ids), [len(group) for group in ids])
    rows = [row for group in groups for row in group]
    lengths = [len(completion) for group in ids for completion in group]
    for index, (row, length) in enumerate(zip(rows, lengths, strict=True)):
        if len(row) != length:
            raise _wrong(f"{length} {name} for completion {index}, one for each id", len(row))
    return rows


def _wrong(expected: str, got: Any) -> ValueError:
    return ValueError(
        f"rollout_function: expected {expected}, got {got}. "
        "See fastrl.trainers.engines.RolloutFunction."
    )


def importance(old_logprobs: Tensor, engine_logprobs: Tensor, cap: float) -> Tensor:
    """[M], truncated importance weights of tokens that an engine sampled.

        w_t = min(cap, exp(old_logprobs_t - engine_logprobs_t))

    Reference: Ionides 2008, J. Comput. Graph. Stat. 17; Yao et al. 2025, "Your efficient RL
    framework secretly brings you off-policy RL training".
    """
    return (old_logprobs - engine_logprobs).clamp(max=math.log(cap)).exp()


def sampling_metrics(
    old_logprobs: Tensor, engine_logprobs: Tensor, weights: Tensor, is_fresh: Tensor | None
) -> dict[str, Tensor]:
    """What to log of an engine's M tokens; of those [M] bool that it sampled in this step."""
    difference = (old_logprobs - engine_logprobs).abs()
    if is_fresh is not None:
        difference, weights = difference[is_fresh], weights[is_fresh]
    if not len(weights):
        return {}
    return {
        "sampling/sampling_logp_difference/mean": difference.mean(),
        "sampling/sampling_logp_difference/max": difference.max(),
        "sampling/importance_sampling_ratio/min": weights.min(),
        "sampling/importance_sampling_ratio/mean": weights.mean(),
        "sampling/importance_sampling_ratio/max": weights.max(),
    }
