"""Cases of attention: (B, Hq, Hkv, T, S, D)."""

import torch

from bench.case import Case, Target

BF16 = torch.bfloat16
CPU, CUDA = ("cpu",), ("cuda",)
_FLASH, _COPIES, _FLEX = "torch SDPA, flash", "torch SDPA, a copy *", "torch FlexAttention"


def _beats(peer: str, ratio: float, device: str = "cuda") -> Target:
    return Target(peer, "ratio", at_least=ratio, device=device)


_SMALL = [
    Case(
        "attention", (2, 8, 8, 1024, 1024, 64), "dense and causal: scoring a batch", devices=CPU,
        targets=(_beats(_FLASH, 1 / 1.1, "cpu"),),
    ),
    Case(
        "attention", (2, 8, 2, 1024, 1024, 64), "grouped queries: a training step",
        devices=CPU, mode="both", targets=(_beats(_FLASH, 1 / 1.1, "cpu"),),
    ),
    Case(
        "attention", (1, 8, 8, 2560, 2560, 64), "a prompt with its completions: scoring",
        devices=CPU, layout="512 + 16 x 128",
    ),
    Case(
        "attention", (1, 8, 8, 2560, 2560, 64), "the same: a training step",
        devices=CPU, mode="both", layout="512 + 16 x 128",
        targets=(_beats(_COPIES, 3.5, "cpu"),),
    ),
    Case(
        "attention", (1, 8, 2, 384, 384, 64), "a small group: what a call costs",
        devices=CPU, layout="128 + 4 x 64", quick=True,
    ),
    Case(
        "attention", (1, 8, 2, 1979, 1979, 64), "two groups, ragged completions",
        devices=CPU, layout="300 + 8 x 16..240, 144 + 4 x 64..192",
    ),
    Case(
        "attention", (1, 8, 2, 2048, 2048, 64), "a window, as in Mistral and Gemma",
        devices=CPU, options={"window": 256},
    ),
    Case(
        "attention", (1, 4, 4, 777, 777, 80), "odd length and head size, softcap",
        options={"softcap": 50.0},
    ),
    Case(
        "attention", (2, 8, 8, 512, 512, 64), "not causal: the encoder of a translation model",
        devices=CPU, options={"causal": False},
    ),
    Case(
        "attention", (16, 8, 2, 1, 4096, 64), "decoding: a token against a long cache, ragged",
        devices=CPU, inputs=("key_end",),
    ),
]  # fmt: skip

_LARGE = [
    Case(
        "attention", (4, 48, 48, 4096, 4096, 128), "the size that FlashAttention-3 quotes",
        devices=CUDA, dtype=BF16, quick=True, targets=(_beats(_FLASH, 1.15), _beats(_FLEX, 1)),
    ),
    Case(
        "attention", (4, 48, 48, 4096, 4096, 128), "the same: a training step",
        devices=CUDA, dtype=BF16, mode="both", quick=True,
        targets=(_beats(_FLASH, 1.15), _beats(_FLEX, 1)),
    ),
    Case(
        "attention", (16, 32, 8, 1024, 1024, 128), "short rows: a training step",
        devices=CUDA, dtype=BF16, mode="both", targets=(_beats(_FLASH, 1.15), _beats(_FLEX, 1)),
    ),
    Case(
        "attention", (1, 32, 8, 16384, 16384, 128), "a long row: a training step",
        devices=CUDA, dtype=BF16, mode="both", targets=(_beats(_FLASH, 1.15), _beats(_FLEX, 1)),
    ),
    Case(
        "attention", (1, 48, 48, 32765, 32765, 128), "ragged rows, nothing shared, nothing padded",
        devices=CUDA, dtype=BF16, mode="both", layout="8 x 2048..6144",
        targets=(_beats(_FLEX, 1),),
    ),
    Case(
        "attention", (1, 32, 8, 20473, 20473, 128), "ragged completions: a training step",
        devices=CUDA, dtype=BF16, mode="both", layout="4096 + 16 x 512..1536",
        targets=(_beats(_COPIES, 2.8), _beats(_FLEX, 1.2)),
    ),
    Case(
        "attention", (1, 32, 8, 20480, 20480, 128), "a group of 16 on a long prompt: scoring",
        devices=CUDA, dtype=BF16, layout="4096 + 16 x 1024", quick=True,
    ),
    Case(
        "attention", (1, 32, 8, 20480, 20480, 128), "the same: a training step",
        devices=CUDA, dtype=BF16, mode="both", layout="4096 + 16 x 1024", quick=True,
        targets=(_beats(_COPIES, 2.8), _beats(_FLEX, 1.2)),
    ),
    Case(
        "attention", (1, 32, 8, 33792, 33792, 128), "a group of 64: a training step",
        devices=CUDA, dtype=BF16, mode="both", layout="1024 + 64 x 512",
        targets=(_beats(_COPIES, 2), _beats(_FLEX, 1.2)),
    ),
    Case(
        "attention", (1, 32, 8, 8192, 8192, 128), "a window, as in Mistral and Gemma",
        devices=CUDA, dtype=BF16, mode="both", options={"window": 1024},
    ),
    Case(
        "attention", (64, 32, 8, 1, 8192, 128), "decoding: a token against a long cache, ragged",
        devices=CUDA, dtype=BF16, inputs=("key_end",), quick=True,
    ),
    Case(
        "attention", (2, 16, 16, 2048, 2048, 64), "float32 that stays float32", devices=CUDA,
    ),
]  # fmt: skip

CASES = {"attention": _SMALL + _LARGE}
