"""The cases of every op, each with the reason why it is here. The only place that lists them."""

import torch

from bench.case import Case, Target

BF16 = torch.bfloat16
GRADIENT_MIB = 1024 * 151936 * 4 / 2**20
MEMORY_SLACK_MIB = 2.0  # what the system's own count of resident pages is off by

_DISCOUNTS = {"gamma": 0.99, "gae_lambda": 0.95}
_ENTROPY = {"return_entropy": True}
_EPISODES = ("next_values", "terminated")

GAE = [
    Case(
        "gae", (512, 4096), "many environments: the size that other libraries quote",
        inputs=_EPISODES, options=_DISCOUNTS, quick=True,
        targets=(
            Target("torchrl *", "ratio", at_least=25),
            Target("numba *", "ratio", at_least=1.5),
            Target("fastrl", "share_of_copy", at_least=0.5),
        ),
    ),
    Case(
        "gae", (1, 8), "next to no work: what a call costs",
        inputs=_EPISODES, options=_DISCOUNTS, quick=True,
        targets=(Target("fastrl", "time_us", at_most=15),),
    ),
    Case(
        "gae", (64, 1024), "a batch of completions with a value per token",
        inputs=("bootstrap_value",), options=_DISCOUNTS, quick=True,
    ),
    Case(
        "gae", (512, 1023), "odd T, and a mask: rows unaligned, tool tokens carried over",
        inputs=("bootstrap_value", "mask"), options=_DISCOUNTS,
    ),
    Case(
        "gae", (8, 16384), "long T, few rows: little to share among threads",
        inputs=_EPISODES, options=_DISCOUNTS,
    ),
    Case(
        "gae", (262144,), "ragged completions of 1 to 2048 tokens, packed",
        inputs=("cu_seqlens", "bootstrap_value"), options=_DISCOUNTS,
    ),
    Case(
        "gae", (64, 512), "differentiated through, as in meta-gradients",
        mode="both", inputs=("bootstrap_value",), options=_DISCOUNTS,
    ),
]  # fmt: skip

LAMBDA_RETURNS = [
    Case(
        "lambda_returns", (512, 4096), "beside gae: one output instead of two",
        inputs=("bootstrap_value", "terminated"), options=_DISCOUNTS,
    ),
    Case(
        "lambda_returns", (64, 1024), "a batch of completions",
        inputs=("bootstrap_value",), options=_DISCOUNTS, quick=True,
    ),
    Case(
        "lambda_returns", (262144,), "ragged completions of 1 to 2048 tokens, packed",
        inputs=("cu_seqlens", "bootstrap_value"), options=_DISCOUNTS,
    ),
]  # fmt: skip

DISCOUNTED_RETURNS = [
    Case(
        "discounted_returns", (512, 4096), "the least work per byte of the returns",
        options={"gamma": 0.99},
    ),
    Case(
        "discounted_returns", (64, 1024), "reward-to-go of a batch of completions",
        options={"gamma": 0.99}, quick=True,
    ),
    Case(
        "discounted_returns", (262144,), "ragged completions of 1 to 2048 tokens, packed",
        inputs=("cu_seqlens",), options={"gamma": 0.99},
    ),
]  # fmt: skip

TOKEN_LOGPROBS = [
    Case(
        "token_logprobs", (1024, 151936), "vocabulary 152k: scoring a batch, with entropy",
        options=_ENTROPY, quick=True,
        targets=(
            Target("TRL *", "ratio", at_least=25),
            Target("torch log_softmax*", "ratio", at_least=7),
        ),
    ),
    Case(
        "token_logprobs", (1024, 151936), "vocabulary 152k: a training step, log-prob alone",
        mode="both", in_place=True,
        targets=(
            Target("torch log_softmax*", "ratio", at_least=8),
            Target("fastrl", "extra_memory_mib", at_most=GRADIENT_MIB + MEMORY_SLACK_MIB),
            Target(
                "fastrl inplace_backward", "extra_memory_mib", at_most=MEMORY_SLACK_MIB
            ),
        ),
    ),
    Case(
        "token_logprobs", (256, 151936), "the same in micro-batches: a smaller gradient buffer",
        mode="both", in_place=True, quick=True,
    ),
    Case(
        "token_logprobs", (8, 151936), "decoding: fewer rows than blocks to share among threads",
        options=_ENTROPY, quick=True,
    ),
    Case(
        "token_logprobs", (512, 128256), "vocabulary 128k in the dtype that models give",
        dtype=BF16, options=_ENTROPY,
    ),
    Case(
        "token_logprobs", (1024, 32000), "vocabulary 32k in bfloat16: a training step",
        dtype=BF16, mode="both", options=_ENTROPY,
    ),
    Case(
        "token_logprobs", (1024, 32000), "the backward pass by itself", mode="backward",
    ),
    Case(
        "token_logprobs", (128, 256000), "vocabulary 256k: the longest rows in use",
        options=_ENTROPY,
    ),
    Case(
        "token_logprobs", (511, 50257), "odd vocabulary: no row but the first is aligned",
        mode="both",
    ),
    Case(
        "token_logprobs", (2048, 2048), "a small vocabulary: short rows, an actor-critic step",
        mode="both", options=_ENTROPY,
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
        "sample_tokens", (8, 151936), "vocabulary 152k with top_k and top_p: a sort, today",
        inputs=("seeds",), options={"top_k": 50, "top_p": 0.9},
    ),
]  # fmt: skip

CASES: dict[str, list[Case]] = {
    "gae": GAE,
    "lambda_returns": LAMBDA_RETURNS,
    "discounted_returns": DISCOUNTED_RETURNS,
    "token_logprobs": TOKEN_LOGPROBS,
    "sample_tokens": SAMPLE_TOKENS,
}


def select(ops: list[str], *, quick: bool = False) -> list[Case]:
    """The cases of these ops (none named: of all), in the order of the lists."""
    chosen = ops or list(CASES)
    unknown = [op for op in chosen if op not in CASES]
    if unknown:
        raise ValueError(
            f"bench: expected op in {', '.join(CASES)}, got {unknown[0]}. Name one of these, "
            "or none for all."
        )
    return [case for op in chosen for case in CASES[op] if case.quick or not quick]
