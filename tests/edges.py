"""A row small enough to be worked out by hand, for what happens to returns at each edge.

One row of three steps, with gamma = lambda = 0.5 and n = 2 unless a case says otherwise:

    rewards r 1, 2, 4    values v 2, 4, 8    q_values q 1, 4, 2    ratio 0.5, 4, 1
    rho = min(2, ratio) = 0.5, 2, 1          w = lambda min(1, ratio) = 0.25, 0.5, 0.5

In the comments v' is the value after a step, td = r + gamma v' - v, and
    A = td + gamma lambda A'                            gae; its returns are A + v
    e = rho td + gamma w e',  P = rho (td + gamma lambda e')    vtrace; its targets are e + v
    G = r + gamma v' + gamma w' (G' - q')               retrace
"""

import pytest
import torch

import fastrl
from fastrl import reference

INPUTS = {
    "discounted_returns": ["rewards"],
    "gae": ["rewards", "values"],
    "lambda_returns": ["rewards", "values"],
    "vtrace": ["rewards", "values", "log_ratio"],
    "retrace_returns": ["rewards", "values", "q_values", "log_ratio"],
    "n_step_returns": ["rewards", "values"],
}
OPTIONS = {
    "discounted_returns": {},
    "gae": {"gae_lambda": 0.5},
    "lambda_returns": {"gae_lambda": 0.5},
    "vtrace": {"gae_lambda": 0.5, "rho_clip": 2.0, "c_clip": 1.0},
    "retrace_returns": {"gae_lambda": 0.5, "c_clip": 1.0},
    "n_step_returns": {"n": 2},
}
ROW = {
    "rewards": [1.0, 2.0, 4.0],
    "values": [2.0, 4.0, 8.0],
    "q_values": [1.0, 4.0, 2.0],
    "ratio": [0.5, 4.0, 1.0],
}


def everywhere(test):
    test = pytest.mark.parametrize("op", INPUTS)(test)
    spaces = [fastrl.ops, reference]
    return pytest.mark.parametrize("space", spaces, ids=["ops", "reference"])(test)


def call(space, op, row=ROW, **given):
    """The op's outputs as a list of tensors; lists become tensors, bool where all entries are."""
    row = {k: torch.tensor(v) for k, v in row.items()}
    row["log_ratio"] = row.pop("ratio").log()
    options = {"gamma": 0.5} | OPTIONS[op] | given
    if "gae_lambda" not in OPTIONS[op]:
        options.pop("gae_lambda", None)
    for name, x in options.items():
        if isinstance(x, list) or name == "bootstrap_value":
            options[name] = torch.tensor(x, dtype=torch.int32 if name == "cu_seqlens" else None)
    out = getattr(space, op)(*(row[name] for name in INPUTS[op]), **options)
    return list(out) if isinstance(out, tuple) else [out]


def check(space, op, expected, row=ROW, **given):
    """expected: per op a list of numbers, or the two lists of its two outputs; lambda_returns are
    the second of gae. Steps behind the end of a list are not looked at."""
    wanted = expected["gae"][1] if op == "lambda_returns" else expected[op]
    wanted = list(wanted) if isinstance(wanted, tuple) else [wanted]
    outputs = call(space, op, row, **given)
    assert len(outputs) == len(wanted)
    # exp(log 4) need not be 4; where no ratio is taken, every number is exact
    tolerance = 1e-6 if "log_ratio" in INPUTS[op] else 0.0
    for got, numbers in zip(outputs, map(torch.tensor, wanted), strict=True):
        got = got[..., : numbers.shape[-1]]
        torch.testing.assert_close(got, numbers, rtol=tolerance, atol=tolerance)
    return outputs


def per_output(expected, change):
    """The same change to each list of numbers."""
    return {
        op: tuple(map(change, x)) if isinstance(x, tuple) else change(x)
        for op, x in expected.items()
    }


# v' = 4, 8, 0: td 1, 2, -4. A: -4, 2 - 4/4 = 1, 1 + 1/4. e: -4, 2 * 2 - 4/4 = 3, 1/2 + 3/8.
# P: -4, 2 (2 - 4/4) = 2, (1 + 3/4) / 2. G: 4, 2 + 4 + (4 - 2) / 4 = 6.5, 3 + (6.5 - 4) / 4.
# n = 2: 4, 2 + 4/2, 1 + (2 + 8/2) / 2.
NOTHING_FOLLOWS = {
    "discounted_returns": [3.0, 4.0, 4.0],
    "gae": ([1.25, 1.0, -4.0], [3.25, 5.0, 4.0]),
    "vtrace": ([0.875, 2.0, -4.0], [2.875, 7.0, 4.0]),
    "retrace_returns": [3.625, 6.5, 4.0],
    "n_step_returns": [4.0, 4.0, 4.0],
}
# v' = 4, 8, 16: td 1, 2, 4. A: 4, 2 + 4/4 = 3, 1 + 3/4. e: 4, 4 + 4/4 = 5, 1/2 + 5/8.
# P: 4, 2 (2 + 4/4), (1 + 5/4) / 2. G: 4 + 8 = 12, 6 + (12 - 2) / 4 = 8.5, 3 + (8.5 - 4) / 4.
# n = 2: 12, 2 + 12/2, 1 + 6/2.
SIXTEEN_FOLLOWS = {
    "discounted_returns": [5.0, 8.0, 12.0],
    "gae": ([1.75, 3.0, 4.0], [3.75, 7.0, 12.0]),
    "vtrace": ([1.125, 6.0, 4.0], [3.125, 9.0, 12.0]),
    "retrace_returns": [4.125, 8.5, 12.0],
    "n_step_returns": [4.0, 8.0, 12.0],
}
# The episode ends with step 1, 16 follows the row. td 1, 2 - 4 = -2, 4. A: 4, -2, 1 - 2/4.
# e: 4, 2 * -2 = -4, 1/2 - 4/8 = 0. P: 4, 2 * -2, (1 - 4/4) / 2. G: 12, 2, 3 + (2 - 4) / 4.
# n = 2: 12, 2, 1 + 2/2.
TERMINATED = {
    "discounted_returns": [2.0, 2.0, 12.0],
    "gae": ([0.5, -2.0, 4.0], [2.5, 2.0, 12.0]),
    "vtrace": ([0.0, -4.0, 4.0], [2.0, 0.0, 12.0]),
    "retrace_returns": [2.5, 2.0, 12.0],
    "n_step_returns": [2.0, 2.0, 12.0],
}
# Step 1 is cut off where the state is worth 32. td 1, 2 + 16 - 4 = 14, 4. A: 4, 14, 1 + 14/4.
# e: 4, 28, 1/2 + 28/8 = 4. P: 4, 28, (1 + 28/4) / 2. G: 12, 2 + 16 = 18, 3 + (18 - 4) / 4.
# n = 2: 12, 18, 1 + 18/2.
TRUNCATED = {
    "discounted_returns": [10.0, 18.0, 12.0],
    "gae": ([4.5, 14.0, 4.0], [6.5, 18.0, 12.0]),
    "vtrace": ([4.0, 28.0, 4.0], [6.0, 32.0, 12.0]),
    "retrace_returns": [6.5, 18.0, 12.0],
    "n_step_returns": [10.0, 18.0, 12.0],
}
AT_STEP_1 = [False, True, False]
