"""One update's gradient: TRL's loss on a padded batch, and ours on the packed one.

The same weights, ragged completions, rewards and old log-probabilities go into TRL's
`GRPOTrainer._compute_loss`, with the advantages as TRL defines them, and into our trainer, from the
rewarded rollout to the gradients that its optimizer is handed.
"""

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from compat.tiny_trainers import VOCAB, language_model, prompts, reward, tokenizer
from torch.nn.utils.rnn import pad_sequence

from fastrl.layout import pack_groups
from fastrl.rollout import Rollout
from fastrl.trainers import PolicyGradientConfig, PolicyGradientTrainer
from fastrl.trainers.experience import gather
from fastrl.trainers.update import learn

TOLERANCE = 1e-4  # of the largest entry of that parameter's gradient
LONGEST = 8
GROUPS = [(4, [8, 1, 5]), (2, [3, 8, 2]), (7, [6, 4, 7])]  # tokens of a prompt, and its completions
PROMPTS, COMPLETIONS = len(GROUPS), len(GROUPS[0][1])


@dataclass(frozen=True)
class Case:
    """TRL's options and ours for the same loss; `noise` is how far old log-probs lie from new."""

    trl: dict[str, Any]
    ours: dict[str, Any]
    noise: float = 0.3
    clipped: str = "clip_ratio/region_mean"


