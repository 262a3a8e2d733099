"""Checks of what users pass, with one form of message:

{op}: expected {argument} {property}, got {actual}. {remedy}

Only what a device knows without being asked is checked there: shapes, dtypes, numbers. Checks of
contents run on eager CPU tensors alone, since they would synchronise a GPU and break a graph.
"""

import math
import sys
from collections.abc import Iterable

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from fastrl.ops._binary import IMPLEMENTATIONS

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
FLOATS_TO_32 = (torch.float32, torch.bfloat16, torch.float16)  # of ops without float64
MOST_HEAD_SIZE = 256


def fail(op: str, expected: str, got: object, remedy: str) -> ValueError:
    return ValueError(f"{op}: expected {expected}, got {got}. {remedy}")


def wrong_type(op: str, expected: str, got: object, remedy: str) -> TypeError:
    return TypeError(f"{op}: expected {expected}, got {got}. {remedy}")


def shape(t: Tensor) -> str:
    return str(tuple(t.shape))


def tensor(op: str, name: str, x: object, dtypes: Iterable[torch.dtype], remedy: str) -> None:
    if not isinstance(x, Tensor):
        remedy = remedy if x is None else f"Use torch.as_tensor({name})."
        raise wrong_type(op, f"{name} as a tensor", type(x).__name__, remedy)
    if x.dtype not in dtypes:
        names = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise wrong_type(op, f"{name} of dtype {names}", x.dtype, remedy)


def undistributed(op: str, name: str, x: object, remedy: str) -> None:
    """Known by a method: the class would take its import, and torch's own error asks for more.
    remedy: {0} in it becomes the name."""
    if hasattr(x, "full_tensor"):
        raise wrong_type(op, f"{name} as a plain tensor", type(x).__name__, remedy.format(name))


def float_tensor(op: str, name: str, x: object) -> None:
    tensor(op, name, x, FLOATS, f"Pass {name} as a floating-point tensor.")


def bool_tensor(op: str, name: str, x: object) -> None:
    tensor(op, name, x, (torch.bool,), f"Use {name}.bool().")


def same_shape(op: str, name: str, x: Tensor, like_name: str, like: Tensor, remedy: str) -> None:
    if x.shape != like.shape:
        raise fail(op, f"{name} {shape(like)} like {like_name}", shape(x), remedy)


def same_device(op: str, name: str, x: Tensor, like_name: str, like: Tensor) -> None:
    if x.device != like.device:
        raise fail(op, f"{name} on {like.device} like {like_name}", x.device, "Move it there.")


def like(op: str, name: str, x: object, like_name: str, like_tensor: Tensor) -> None:
    """A floating-point tensor of the shape and on the device of another."""
    float_tensor(op, name, x)
    assert isinstance(x, Tensor)
    same_shape(op, name, x, like_name, like_tensor, f"Pass one number per entry of {like_name}.")
    same_device(op, name, x, like_name, like_tensor)


def bool_like(op: str, name: str, x: object, like_name: str, like_tensor: Tensor) -> None:
    bool_tensor(op, name, x)
    assert isinstance(x, Tensor)
    same_shape(op, name, x, like_name, like_tensor, f"Pass one bool per entry of {like_name}.")
    same_device(op, name, x, like_name, like_tensor)


def number(op: str, name: str, x: object, low: float, high: float, remedy: str) -> None:
    """A real number in [low, high]; NaN is in no interval, and an int beyond float64 neither."""
    if isinstance(x, bool) or not isinstance(x, (int, float)):
        raise wrong_type(op, f"{name} as a number", type(x).__name__, f"Use float({name}).")
    if not low <= x <= high or (isinstance(x, int) and abs(x) > sys.float_info.max):
        span = f">= {low:g}" if high == math.inf else f"in [{low:g}, {high:g}]"
        raise fail(op, f"{name} {span}", x, remedy)


def positive(op: str, name: str, x: object, remedy: str) -> None:
    if isinstance(x, bool) or not isinstance(x, (int, float)):
        raise wrong_type(op, f"{name} as a number", type(x).__name__, f"Use float({name}).")
    if not 0 < x <= sys.float_info.max:
        raise fail(op, f"{name} > 0 and finite", x, remedy)


def temperature(op: str, x: object) -> None:
    """Beyond 1e37, numbers that stand for a logit of -inf would get a share."""
    positive(op, "temperature", x, "sample_tokens knows greedy, as 0.")
    number(op, "temperature", x, 0.0, 1e37, "Far below, all ids are alike already.")


