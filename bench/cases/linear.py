"""Cases of the log-probabilities from hidden states: (rows, D, V)."""

import torch

from bench.case import Case

BF16 = torch.bfloat16
CPU, CUDA = ("cpu",), ("cuda",)
_ENTROPY = {"return_entropy": True}

LINEAR_TOKEN_LOGPROBS = [
    Case(
        "linear_token_logprobs", (512, 896, 151936), "vocabulary 152k, a small model: scoring",
        devices=CPU, options=_ENTROPY,
    ),
    Case(
        "linear_token_logprobs", (512, 896, 151936), "the same: a training step",
        devices=CPU, mode="both",
    ),
    Case(
        "linear_token_logprobs", (64, 256, 8192), "a tiny model: what slicing costs",
        devices=CPU, mode="both", quick=True,
    ),
    Case(
        "linear_token_logprobs", (127, 640, 50257), "odd rows and vocabulary, softcap",
        options={"softcap": 30.0, **_ENTROPY},
    ),
    Case(
        "linear_token_logprobs", (8192, 4096, 131072), "the size that other kernels quote",
        devices=CUDA, dtype=BF16, options=_ENTROPY, quick=True,
    ),
    Case(
        "linear_token_logprobs", (8192, 4096, 131072), "the same: a training step with entropy",
        devices=CUDA, dtype=BF16, mode="both", options=_ENTROPY, quick=True,
    ),
    Case(
        "linear_token_logprobs", (4096, 2304, 256000), "vocabulary 256k with softcap, as Gemma 2",
        devices=CUDA, dtype=BF16, mode="both", options={"softcap": 30.0},
    ),
    Case(
        "linear_token_logprobs", (64, 4096, 131072), "decoding: the weight alone is the traffic",
        devices=CUDA, dtype=BF16, options=_ENTROPY,
    ),
]  # fmt: skip

LINEAR_TOKEN_LOSS = [
    Case(
        "linear_token_loss", (512, 896, 151936), "vocabulary 152k, a small model",
        devices=CPU, mode="both",
    ),
    Case(
        "linear_token_loss", (64, 256, 8192), "a tiny model: what slicing costs",
        devices=CPU, mode="both", quick=True,
    ),
    Case(
        "linear_token_loss", (8192, 4096, 131072), "the size that other kernels quote",
        devices=CUDA, dtype=BF16, mode="both", quick=True,
    ),
]  # fmt: skip

CASES = {
    "linear_token_logprobs": LINEAR_TOKEN_LOGPROBS,
    "linear_token_loss": LINEAR_TOKEN_LOSS,
}