CASES = {
    "grpo": Case({"loss_type": "grpo"}, {"algorithm": "grpo"}),
    "grpo, kl": Case(
        {"loss_type": "grpo", "beta": 0.3, "use_bias_correction_kl": False},
        {"algorithm": "grpo", "kl_coef": 0.3, "kl_estimator": "k3"},
    ),
    "grpo, in micro-batches": Case(
        {"loss_type": "grpo"}, {"algorithm": "grpo", "micro_batch_tokens": 16}
    ),
    "dr_grpo": Case({"loss_type": "dr_grpo", "scale_rewards": "none"}, {"algorithm": "dr_grpo"}),
    "dapo": Case(
        {"loss_type": "dapo", "epsilon_high": 0.28, "mask_truncated_completions": True},
        {"algorithm": "dapo"},
    ),
    "bnpo": Case({"loss_type": "bnpo"}, {"algorithm": "grpo", "reduction": "token_mean"}),
    "cispo": Case(
        {"loss_type": "cispo", "epsilon_high": 1.2},  # a bound of the ratio itself
        {"algorithm": "cispo", "clip_high": 0.2},
        clipped="cispo_clip_ratio",
    ),
    "gspo": Case(
        {
            "loss_type": "grpo", "importance_sampling_level": "sequence",
            "epsilon": 3e-4, "epsilon_high": 4e-4,
        },
        {"algorithm": "gspo"},
        noise=1e-3,
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    pytest.importorskip(
        "trl", reason="TRL is not installed: `make test` does it, from Python 3.11 on"
    )
    return tmp_path_factory.mktemp("trl")


@pytest.fixture(scope="module")
def tokens():
    """Prompts, and the completions of each."""
    generator = torch.Generator().manual_seed(0)

    def drawn(length):
        return torch.randint(3, VOCAB, (length,), generator=generator)

    return [drawn(n) for n, _ in GROUPS], [[drawn(n) for n in rest] for _, rest in GROUPS]


def padded(rows, side):
    """Ids [B, T] and where they exist, as TRL pads them."""
    ids = pad_sequence(rows, batch_first=True, padding_side=side)
    ones = [torch.ones_like(row) for row in rows]
    return ids, pad_sequence(ones, batch_first=True, padding_side=side)


def trl_trainer(folder, options):
    import trl

    config = trl.GRPOConfig(
        output_dir=str(folder / "run"), per_device_train_batch_size=PROMPTS * COMPLETIONS,
        num_generations=COMPLETIONS, max_completion_length=LONGEST, gradient_checkpointing=False,
        bf16=False, use_cpu=True, report_to="none", save_strategy="no", **options,
    )  # fmt: skip
    trainer = trl.GRPOTrainer(
        model=language_model(folder / "model"), reward_funcs=reward, args=config,
        train_dataset=prompts(), processing_class=tokenizer(),
    )  # fmt: skip
    trainer.current_gradient_accumulation_steps = 1  # what train() sets
    trainer.model.train()
    return trainer


def trl_inputs(trainer, tokens, rewards, noise):
    """What TRL makes of completions and hands to its loss."""
    prompt_rows, groups = tokens
    rows = [completion for group in groups for completion in group]
    prompt_ids, prompt_mask = padded([p for p in prompt_rows for _ in range(COMPLETIONS)], "left")
    completion_ids, exists = padded(rows, "right")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        logprobs = trainer._get_per_token_logps_and_entropies(
            trainer.model,
            torch.cat([prompt_ids, completion_ids], 1),
            torch.cat([prompt_mask, exists], 1),
            completion_ids.shape[1],
        )[0]
    advantages = rewards - rewards.mean(1, keepdim=True)
    if trainer.scale_rewards == "group":
        advantages = advantages / (rewards.std(1, keepdim=True) + 1e-4)
    is_learned = exists
    if trainer.mask_truncated_completions:
        is_learned = exists * ~truncated(rows)[:, None]
    return {
        "prompt_ids": prompt_ids, "prompt_mask": prompt_mask,
        "completion_ids": completion_ids, "completion_mask": is_learned,
        "advantages": advantages.flatten(),
        "num_items_in_batch": is_learned.sum(),
        "old_per_token_logps": logprobs + noise * torch.randn(logprobs.shape, generator=generator),
        "ref_per_token_logps": logprobs + 0.3 * torch.randn(logprobs.shape, generator=generator),
    }  # fmt: skip


def truncated(completions):
    return torch.tensor([len(ids) == LONGEST for ids in completions])


def our_update(model, tokens, rewards, inputs, options):
    """The gradients that the optimizer is handed in an update, and what is reported of it."""
    config = PolicyGradientConfig(
        prompts_per_step=PROMPTS, completions_per_prompt=COMPLETIONS, max_new_tokens=LONGEST,
        max_grad_norm=None, **options,
    )  # fmt: skip
    trainer = PolicyGradientTrainer(model, reward, prompts(), config, tokenizer=tokenizer())
    batch = pack_groups(*tokens)
    rows = [completion for group in tokens[1] for completion in group]
    exists = padded(rows, "right")[1].bool()
    last = batch.completion_cu_seqlens[1:].long() - 1
    rollout = Rollout(
        batch=batch,
        group_ids=torch.arange(PROMPTS).repeat_interleave(COMPLETIONS),
        ended=~truncated(rows),
        logprobs=inputs["old_per_token_logps"][exists],
        rewards=torch.zeros(len(batch.target_ids)).index_put((last,), rewards.flatten()),
        is_used=torch.ones(len(rows), dtype=torch.bool),
    )
    experience, _ = gather(trainer, rollout)
    if config.kl_coef:  # a starting model of which the log-probs alone are known
        experience = replace(experience, ref_logprobs=inputs["ref_per_token_logps"][exists])
    found: dict[str, torch.Tensor] = {}
    trainer.optimizer.register_step_pre_hook(lambda *_: found.update(gradients(trainer.model)))
    numbers, problem = learn(trainer, experience)
    assert problem is None
    return found, numbers


def gradients(model):
    """Of each parameter, under the name that transformers has for it."""
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", CASES)
def test_the_gradient_of_an_update_is_that_of_trl(name, folder, tokens):
    case = CASES[name]
    rewards = torch.randn(PROMPTS, COMPLETIONS, generator=torch.Generator().manual_seed(2))
    theirs = trl_trainer(folder, case.trl)
    inputs = trl_inputs(theirs, tokens, rewards, case.noise)
    loss = theirs._compute_loss(theirs.model, inputs)
    loss.backward()
    expected = gradients(theirs.model)
    assert 0 < theirs._metrics["train"][case.clipped][-1] < 1
    model = language_model(folder / "model")
    found, numbers = our_update(model, tokens, rewards, inputs, case.ours)
    assert len(found) == len(expected) > 10
    for parameter, grad in expected.items():
        mine = next(g for n, g in found.items() if n.endswith(parameter))
        largest = grad.abs().max()
        assert largest > 1e-5, parameter
        assert (mine - grad).abs().max() <= TOLERANCE * largest, parameter
    assert numbers["loss"] == pytest.approx(loss.item(), rel=1e-4, abs=1e-6)
