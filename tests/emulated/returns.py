"""The returns' ops of the emulator, forward and backward; and inputs for them."""

import torch
from torch import Tensor

# What each op takes beside rewards, shaped like them.
FLOATS = {
    "gae": ("values",),
    "lambda_returns": ("values",),
    "discounted_returns": (),
    "vtrace": ("values", "log_ratio"),
    "retrace_returns": ("values", "q_values", "log_ratio"),
    "n_step_returns": ("values",),
}
OPS = list(FLOATS)
# Of an op in these: inputs, and whether gamma and lambda are given per step.
OPTIONS = {
    "alone": (),
    "bootstrap": ("bootstrap_value", "terminated"),
    "next_values": ("next_values", "terminated", "truncated"),
    "mask": ("bootstrap_value", "terminated", "mask"),
    "everything": ("next_values", "terminated", "truncated", "mask", "per_step"),
}
CLIPS = {"rho_clip": 1.1, "c_clip": 0.9}


def arguments(op, shape, option, dtype=torch.float32, cu_seqlens=None, seed=0):
    """Keyword arguments of the op. Where mask is False, and where nothing follows, stands NaN."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(size, generator=generator).to(dtype)

    def share(p):
        return torch.rand(shape, generator=generator) < p

    takes = OPTIONS[option]
    given = {name: normal(*shape) for name in ("rewards", *FLOATS[op])}
    given["gamma"] = 0.97
    if op in ("gae", "lambda_returns", "vtrace", "retrace_returns"):
        given["gae_lambda"] = 0.9
    if op == "n_step_returns":
        given["n"] = 5
    given |= {"vtrace": CLIPS, "retrace_returns": {"c_clip": 0.9}}.get(op, {})
    if "per_step" in takes:
        for name in ("gamma", "gae_lambda"):
            if name in given:
                given[name] = (0.9 + 0.1 * torch.rand(shape, generator=generator)).to(dtype)
    if cu_seqlens is not None:
        given["cu_seqlens"] = cu_seqlens
    rows = shape[:-1] if cu_seqlens is None else (len(cu_seqlens) - 1,)
    for name in takes:
        if name == "bootstrap_value":
            given[name] = normal(*rows)
        elif name == "next_values":
            given[name] = normal(*shape)
        elif name in ("terminated", "truncated"):
            given[name] = share(0.01)
        elif name == "mask":
            given[name] = runs(shape, generator)
    if "next_values" in given:
        given["next_values"][given["terminated"]] = torch.nan
    if "mask" in given:
        for x in given.values():
            if isinstance(x, Tensor) and x.shape == shape and x.is_floating_point():
                x[~given["mask"]] = torch.nan
    return given


def runs(shape, generator):
    """A mask of which some steps are False by themselves and some in runs of thousands."""
    flat = torch.rand(shape, generator=generator).reshape(-1) < 0.8
    for length in (70, 300, 1500, 5000):
        for _ in range(3):
            start = int(torch.randint(max(1, len(flat)), (), generator=generator))
            if 4 * length < len(flat):
                flat[start : start + length] = False
    return flat.reshape(shape)


def in_double(given):
    return {
        name: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x
        for name, x in given.items()
    }


def path(given):
    """What decides which step follows which, as the ops' schemas have it."""
    tensors = [given.get(name) for name in ("terminated", "truncated", "mask", "cu_seqlens")]
    discounts = [given.get(name, 1.0) for name in ("gamma", "gae_lambda")]
    per_step = [x if isinstance(x, Tensor) else None for x in discounts]
    return *tensors, *per_step, *(1.0 if isinstance(x, Tensor) else x for x in discounts)


def further(op, given):
    """What follows on the path."""
    return [given[name] for name in ("n", "rho_clip", "c_clip") if name in given]


def forward(emulated, op, given, keep=True):
    """All outputs of the op, also those that it keeps for its backward pass."""
    tensors = [given[name] for name in ("rewards", *FLOATS[op])]
    ends = [given.get(name) for name in ("bootstrap_value", "next_values")]
    keeps = [keep] if op in ("vtrace", "retrace_returns") else []
    return emulated(op, *tensors, *ends, *path(given), *further(op, given), *keeps)


def backward(emulated, op, given, outputs, grads):
    """Gradients of all that the op is differentiable in; of the outputs' some may be None."""
    steps, options = path(given), further(op, given)
    found, grad_next = {}, None
    if op == "vtrace":
        found["rewards"], found["log_ratio"] = emulated(
            "vtrace_bwd", *grads, given["log_ratio"], *outputs[2:], *steps, *options
        )
    elif op == "retrace_returns":
        found["rewards"], found["log_ratio"], found["q_values"] = emulated(
            "retrace_returns_bwd", *grads, given["log_ratio"], outputs[1], *steps, *options, True
        )
    elif op == "n_step_returns":
        found["rewards"], grad_next = emulated("n_step_returns_bwd", *grads, *steps, *options)
    else:
        (found["rewards"],) = emulated("td_bwd", *[*grads, None][:2], *steps)
    own = op in ("gae", "lambda_returns", "vtrace")
    values, next_values, bootstrap_value = emulated(
        "value_grads", found["rewards"], grads[-1] if own else None, grad_next, own,
        op == "discounted_returns", "values" in FLOATS[op], "next_values" in given, *steps,
    )  # fmt: skip
    found |= {"values": values, "next_values": next_values, "bootstrap_value": bootstrap_value}
    assert not any(x.numel() for n, x in found.items() if n not in given and n != "bootstrap_value")
    return {name: x for name, x in found.items() if name in given}
