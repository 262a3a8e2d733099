"""The estimators of returns: one list of cases for all six, held against the reference."""

import hashlib
import math

import torch
from budget import assert_within_budget

import fastrl
from fastrl import reference

# op -> the tensors shaped like rewards that it takes, and its own numbers
INPUTS = {
    "gae": ["rewards", "values"],
    "lambda_returns": ["rewards", "values"],
    "discounted_returns": ["rewards"],
    "vtrace": ["rewards", "values", "log_ratio"],
    "retrace_returns": ["rewards", "values", "q_values", "log_ratio"],
    "n_step_returns": ["rewards", "values"],
}
NUMBERS = {
    "vtrace": {"rho_clip": 1.3, "c_clip": 0.9},
    "retrace_returns": {"c_clip": 1.1},
    "n_step_returns": {"n": 3},
}
OPS = list(INPUTS)
WITHOUT_LAMBDA = ("discounted_returns", "n_step_returns")
# What may be given together; each is one row of the table of edges in the README.
GIVEN = [
    "",
    "bootstrap_value",
    "mask",
    "mask bootstrap_value terminated",
    "terminated next_values",
    "truncated next_values",
    "mask terminated truncated next_values",
    "gamma gae_lambda mask bootstrap_value",
]


def case(op, given, shape, dtype=torch.float64, segments=None, device="cpu"):
    """Random arguments of one call; NaN wherever mask says that nothing may be looked at."""
    rows = shape[:-1] if segments is None else (len(segments) - 1,)
    x = {name: torch.randn(shape) for name in INPUTS[op]}
    x |= {"gamma": 0.99, "gae_lambda": 0.95} | NUMBERS.get(op, {})
    for name in given.split():
        if name in ("mask", "terminated", "truncated"):
            x[name] = torch.rand(shape) < (0.7 if name == "mask" else 0.2)
        elif name == "bootstrap_value":
            x[name] = torch.randn(rows)
        else:
            x[name] = torch.rand(shape)
    if segments is not None:
        x["cu_seqlens"] = torch.tensor(segments, dtype=torch.int32)
    if op in WITHOUT_LAMBDA:
        del x["gae_lambda"]
    for name, value in x.items():
        if "mask" in x and isinstance(value, torch.Tensor) and value.is_floating_point():
            if name != "bootstrap_value":
                x[name] = value.masked_fill(~x["mask"], math.nan)
    return {
        k: v.to(device, dtype if v.is_floating_point() else v.dtype)
        if isinstance(v, torch.Tensor)
        else v
        for k, v in x.items()
    }


def on_tensors(convert, arguments):
    return {k: convert(v) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}


def call(namespace, op, arguments):
    out = getattr(namespace, op)(**arguments)
    return out if isinstance(out, tuple) else (out,)


def outputs_and_gradients(namespace, op, arguments, weights):
    names = [*INPUTS[op], "next_values", "bootstrap_value"]
    leaves = {k: arguments[k].detach().clone().requires_grad_() for k in names if k in arguments}
    out = call(namespace, op, arguments | leaves)
    sum((o * w.to(o)).sum() for o, w in zip(out, weights, strict=False)).backward()
    return [o.detach() for o in out] + [
        torch.zeros_like(v) if v.grad is None else v.grad for v in leaves.values()
    ]


_OF_THE_REFERENCE = {}


def of_the_reference(op, arguments, weights):
    """`outputs_and_gradients`, once for equal arguments: all SIMD levels have the same ones."""
    key = hashlib.sha256(op.encode())
    for value in (*arguments, *arguments.values(), *weights):
        if isinstance(value, torch.Tensor):
            data = value.detach().contiguous().reshape(-1).view(torch.uint8).cpu()
            key.update(f"{value.dtype} {value.shape} {value.stride()} {value.device}".encode())
            key.update(data.numpy().tobytes())
        else:
            key.update(repr(value).encode())
    known = _OF_THE_REFERENCE
    if key.digest() not in known:
        known[key.digest()] = outputs_and_gradients(reference, op, arguments, weights)
    return known[key.digest()]


def check(op, arguments, dtype):
    """Outputs and all gradients within the error budget."""

    def double(v):
        return v.double() if v.is_floating_point() else v

    weights = [torch.randn(arguments["rewards"].shape) for _ in range(2)]
    ours = outputs_and_gradients(fastrl, op, arguments, weights)
    eager = of_the_reference(op, arguments, weights)
    truth = of_the_reference(op, on_tensors(double, arguments), weights)
    for actual, plain, exact in zip(ours, eager, truth, strict=True):
        assert_within_budget(actual, plain, exact, dtype)
