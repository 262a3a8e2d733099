"""The returns' ops, forward and backward, out of the kernels that run in the emulator; and inputs."""

import torch
from torch import Tensor

# What each op takes beside rewards, shaped like them; the kernels' names for it.
FLOATS = {
    "gae": {"values": "value"},
    "lambda_returns": {"values": "value"},
    "discounted_returns": {},
    "vtrace": {"values": "value", "log_ratio": "log_ratio"},
    "retrace_returns": {"values": "value", "q_values": "q_value", "log_ratio": "log_ratio"},
    "n_step_returns": {"values": "value"},
}
OPS = list(FLOATS)
PATH = ("terminated", "truncated", "mask", "cu_seqlens", "gamma", "gae_lambda")
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


def forward(kernels, op, given):
    """All outputs of the kernel, also those that it keeps for its backward pass."""
    names = {"rewards": "reward", "bootstrap_value": "bootstrap", "next_values": "next_value"}
    names |= FLOATS[op]
    renamed = {names.get(name, name): x for name, x in given.items()}
    return kernels("n_step" if op == "n_step_returns" else op, given["rewards"], **renamed)


def backward(kernels, op, given, outputs, grads):
    """Gradients of all that the op is differentiable in, as its autograd formula puts them
    together; of the outputs' gradients some may be None."""
    like = given["rewards"]
    path = {name: given[name] for name in PATH if name in given}
    clips = {name: given[name] for name in CLIPS if name in given}
    grads = [*grads, None][:2]
    found, grad_next, own = {}, None, op in ("gae", "lambda_returns", "vtrace")
    options = {**path, **clips, "dtype": like.dtype}
    if op == "vtrace":
        found["rewards"], found["log_ratio"] = kernels(
            "vtrace_bwd", like, log_ratio=given["log_ratio"], grad_first=grads[0],
            grad_second=grads[1], td_error=outputs[2], carried=outputs[3], **options,
        )  # fmt: skip
    elif op == "retrace_returns":
        found["rewards"], found["log_ratio"], found["q_values"] = kernels(
            "retrace_returns_bwd", like, log_ratio=given["log_ratio"], grad_first=grads[0],
            td_error=outputs[1], **options,
        )  # fmt: skip
    elif op == "n_step_returns":
        found["rewards"], grad_next = kernels(
            "n_step_backward", like, grad_first=grads[0], n=given["n"], **options
        )
    else:
        (found["rewards"],) = kernels(
            "td_bwd", like, grad_first=grads[0], grad_second=grads[1], **options
        )
    has_next_values = "next_values" in given
    of_returns = grads[0] if op == "lambda_returns" else grads[1]
    flags = 1 * own + 2 * (op == "discounted_returns") + 4 * has_next_values
    wanted = [0] * ("values" in FLOATS[op]) + [1 if has_next_values else 2]
    values, next_values, bootstrap_value = kernels(
        "value_grads", like, grad_first=found["rewards"], flags=flags, wanted=wanted,
        grad_second=of_returns if own else None, carried=grad_next, **options,
    )  # fmt: skip
    found |= {"values": values, "next_values": next_values, "bootstrap_value": bootstrap_value}
    return {name: x for name, x in found.items() if name in given}
