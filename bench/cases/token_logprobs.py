"""Cases of the log-probabilities from logits, and of sampling."""

import torch

from bench.case import Case, Target

CPU, CUDA = ("cpu",), ("cuda",)
BF16 = torch.bfloat16
GRADIENT_MIB = 1024 * 151936 * 4 / 2**20
MEMORY_SLACK_MIB = 2.0  # what the system's own count of resident pages is off by
ENTROPY = {"return_entropy": True}
_TRL, _LIGER, _COMPILED = (
    Target(peer, "ratio", at_least=1, device="cuda") for peer in ("TRL *", "Liger *", "torch.comp*")
)

TOKEN_LOGPROBS = [
    Case(
        "token_logprobs", (1024, 151936), "vocabulary 152k: scoring a batch, with entropy",
        options=ENTROPY,
        targets=(
            Target("TRL *", "ratio", at_least=30),
            Target("torch log_softmax + gather", "ratio", at_least=8),
            Target("torch.compile", "ratio", at_least=2.5),
        ),
    ),
    Case(
        "token_logprobs", (1024, 151936), "vocabulary 152k: a training step, log-prob alone",
        mode="both", in_place=True,
        targets=(
            Target("torch log_softmax + gather", "ratio", at_least=9),
            Target("torch.compile", "ratio", at_least=7),
            Target("fastrl", "extra_memory_mib", at_most=GRADIENT_MIB + MEMORY_SLACK_MIB),
            Target(
                "fastrl inplace_backward", "extra_memory_mib", at_most=MEMORY_SLACK_MIB
            ),
        ),
    ),
    Case(
        "token_logprobs", (128, 151936), "some rows of it: what a quick look at the speed needs",
        options=ENTROPY, quick=True, devices=CPU,
    ),
    Case(
        "token_logprobs", (128, 151936), "the same in micro-batches: a smaller gradient buffer",
        mode="both", in_place=True, quick=True, devices=CPU,
    ),
    Case(
        "token_logprobs", (8, 151936), "decoding: fewer rows than blocks to share among threads",
        options=ENTROPY, quick=True, devices=CPU,
    ),
    Case(
        "token_logprobs", (1024, 151936), "the same in bfloat16, as models give it",
        dtype=BF16, options=ENTROPY, devices=CPU,
        targets=(Target("torch log_softmax + gather in 16 bits", "ratio", at_least=4),),
    ),
    Case(
        "token_logprobs", (512, 128256), "vocabulary 128k in the dtype that models give",
        dtype=BF16, options=ENTROPY,
    ),
    Case(
        "token_logprobs", (1024, 32000), "vocabulary 32k in bfloat16: a training step",
        dtype=BF16, mode="both", options=ENTROPY,
    ),
    Case(
        "token_logprobs", (1024, 32000), "the backward pass by itself", mode="backward",
    ),
    Case(
        "token_logprobs", (128, 256000), "vocabulary 256k: the longest rows in use",
        options=ENTROPY,
    ),
    Case(
        "token_logprobs", (511, 50257), "odd vocabulary: no row but the first is aligned",
        mode="both",
    ),
    Case(
        "token_logprobs", (2048, 2048), "a small vocabulary: short rows, an actor-critic step",
        mode="both", options=ENTROPY,
    ),
    Case(
        "token_logprobs", (8192, 151936), "vocabulary 152k, a GPU's batch: scoring, with entropy",
        dtype=BF16, options=ENTROPY, devices=CUDA, quick=True,
        targets=(
            Target("fastrl", "share_of_ceiling", at_least=0.9, device="cuda"),
            _TRL, _LIGER, _COMPILED,
        ),
    ),
    Case(
        "token_logprobs", (8192, 151936), "the same: a training step", dtype=BF16, mode="both",
        options=ENTROPY, in_place=True, devices=CUDA, quick=True,
        targets=(
            Target("fastrl", "share_of_ceiling", at_least=0.85, device="cuda"), _TRL, _COMPILED,
        ),
    ),
    Case(
        "token_logprobs", (8192, 151936), "a training step without entropy, as Liger has it",
        dtype=BF16, mode="both", devices=CUDA, quick=True, targets=(_TRL, _LIGER, _COMPILED),
    ),
    Case(
        "token_logprobs", (8191, 50257), "odd rows and vocabulary: nothing is aligned",
        dtype=BF16, mode="both", devices=CUDA,
    ),
    Case(
        "token_logprobs", (64, 151936), "decoding: fewer rows than multiprocessors",
        dtype=BF16, options=ENTROPY, devices=CUDA, quick=True,
    ),
    Case(
        "token_logprobs", (1, 151936), "a single row: the vocabulary is split over programs",
        dtype=BF16, options=ENTROPY, devices=CUDA,
    ),
]  # fmt: skip

SAMPLE_TOKENS = [
    Case(
        "sample_tokens", (64, 2048), "a small vocabulary: one step of a batch of rollouts",
        inputs=("seeds",), quick=True,
    ),
    Case(
        "sample_tokens", (64, 32000), "vocabulary 32k at a temperature",
        inputs=("seeds",), options={"temperature": 0.7},
    ),
    Case(
        "sample_tokens", (8, 151936), "vocabulary 152k with top_k and top_p, without a sort",
        inputs=("seeds",), options={"top_k": 50, "top_p": 0.9},
    ),
    Case(
        "sample_tokens", (64, 151936), "vocabulary 152k: one step of a batch of rollouts",
        inputs=("seeds",), quick=True,
        targets=(Target("torch multinomial, no log-prob", "ratio", at_least=5),),
    ),
    Case(
        "sample_tokens", (64, 151936), "the same with top_p alone: others sort",
        inputs=("seeds",), options={"top_p": 0.9},
    ),
    Case(
        "sample_tokens", (64, 151936), "decoding on a GPU", inputs=("seeds",), dtype=BF16,
        options={"temperature": 0.7, "top_k": 50, "top_p": 0.9}, devices=CUDA, quick=True,
    ),
]  # fmt: skip

CASES = {"token_logprobs": TOKEN_LOGPROBS, "sample_tokens": SAMPLE_TOKENS}
