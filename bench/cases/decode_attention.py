"""Cases of decode_attention: (B, Hq, Hkv, T, S, D). layout "256 + 16 x 32..96": a prompt of 256 for
each 16 rows; over the batch the rows' own keys rise from 32 to 96 of the S that their caches hold.
"2048..4096": no prompt."""

import torch

from bench.case import Case, Target

BF16 = torch.bfloat16
CPU, CUDA = ("cpu",), ("cuda",)
_OP = "decode_attention"

_SMALL = [
    Case(
        _OP, (64, 8, 2, 1, 128, 64), "4 prompts, 16 completions each: a step of sampling",
        devices=CPU, layout="256 + 16 x 32..96", quick=True,
        targets=(Target("torch SDPA, a copy of the prompt each", "ratio", at_least=2.0),),
    ),
    Case(
        _OP, (64, 8, 2, 1, 128, 64), "one prompt, longer, for all rows",
        devices=CPU, layout="1024 + 64 x 32..96",
        targets=(Target("torch SDPA, a copy of the prompt each", "ratio", at_least=2.0),),
    ),
    Case(
        _OP, (64, 8, 2, 1, 128, 64), "the first of these in 16 bits",
        devices=CPU, dtype=BF16, layout="256 + 16 x 32..96",
    ),
    Case(
        _OP, (16, 8, 2, 1, 4096, 64), "long caches without a prompt, ragged",
        devices=CPU, layout="2048..4096",
    ),
    Case(
        _OP, (2, 8, 2, 1, 16, 64), "two rows with little to do: what a call costs",
        devices=CPU, layout="30 + 2 x 5..9",
    ),
    Case(
        _OP, (16, 8, 2, 4, 256, 80), "four tokens a row, an odd head size, window and softcap",
        devices=CPU, layout="300 + 8 x 60..200", options={"window": 256, "softcap": 50.0},
    ),
]  # fmt: skip

_LARGE = [
    Case(
        _OP, (256, 32, 8, 1, 1024, 128), "16 prompts, 16 completions each: a step of sampling",
        devices=CUDA, dtype=BF16, layout="2048 + 16 x 512..1024", quick=True,
    ),
    Case(
        _OP, (64, 32, 8, 1, 1024, 128), "one prompt for all rows",
        devices=CUDA, dtype=BF16, layout="4096 + 64 x 256..768", quick=True,
    ),
    Case(
        _OP, (64, 32, 8, 1, 8192, 128), "long caches without a prompt, ragged",
        devices=CUDA, dtype=BF16, layout="4096..8192", quick=True,
    ),
    Case(
        _OP, (1, 32, 8, 1, 32768, 128), "a single row: nothing but its keys to share out",
        devices=CUDA, dtype=BF16, layout="32768..32768",
    ),
    Case(_OP, (64, 16, 4, 1, 2048, 64), "float32", devices=CUDA, layout="1024 + 16 x 512..2048"),
]  # fmt: skip

CASES = {_OP: _SMALL + _LARGE}
