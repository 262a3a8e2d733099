"""Cases of the returns and advantages."""

from bench.case import Case, Target

_DISCOUNTS = {"gamma": 0.99, "gae_lambda": 0.95}
_EPISODES = ("next_values", "terminated")

GAE = [
    Case(
        "gae", (512, 4096), "many environments: the size that other libraries quote",
        inputs=_EPISODES, options=_DISCOUNTS,
        targets=(
            Target("torchrl *", "ratio", at_least=25),
            Target("numba *", "ratio", at_least=1.5),
            Target("fastrl", "share_of_ceiling", at_least=0.5),
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

VTRACE = [
    Case(
        "vtrace", (64, 1024), "a batch of completions from a policy that is some updates older",
        inputs=("bootstrap_value",), options={"gamma": 0.99}, quick=True,
    ),
    Case(
        "vtrace", (8, 16384), "long T, few rows",
        inputs=_EPISODES, options={"gamma": 0.99},
    ),
]  # fmt: skip

RETRACE_RETURNS = [
    Case(
        "retrace_returns", (64, 1024), "a batch of completions, action values",
        inputs=("bootstrap_value",), options=_DISCOUNTS, quick=True,
    ),
]  # fmt: skip

N_STEP_RETURNS = [
    Case(
        "n_step_returns", (64, 1024), "a batch of completions, the next 8 rewards",
        inputs=("bootstrap_value",), options={"gamma": 0.99, "n": 8}, quick=True,
    ),
]  # fmt: skip

CASES = {
    "gae": GAE,
    "lambda_returns": LAMBDA_RETURNS,
    "discounted_returns": DISCOUNTED_RETURNS,
    "vtrace": VTRACE,
    "retrace_returns": RETRACE_RETURNS,
    "n_step_returns": N_STEP_RETURNS,
}