def whole(op: str, name: str, x: object, low: int) -> None:
    if isinstance(x, bool) or not isinstance(x, int):
        raise wrong_type(op, f"{name} as an int", type(x).__name__, f"Use int({name}).")
    if x < low:
        raise fail(op, f"{name} >= {low}", x, f"Pass {low} or more.")


def window(op: str, x: object) -> int | None:
    """Positions, or None for all; of 64 bits, which are more than there are."""
    if x is None:
        return None
    whole(op, "window", x, 1)
    assert isinstance(x, int)
    return min(x, 2**62)


def index(op: str, name: str, x: object) -> None:
    if isinstance(x, bool) or not isinstance(x, int):
        got = type(x).__name__
        raise wrong_type(op, f"{name} as an int", got, "Pass an id, such as -100.")
    if not -(2**63) <= x < 2**63:
        raise fail(op, f"{name} of 64 bits, as ids have", x, "Pass an id, such as -100.")


def one_of(op: str, name: str, x: object, choices: tuple[str, ...]) -> None:
    if x not in choices:
        listed = ", ".join(map(repr, choices))
        raise fail(op, f"{name} one of {listed}", repr(x), "Choose one of these.")


def contents_are_known(*tensors: Tensor) -> bool:
    """Whether looking into the tensors is free: eager, on the CPU, and with something in them that
    vmap lets one see."""
    return not torch.compiler.is_compiling() and all(
        t.device.type == "cpu"
        and not isinstance(t, FakeTensor)
        and not torch._C._functorch.is_batchedtensor(t)
        for t in tensors
    )


def entry_outside(x: Tensor, low: int, high: int) -> int | None:
    """An entry of x that is not in [low, high]; None where there is none, or none to be seen."""
    if not contents_are_known(x) or x.numel() == 0:  # a size may be unknown as well
        return None
    # A few numbers are looked at faster one by one, many by torch.
    numbers = x.reshape(-1).tolist() if x.numel() <= 64 else [int(y) for y in x.aminmax()]
    least, most = min(numbers), max(numbers)
    return least if least < low else most if most > high else None


def cu_seqlens(
    op: str, x: object, num_tokens: int, like_tensor: Tensor, *, like: str = "rewards"
) -> None:
    """int32 [S + 1], rising from 0 to the number of packed tokens."""
    tensor(op, "cu_seqlens", x, (torch.int32,), "Use cu_seqlens.int().")
    assert isinstance(x, Tensor)
    same_device(op, "cu_seqlens", x, like, like_tensor)
    remedy = "Pass the S + 1 boundaries of the S segments."
    if x.dim() != 1 or x.numel() == 0:
        raise fail(op, "cu_seqlens [S + 1]", shape(x), remedy)
    if contents_are_known(x):
        # A few numbers are looked at faster one by one, many by torch.
        few = x.tolist() if x.numel() <= 64 else None
        start, end = (few[0], few[-1]) if few else (int(x[0]), int(x[-1]))
        if start != 0 or end != num_tokens:
            got = f"from {start} to {end}"
            raise fail(op, f"cu_seqlens from 0 to N = {num_tokens}", got, remedy)
        if few:
            falls = any(a > b for a, b in zip(few, few[1:], strict=False))
        else:
            falls = bool((x[1:] < x[:-1]).any())
        if falls:
            at = int((x[1:] < x[:-1]).nonzero()[0])
            raise fail(op, "cu_seqlens that rise", f"{x[at : at + 2].tolist()} at {at}", remedy)


def head_size(op: str, query: Tensor) -> None:
    """On a GPU a head has to fit into a program's registers and shared memory."""
    if query.device.type == "cuda" and query.shape[-1] > MOST_HEAD_SIZE:
        raise fail(
            op,
            f"a head size of at most {MOST_HEAD_SIZE} on a GPU",
            query.shape[-1],
            f"Use fastrl.reference.{op}, or a CPU.",
        )


def implemented(op: str, x: Tensor) -> None:
    """Refuses a device that the op has no kernel for, instead of falling back."""
    kind = x.device.type
    devices = IMPLEMENTATIONS[op]
    if kind not in devices and kind != "meta":
        have = " or ".join(devices) or "no device yet"
        build = "Build fastrl with nvcc and a torch with CUDA, or use" if kind == "cuda" else "Use"
        raise NotImplementedError(
            f"{op}: expected tensors on {have}, got {kind}. {build} fastrl.reference.{op} there."
        )
