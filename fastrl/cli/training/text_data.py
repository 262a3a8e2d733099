"""From blocks of text to token ids, prompts and true continuations."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

from fastrl.cli.training.corpus import CorpusError, Splits
from fastrl.cli.training.settings import TrainSettings
from fastrl.rewards import byte_level_token_bytes

END_OF_TEXT = "<|endoftext|>"
MIN_REFERENCE_WORDS = 5  # a continuation of fewer words (a table, a rule) says little
MIN_HELD_OUT_PROMPTS = 8
TRAIN_STRIDE = 16  # tokens between the starts of training prompts, which overlap


@dataclass(frozen=True)
class TextData:
    """What the stages read; token ids [n] int64 of each block, END_OF_TEXT last."""

    tokenizer: Tokenizer
    token_bytes: list[bytes]
    train: list[Tensor]
    validation: list[Tensor]
    held_out: list[Tensor]
    train_prompts: list[dict[str, Any]]
    held_out_prompts: list[dict[str, Any]]

    @property
    def eos_token_id(self) -> int:
        return _end_of_text(self.tokenizer)


def train_tokenizer(texts: Sequence[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE tokenizer: any text has ids, and the ids give it back."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def prepare(splits: Splits, tokenizer: Tokenizer, settings: TrainSettings) -> TextData:
    """Encode the splits and cut prompts from them.

    Prompts of training overlap; held-out ones do not, nor do their continuations.

    Raises:
        CorpusError: the text is too short for the settings.
    """
    token_bytes = byte_level_token_bytes(tokenizer.get_vocab(), {END_OF_TEXT})
    end = _end_of_text(tokenizer)

    def encode(blocks: list[str]) -> list[Tensor]:
        return [torch.tensor([*e.ids, end]) for e in tokenizer.encode_batch(blocks)]

    train, validation, held_out = map(encode, (splits.train, splits.validation, splits.held_out))
    length = settings.prompt_tokens + settings.completion_tokens
    train_prompts = _prompts(train, token_bytes, settings, TRAIN_STRIDE)
    held_out_prompts = _prompts(held_out, token_bytes, settings, length)
    num_train = sum(block.numel() for block in train)
    if (
        len(held_out_prompts) < MIN_HELD_OUT_PROMPTS
        or len(train_prompts) < settings.prompts_per_step
        or num_train <= settings.warmup_length
    ):
        raise CorpusError(
            f"train: expected corpus {splits.name} to give at least {MIN_HELD_OUT_PROMPTS} "
            f"held-out prompts of {length} tokens and {settings.prompts_per_step} to train on, "
            f"got {len(held_out_prompts)} and {len(train_prompts)}. Pass a longer text to "
            "--corpus, or lower --prompt-tokens and --completion-tokens."
        )
    # Evenly from the whole held-out text, where there are more than are asked for.
    count = min(len(held_out_prompts), settings.evaluation_prompts)
    chosen = [held_out_prompts[i * len(held_out_prompts) // count] for i in range(count)]
    return TextData(tokenizer, token_bytes, train, validation, held_out, train_prompts, chosen)


def _end_of_text(tokenizer: Tokenizer) -> int:
    token_id = tokenizer.token_to_id(END_OF_TEXT)
    assert token_id is not None, "a tokenizer of train_tokenizer has it"
    return token_id


def _prompts(
    blocks: list[Tensor], token_bytes: list[bytes], settings: TrainSettings, stride: int
) -> list[dict[str, Any]]:
    length = settings.prompt_tokens + settings.completion_tokens
    prompts = []
    for block in blocks:
        for start in range(0, block.numel() - length, stride):  # END_OF_TEXT stays out
            ids = block[start : start + length]
            prompt, continuation = ids.split([settings.prompt_tokens, settings.completion_tokens])
            raw = b"".join(token_bytes[i] for i in continuation.tolist())
            # A window may cut a character; a half is no text.
            reference = raw.decode("utf-8", errors="ignore")
            if sum(any(c.isalnum() for c in w) for w in reference.split()) >= MIN_REFERENCE_WORDS:
                prompts.append({"prompt": prompt, "reference": reference})
    return prompts
