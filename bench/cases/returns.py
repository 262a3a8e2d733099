"""Cases of the returns and advantages."""

from bench.case import Case, Target

_DISCOUNTS = {"gamma": 0.99, "gae_lambda": 0.95}
_EPISODES = ("next_values", "terminated")

GAE = [
    Case(
        "gae", (512, 4096), "many environments: the size that other libraries quote",
        inputs=_EPISODES, options=_DISCOUNTS,
        targets=(
            Target("torchrl *", "ratio", at_least=30),
            Target("numba *", "ratio", at_least=2),
            Target("fastrl", "share_of_ceiling", at_least=0.6),
        ),
    ),
    Case(
        "gae", (8, 16), "next to no work: what a call costs",
        inputs=_EPISODES, options=_DISCOUNTS, quick=True,
        targets=(
            Target("fastrl", "time_us", at_most=15),
            Target("fastrl", "time_us", at_most=12, device="cuda"),
        ),
    ),
    Case(
        "gae", (64, 1024), "a batch of completions with a value per token",
        inputs=("bootstrap_value",), options=_DISCOUNTS, quick=True,
    ),
    Case(
        "gae", (4096, 128), "many short rows",
        inputs=_EPISODES, options=_DISCOUNTS,
        targets=(Target("fastrl.reference", "ratio", at_least=5),),
    ),
    Case(
        "gae", (1024, 1024), "a million steps in many rows, beside the next case",
        inputs=_EPISODES, options=_DISCOUNTS,
    ),
    Case(
        "gae", (1, 1048576), "a million steps in one row: blocks of it side by side",
        inputs=_EPISODES, options=_DISCOUNTS, quick="cuda",
        targets=(Target("fastrl", "share_of_ceiling", at_least=0.3, device="cuda"),),
    ),
    Case(
        "gae", (8192, 2048), "fills a GPU",
        inputs=_EPISODES, options=_DISCOUNTS, devices=("cuda",), quick=True,
        targets=(Target("fastrl", "share_of_ceiling", at_least=0.8, device="cuda"),),
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
        "gae", (256, 1024), "as many tokens as the case before, in even rows",
        inputs=("bootstrap_value",), options=_DISCOUNTS,
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
        inputs=("bootstrap_value",), options=_DISCOUNTS, quick="cpu",
    ),
    Case(
        "lambda_returns", (262144,), "ragged completions of 1 to 2048 tokens, packed",
        inputs=("cu_seqlens", "bootstrap_value"), options=_DISCOUNTS,
    ),
    Case(
        "lambda_returns", (8192, 2048), "fills a GPU",
        inputs=("bootstrap_value", "terminated"), options=_DISCOUNTS, devices=("cuda",), quick=True,
    ),
]  # fmt: skip

DISCOUNTED_RETURNS = [
    Case(
        "discounted_returns", (512, 4096), "the least work per byte of the returns",
        options={"gamma": 0.99},
    ),
    Case(
        "discounted_returns", (64, 1024), "reward-to-go of a batch of completions",
        options={"gamma": 0.99}, quick="cpu",
    ),
    Case(
        "discounted_returns", (262144,), "ragged completions of 1 to 2048 tokens, packed",
        inputs=("cu_seqlens",), options={"gamma": 0.99},
    ),
    Case(
        "discounted_returns", (8192, 2048), "fills a GPU",
        options={"gamma": 0.99}, devices=("cuda",), quick=True,
    ),
]  # fmt: skip

VTRACE = [
    Case(
        "vtrace", (64, 1024), "a batch of completions from a policy that is some updates older",
        inputs=("bootstrap_value",), options={"gamma": 0.99}, quick="cpu",
    ),
    Case(
        "vtrace", (512, 4096), "beside gae of that size: one input more, and an exp",
        inputs=_EPISODES, options={"gamma": 0.99},
    ),
    Case(
        "vtrace", (64, 512), "differentiated through, the ratio included",
        mode="both", inputs=("bootstrap_value",), options={"gamma": 0.99},
    ),
    Case(
        "vtrace", (8, 16384), "long T, few rows",
        inputs=_EPISODES, options={"gamma": 0.99},
    ),
    Case(
        "vtrace", (8192, 2048), "fills a GPU",
        inputs=_EPISODES, options={"gamma": 0.99}, devices=("cuda",), quick=True,
    ),
]  # fmt: skip

RETRACE_RETURNS = [
    Case(
        "retrace_returns", (64, 1024), "a batch of completions, action values",
        inputs=("bootstrap_value",), options=_DISCOUNTS, quick="cpu",
    ),
    Case(
        "retrace_returns", (8192, 2048), "fills a GPU",
        inputs=_EPISODES, options=_DISCOUNTS, devices=("cuda",), quick=True,
    ),
]  # fmt: skip

N_STEP_RETURNS = [
    Case(
        "n_step_returns", (512, 4096), "beside gae of that size",
        inputs=_EPISODES, options={"gamma": 0.99, "n": 8},
    ),
    Case(
        "n_step_returns", (64, 1024), "a batch of completions, the next 8 rewards",
        inputs=("bootstrap_value",), options={"gamma": 0.99, "n": 8}, quick="cpu",
    ),
    Case(
        "n_step_returns", (8192, 2048), "fills a GPU",
        inputs=_EPISODES, options={"gamma": 0.99, "n": 8}, devices=("cuda",), quick=True,
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
