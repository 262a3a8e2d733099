"""What `bench.grpo_step` times: trainers and samplers on one model, one dataset and one reward.

Each contestant is built by a function of the options and the number of steps, outside the clock,
and gives a call without arguments that does these steps and returns what it logged of each.

The tokenizer's EOS is an id that the model has no logit for, and no other ends a completion: both
sides sample every completion to its full length without being told a least one.
"""

import argparse
import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Record = dict[str, float]
Call = Callable[[], list[Record]]
_DATASET = 32  # prompts


def reward(completion_ids: list[list[int]], **columns: Any) -> list[float]:
    return [sum(i % 7 for i in ids) / len(ids) for ids in completion_ids]


def language_model(options: argparse.Namespace) -> Any:
    """A random Llama; equal options give equal weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    heads = max(1, options.hidden // options.head_size)
    config = LlamaConfig(
        vocab_size=options.vocab, hidden_size=options.hidden, num_attention_heads=heads,
        num_hidden_layers=options.layers, intermediate_size=4 * options.hidden,
        max_position_embeddings=options.prompt_tokens + options.tokens,
        pad_token_id=0, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def tokenizer(options: argparse.Namespace) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["[PAD]", *(f"w{i}" for i in range(1, options.vocab)), "[EOS]"]
    made = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="w1"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="[PAD]", eos_token="[EOS]")


def prompts(options: argparse.Namespace) -> list[list[int]]:
    drawn, ids = random.Random(0), range(1, options.vocab)
    return [drawn.choices(ids, k=options.prompt_tokens) for _ in range(_DATASET)]


def dataset(options: argparse.Namespace) -> Any:
    """The prompts as text, for both."""
    from datasets import Dataset

    texts = [" ".join(f"w{i}" for i in ids) for ids in prompts(options)]
    return Dataset.from_dict({"prompt": texts})


def trl_grpo(options: argparse.Namespace, steps: int, folder: str) -> Call:
    """TRL's trainer with its defaults, but for what is set here, and what it says itself of each
    step."""
    from transformers.trainer_callback import PrinterCallback
    from trl import GRPOConfig, GRPOTrainer

    config = GRPOConfig(
        output_dir=folder, max_steps=steps, loss_type="grpo", beta=0.0, temperature=1.0,
        per_device_train_batch_size=options.prompts * options.completions,
        num_generations=options.completions, max_completion_length=options.tokens,
        gradient_checkpointing=options.checkpointing, bf16=False, use_cpu=True, seed=0,
        learning_rate=1e-4, lr_scheduler_type="constant", max_grad_norm=1.0, weight_decay=0.0,
        logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True,
    )  # fmt: skip
    trainer = GRPOTrainer(
        model=language_model(options), reward_funcs=reward, args=config,
        train_dataset=dataset(options), processing_class=tokenizer(options),
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)

    def call() -> list[Record]:
        trainer.train()
        return [entry for entry in trainer.state.log_history if "loss" in entry]

    return call


def sampled_by_transformers(options: argparse.Namespace, steps: int, folder: str) -> Call:
    """`model.generate` with the cache that it chooses; each prompt stands once for each of its
    completions, as a trainer has to pass them."""
    model = language_model(options).eval()
    rows = torch.tensor(prompts(options)[: options.prompts])
    rows = rows.repeat_interleave(options.completions, dim=0)
    given = {
        "attention_mask": torch.ones_like(rows), "max_new_tokens": options.tokens,
        "do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0,
        "eos_token_id": options.vocab, "pad_token_id": 0,
    }  # fmt: skip

    def call() -> list[Record]:
        made = [model.generate(rows, **given) for _ in range(steps)]
        return [_sampled(ids[:, options.prompt_tokens :].unbind()) for ids in made]

    return call


def _sampled(completions: Any) -> Record:
    """What is logged of completions: that all of them are whole."""
    lengths = [len(ids) for ids in completions]
    rewards = reward([ids.tolist() for ids in completions])
    return {
        "reward": sum(rewards) / len(rewards),
        "completions/mean_length": sum(lengths) / len(lengths),
    }


def _prompt_tensors(options: argparse.Namespace) -> list[Tensor]:
    return [torch.tensor(ids) for ids in prompts(options)[: options.prompts]]


def fastrl_grpo(options: argparse.Namespace, steps: int, folder: str) -> Call:
    from fastrl.trainers import PolicyGradientConfig, PolicyGradientTrainer

    config = PolicyGradientConfig(algorithm="grpo", **_settings(options, steps))
    trainer = PolicyGradientTrainer(
        language_model(options), reward, dataset(options), config, tokenizer=tokenizer(options)
    )
    return trainer.train


def fastrl_ppo(options: argparse.Namespace, steps: int, folder: str) -> Call:
    """One epoch over the whole batch, so that it takes as many gradient steps as GRPO."""
    from fastrl.models import ActorCritic, as_policy
    from fastrl.trainers import ActorCriticConfig, ActorCriticTrainer

    model = ActorCritic(as_policy(language_model(options)))
    config = ActorCriticConfig(algorithm="ppo", **_settings(options, steps))
    trainer = ActorCriticTrainer(
        model, reward, dataset(options), config, tokenizer=tokenizer(options)
    )
    return trainer.train


def _settings(options: argparse.Namespace, steps: int) -> dict[str, Any]:
    """Those of `trl_grpo` under our names; no reference model, as TRL has none at beta 0."""
    return {
        "prompts_per_step": options.prompts, "completions_per_prompt": options.completions,
        "max_new_tokens": options.tokens, "temperature": 1.0, "eos_token_id": None,
        "learning_rate": 1e-4, "weight_decay": 0.0, "max_grad_norm": 1.0, "max_steps": steps,
        "kl_coef": 0.0, "kl_every": 0, "gradient_checkpointing": options.checkpointing, "seed": 0,
    }  # fmt: skip


def sampled_by_fastrl(options: argparse.Namespace, steps: int, folder: str) -> Call:
    from fastrl.models import as_policy
    from fastrl.rollout import completion_seeds, generate

    policy = as_policy(language_model(options)).eval()
    rows = _prompt_tensors(options)

    def call() -> list[Record]:
        made = []
        for step in range(steps):
            keys = step * len(rows) + torch.arange(len(rows))
            seeds = completion_seeds(0, 0, keys, options.completions)
            made.append(
                generate(
                    policy, rows, completions_per_prompt=options.completions,
                    max_new_tokens=options.tokens, seeds=seeds,
                )
            )  # fmt: skip
        return [_sampled(rollout.completion_ids) for rollout in made]

    return call
