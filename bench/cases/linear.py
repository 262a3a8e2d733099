"""Cases of the log-probabilities and statistics from hidden states: (rows, D, V)."""

import torch

from bench.case import Case, Target

BF16 = torch.bfloat16
CPU, CUDA = ("cpu",), ("cuda",)
_ENTROPY = {"return_entropy": True}
# What eager holds beside the gradients of 512 rows: logits, log-probs and their gradient.
_GRADIENTS_MIB = (151936 + 512) * 896 * 4 / 2**20
_EAGER_MIB = 3 * 512 * 151936 * 4 / 2**20
_EAGER = "torch linear + log_softmax*"
# Of 8192 rows on a GPU: the gradients in bfloat16, the weight's in float32, and 1.2 GB.
_ON_A_GPU_MIB = ((8192 + 131072) * 4096 * 2 + 131072 * 4096 * 4 + 1.2e9) / 2**20
_LITTLE_MEMORY = Target("fastrl", "extra_memory_mib", at_most=_ON_A_GPU_MIB, device="cuda")

LINEAR_TOKEN_LOGPROBS = [
    Case(
        "linear_token_logprobs", (512, 896, 151936), "vocabulary 152k, a small model: scoring",
        devices=CPU, options=_ENTROPY,
        targets=(Target("fastrl", "share_of_ceiling", at_least=1 / 1.06),),
    ),
    Case(
        "linear_token_logprobs", (512, 896, 151936), "the same: a training step",
        devices=CPU, mode="both",
        targets=(
            Target(_EAGER, "ratio", at_least=1 / 1.3),
            Target("TRL *", "ratio", at_least=1.6),
            Target("fastrl", "extra_memory_mib", at_most=_GRADIENTS_MIB + 0.05 * _EAGER_MIB),
        ),
    ),
    Case(
        "linear_token_logprobs", (512, 896, 151936), "the same with entropy, as TRL's GRPO asks",
        devices=CPU, mode="both", options=_ENTROPY,
        targets=(Target("TRL *", "ratio", at_least=1.6),),
    ),
    Case(
        "linear_token_logprobs", (512, 896, 151936), "the same with LoRA: the head is frozen",
        devices=CPU, mode="both", frozen=("weight",),
        targets=(Target(_EAGER, "ratio", at_least=1.0),),
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
        targets=(
            Target("fastrl", "time_us", at_most=50e3, device="cuda"),
            # Four products where three are counted.
            Target("fastrl", "share_of_ceiling", at_least=0.88 * 3 / 4, device="cuda"),
            _LITTLE_MEMORY,
        ),
    ),
    Case(
        "linear_token_logprobs", (8192, 4096, 131072), "the same with LoRA: the head is frozen",
        devices=CUDA, dtype=BF16, mode="both", frozen=("weight",),
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
        targets=(
            Target(_EAGER, "ratio", at_least=1 / 1.06),
            Target("fastrl", "extra_memory_mib", at_most=_GRADIENTS_MIB + 0.2 * _EAGER_MIB),
        ),
    ),
    Case(
        "linear_token_loss", (64, 256, 8192), "a tiny model: what slicing costs",
        devices=CPU, mode="both", quick=True,
    ),
    Case(
        "linear_token_loss", (8192, 4096, 131072), "the size that other kernels quote",
        devices=CUDA, dtype=BF16, mode="both", quick=True,
        targets=(Target("fastrl", "time_us", at_most=38e3, device="cuda"), _LITTLE_MEMORY),
    ),
]  # fmt: skip

TOKEN_STATS = [
    Case("token_stats", (512, 896, 151936), "vocabulary 152k: what a trainer logs", devices=CPU),
    Case("token_stats", (64, 256, 8192), "a tiny model", devices=CPU, quick=True),
    Case(
        "token_stats", (8192, 4096, 131072), "a GPU's batch", devices=CUDA, dtype=BF16, quick=True,
    ),
]  # fmt: skip

CASES = {
    "linear_token_logprobs": LINEAR_TOKEN_LOGPROBS,
    "linear_token_loss": LINEAR_TOKEN_LOSS,
    "token_stats": TOKEN_STATS,
}
