"""A step's rollout: from the policy itself, or from a rollout function."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastrl._transfer import on_device
from fastrl.rollout import Rollout, completion_seeds, generate
from fastrl.trainers.engines import check_ids, rollout_of
from fastrl.trainers.prompts import Example, decode_all
from fastrl.trainers.tokens import autocast

if TYPE_CHECKING:
    from fastrl.trainers.trainer import Trainer

TRAINING, EVALUATION = 0, 2  # streams of random numbers apart from the others


def collect(trainer: "Trainer", examples: list[Example], positions: Tensor) -> Rollout:
    """A training step's completions; positions [P] are those of its prompts in the run."""
    config = trainer.config
    count = config.completions_per_prompt
    seeds = completion_seeds(config.seed, TRAINING, positions, count)
    engine = trainer.rollout_function
    if engine is None:
        return sample(
            trainer,
            examples,
            seeds,
            completions_per_prompt=count,
            temperature=trainer.temperature,
            value_fn=trainer.values_while_sampling(),
        )

    def of_some(part: slice) -> Rollout:
        result = engine(
            prompts=[example.token_ids.tolist() for example in examples[part]],
            completions_per_prompt=count,
            max_new_tokens=config.max_new_tokens,
            temperature=trainer.temperature,
            eos_token_ids=list(trainer.eos_token_ids),
            seeds=seeds.view(-1, count)[part].flatten().tolist(),
            policy=trainer.policy,
        )
        prompts = on_device([example.token_ids for example in examples[part]], trainer.device)
        rollout = rollout_of(result, prompts, trainer.eos_token_ids, trainer.device)
        check_ids(rollout, trainer.policy.vocab_size)
        return rollout

    return trainer.processes.gathered(len(examples), of_some)


def sample(
    trainer: "Trainer",
    examples: list[Example],
    seeds: Tensor,
    *,
    completions_per_prompt: int,
    **options: Any,
) -> Rollout:
    """`generate` with what a trainer's config says, each process for its share of the prompts."""
    config, environment = trainer.config, trainer.environment
    decode = None if trainer.tokenizer is None else decode_all(trainer.tokenizer)

    def of_some(part: slice) -> Rollout:
        first = part.start * completions_per_prompt

        def answer(index: int, prompt_ids: list[int], completion_ids: list[int]) -> Any:
            assert environment is not None
            return environment(first + index, prompt_ids, completion_ids)

        with torch.no_grad(), autocast(trainer.device, config.precision):
            return generate(
                trainer.policy,
                on_device([example.token_ids for example in examples[part]], trainer.device),
                completions_per_prompt=completions_per_prompt,
                max_new_tokens=config.max_new_tokens,
                seeds=seeds.view(-1, completions_per_prompt)[part].flatten(),
                eos_token_id=trainer.eos_token_ids,
                stop_strings=config.stop_strings,
                decode=decode,
                environment=None if environment is None else answer,
                ops=trainer.ops,
                **{"max_rows": config.max_rows} | options,
            )

    return trainer.processes.gathered(len(examples), of_some)


def with_usable_rewards(rollout: Rollout) -> Rollout:
    """A rollout that came with rewards: completions with bad ones are not used."""
    assert rollout.rewards is not None
    is_finite = rollout.rewards.isfinite()
    good = rollout.per_completion(is_finite.double(), "min", initial=1) > 0
    is_used = good if rollout.is_used is None else good & rollout.is_used
    owner = rollout.over_targets(is_used)
    return replace(rollout, rewards=rollout.rewards.masked_fill(~owner, 0), is_used=is_used)


def eos_token_ids(trainer: "Trainer") -> tuple[int, ...]:
    """What ends a completion: as the config has it, or as model and tokenizer have it.

    Raises:
        ValueError: an id outside the vocabulary; stop strings without a tokenizer; mask_truncated
            where nothing ends.
    """
    given, vocab_size = trainer.config.eos_token_id, trainer.policy.vocab_size
    if given == "auto":
        given = getattr(trainer.policy, "eos_token_id", None)
        if given is None:
            given = getattr(trainer.tokenizer, "eos_token_id", None)
    if trainer.config.stop_strings and trainer.tokenizer is None:
        raise ValueError(
            f"{type(trainer).__name__}: expected tokenizer with stop_strings, got None. "
            "Pass tokenizer=."
        )
    ids = tuple(given) if isinstance(given, Sequence) else () if given is None else (given,)
    for token in ids:
        if token >= vocab_size:
            raise ValueError(
                f"{type(trainer).__name__}: expected eos_token_id in [0, {vocab_size}), got "
                f"{token}. Use the tokenizer that the model was built for."
            )
    never_ends = not (ids or trainer.config.stop_strings or trainer.rollout_function)
    if trainer.config.mask_truncated and never_ends:
        raise ValueError(
            f"{type(trainer).__name__}: expected an EOS or stop strings with mask_truncated, got "
            "none: no completion would ever be learned from. Set eos_token_id, or "
            "mask_truncated=False."
        )
    return ids
