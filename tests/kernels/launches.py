"""The list of launches: calls that reach every kernel of fastrl.kernels in every configuration that
we ship. test_listing.py fails where a launcher or a kernel is missing here.

The tensors hold nothing: only their types, sizes, strides and addresses reach the compiler.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from fastrl.kernels import (
    attention,
    decode_attention,
    kept_logprobs,
    sample_tokens,
    token_logprobs,
)

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Launch:
    function: Callable[..., Any]
    arguments: tuple[Any, ...]

    @property
    def name(self) -> str:
        module = self.function.__module__.removeprefix("fastrl.kernels.")
        return f"{module}.{self.function.__name__}"


def launches() -> Iterator[Launch]:
    yield from _token_logprobs()
    yield from _sample_tokens()
    yield from _kept_logprobs()
    yield from _attention()
    yield from _decode_attention()


def _token_logprobs() -> Iterator[Launch]:
    # Both blocks, each with rows on 16-byte bounds and not; rows on such bounds that end between
    # two; and rows of one.
    stored_and_used = [(151936, 151936), (50257, 50257), (50304, 50257)]
    stored_and_used += [(1024, 1024), (1000, 1000), (1024, 1000), (1, 1)]
    for dtype in FLOATS:
        for stored, vocab in stored_and_used:
            logits = torch.empty(2, stored, dtype=dtype)[:, :vocab]
            ids, row = torch.empty(2, dtype=torch.int64), torch.empty(2)
            for return_entropy in (False, True):
                arguments = (logits, ids, 1.0, -100, return_entropy, False)
                yield Launch(token_logprobs.token_logprobs_fwd, arguments)
                state = (logits, ids, 1.0, -100, 0, return_entropy)
                yield Launch(token_logprobs.token_logprobs_state, state)
            for g, h in ((row, None), (None, row), (row, row)):
                saved = (row, row if h is not None else None, row, row)
                arguments = (g, h, logits, ids, *saved, 1.0, -100, 0)
                yield Launch(token_logprobs.token_logprobs_bwd, arguments)
                yield Launch(token_logprobs.token_logprobs_bwd_, arguments)
    # The gradient of a slice of float32 logits, as the factor of a 16-bit product.
    for dtype in FLOATS[1:]:
        logits, grad = torch.empty(2, 16384), torch.empty(2, 16384, dtype=dtype)
        for h in (None, row):
            saved = (ids, row, row if h is not None else None, row, row, 1.0, -100, 0)
            yield Launch(token_logprobs.token_logprobs_bwd_out, (grad, row, h, logits, *saved))


def _sample_tokens() -> Iterator[Launch]:
    # Rows on 16-byte bounds and not, for the kernel that draws and the one that cuts before.
    for dtype in FLOATS:
        for vocab in (151936, 50257):
            logits, seeds = torch.empty(2, vocab, dtype=dtype), torch.empty(2, dtype=torch.int64)
            for top_k in (None, 50):
                arguments = (logits, seeds, 1, 1.0, top_k, None)
                yield Launch(sample_tokens.sample_tokens, arguments)
        yield Launch(sample_tokens.kept_ids, (logits, torch.empty(2), seeds))


def _kept_logprobs() -> Iterator[Launch]:
    ids, row = torch.empty(2, dtype=torch.int64), torch.empty(2)
    for dtype in FLOATS:
        logits = torch.empty(2, 50257, dtype=dtype)
        inputs = (logits, ids, ids, torch.empty(3, dtype=torch.int32))
        for return_entropy in (False, True):
            arguments = (*inputs, 1.0, -100, return_entropy)
            yield Launch(kept_logprobs.kept_logprobs_fwd, arguments)
        for g, h in ((row, None), (None, row), (row, row)):
            saved = (row, row if h is not None else None, row, row)
            yield Launch(kept_logprobs.kept_logprobs_bwd, (g, h, *inputs, *saved, 1.0, -100))


def _decode_attention() -> Iterator[Launch]:
    def launch(dtype, width, queries=1, prefixes=3, bounds=True, softcap=None):
        query = torch.empty(6, 8, queries, width, dtype=dtype)
        cache = torch.empty(6, 2, 4096, width, dtype=dtype)
        prefix = torch.empty(prefixes, 2, 4096, width, dtype=dtype) if prefixes else None
        row, starts = torch.empty(6, dtype=torch.int32), torch.empty(4, dtype=torch.int32)
        of_prefix = (row[:3], starts) if prefixes and bounds else (None, None)
        of_row = (row, row) if bounds else (None, row)
        arguments = (query, cache, cache, *of_row, prefix, prefix, *of_prefix, 1.0, None, softcap)
        return Launch(decode_attention.decode_attention, arguments)

    # Few queries a head of keys and many, of both kinds of arithmetic, for each block of widths;
    # widths that fill theirs, and one that does not; rows off 16-byte bounds.
    for dtype, widths in zip(FLOATS, ((64, 128, 256), (32, 64, 80, 128, 256), (128,)), strict=True):
        for width in widths:
            yield launch(dtype, width)
            if dtype == torch.bfloat16:
                yield launch(dtype, width, queries=8, prefixes=0)
        if dtype != torch.float16:
            yield launch(dtype, 128, softcap=50.0)
    yield launch(torch.bfloat16, 33, prefixes=1, bounds=False)


def _attention() -> Iterator[Launch]:
    """Each configuration as it is met most, and at its heaviest; float16 is as bfloat16."""
    for dtype in (torch.bfloat16, torch.float32):
        for head_size in (32, 64, 128, 256):
            yield from attention_calls(dtype, head_size)
            yield from attention_calls(dtype, head_size, packed=True, window=77, softcap=3.0)
    for head_size in (64, 128):  # prompts once for their completions
        yield from attention_calls(torch.bfloat16, head_size, packed=True)
    yield from attention_calls(torch.float16, 80, packed=True)
    for head_size in (96, 192):  # less than their blocks are wide
        yield from attention_calls(torch.bfloat16, head_size)
    yield from attention_calls(torch.bfloat16, 128, window=77)
    yield from attention_calls(torch.bfloat16, 128, softcap=3.0)
    yield from attention_calls(torch.bfloat16, 128, padded=True, causal=False)


def attention_calls(
    dtype: torch.dtype,
    head_size: int,
    *,
    packed: bool = False,
    padded: bool = False,
    causal: bool = True,
    window: int | None = None,
    softcap: float | None = None,
    shape: tuple[int, int, int, int, int] = (2, 4, 2, 256, 256),
) -> Iterator[Launch]:
    """Both launchers; shape is (B, Hq, Hkv, T, S), padded a batch whose rows end early."""
    batch, heads, key_heads, T, S = (1, *shape[1:]) if packed else shape
    query = torch.empty(batch, heads, T, head_size, dtype=dtype)
    key = torch.empty(batch, key_heads, S, head_size, dtype=dtype)
    lse = torch.empty(batch, heads, T)
    i32, i64 = torch.empty(T, dtype=torch.int32), torch.empty(T, dtype=torch.int64)
    tables = [torch.empty(3, n, dtype=torch.int32) for n in (2, 5, 7, 4)]
    of_row = (i32, i32) if padded else (None, None)
    of_layout = (i64, i32, tables) if packed else (None, None, [])
    visible = (*of_row, *of_layout, causal, 0.1, window, softcap)
    needs_residue = dtype != torch.float32
    residue = query if needs_residue else query[:0]
    yield Launch(attention.attention_fwd, (query, key, key, *visible, needs_residue))
    saved = (query, lse, query, key, key, query, lse, residue)
    yield Launch(attention.attention_bwd, (*saved, *visible, True, True, True))
