"""TRL's trainers on a model, a tokenizer and prompts that are made here: nothing is downloaded."""

import random
from typing import Any

import torch

WORDS = [f"w{i}" for i in range(60)]
VOCAB = len(WORDS) + 3  # [PAD], [EOS] and [UNK]


def tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["[PAD]", "[EOS]", "[UNK]", *WORDS]
    made = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="[PAD]", eos_token="[EOS]", unk_token="[UNK]"
    )


def language_model(folder: Any) -> Any:
    """Read back from a folder, from which the trainers copy their reference model."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    made = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
            num_attention_heads=2, pad_token_id=0, eos_token_id=1, bos_token_id=None,
            initializer_range=0.5,  # the default leaves every distribution near uniform
        )
    )  # fmt: skip
    made.save_pretrained(folder)
    return LlamaForCausalLM.from_pretrained(folder)


def prompts() -> Any:
    from datasets import Dataset

    drawn = random.Random(0)
    texts = [" ".join(drawn.choices(WORDS, k=drawn.randint(2, 6))) for _ in range(8)]
    return Dataset.from_dict({"prompt": texts})


def reward(completion_ids: list[list[int]], **columns: Any) -> list[float]:
    return [sum(i % 5 for i in ids) / 10 + 0.1 * len(ids) for ids in completion_ids]


def history(name: str, folder: Any, **options: Any) -> list[dict[str, float]]:
    """The numbers that three steps of "GRPO" or "RLOO" log, without what tells the time."""
    import trl

    # Plain SGD: Adam would make a step of the learning rate out of a gradient that is rounding.
    # Every batch twice: the first time all ratios are 1, and GRPO's loss says nothing.
    arguments = {
        "max_steps": 3, "num_iterations": 2, "per_device_train_batch_size": 4,
        "num_generations": 4, "max_completion_length": 8, "optim": "sgd", "learning_rate": 0.1,
        "logging_steps": 1, "save_strategy": "no", "report_to": "none", "use_cpu": True,
        "bf16": False, "seed": 1, "disable_tqdm": True, "gradient_checkpointing": False,
        "output_dir": str(folder / "run"), **options,
    }  # fmt: skip
    trainer = getattr(trl, f"{name}Trainer")(
        model=language_model(folder / "model"),
        reward_funcs=reward,
        args=getattr(trl, f"{name}Config")(**arguments),
        train_dataset=prompts(),
        processing_class=tokenizer(),
    )
    trainer.train()
    timed = ("time", "per_second", "mfu", "flos")
    return [
        {k: v for k, v in entry.items() if not any(word in k for word in timed)}
        for entry in trainer.state.log_history
    ]
