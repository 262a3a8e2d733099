"""The compiled module `fastrl._C`: loading it registers the ops `torch.ops.fastrl.*`."""

import importlib
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, NoReturn

import torch
from torch import library
from torch.autograd import forward_ad

module: ModuleType | None = None
missing = ""
try:
    module = importlib.import_module("fastrl._C")
except ImportError as error:  # a checkout that is not built still has fastrl.reference
    missing = str(error)

# Products of the vendor's library, and the kernels of token_logprobs on each slice of them.
_SLICES = {"cpu": "products in slices, C++", "cuda": "products in slices, Triton"}

# C++ on the CPU, CUDA C++ on a GPU where this binary was built for one.
_SCANS = {"cpu": "C++"}
if module is not None and module.build_facts()["cuda_architectures"]:
    _SCANS["cuda"] = "CUDA C++"

# What runs an op with kernels of its own on which device. `_checks.implemented` refuses the others,
# `fastrl info` prints it, and a test holds it against the dispatcher's own list.
IMPLEMENTATIONS: dict[str, dict[str, str]] = {
    "attention": {"cpu": "C++", "cuda": "Triton"},
    "decode_attention": {"cpu": "C++", "cuda": "Triton"},
    "discounted_returns": _SCANS,
    "gae": _SCANS,
    "lambda_returns": _SCANS,
    "linear_token_logprobs": _SLICES,
    "linear_token_loss": _SLICES,
    "n_step_returns": _SCANS,
    "retrace_returns": _SCANS,
    "sample_tokens": {"cpu": "C++", "cuda": "Triton"},
    "token_logprobs": {"cpu": "C++", "cuda": "Triton"},
    "token_stats": _SLICES,
    "vtrace": _SCANS,
}


# The ops' formulas, by name: see _short_cut.
_functions: dict[str, Any] = {}


def op(name: str, *, differentiable: int | None = None) -> Callable[..., Any]:
    """torch.ops.fastrl.<name>; without the binary, a function that says how to build it.

    differentiable: how many of its first arguments may require grad; None: all.
    """
    if module is not None:
        return _short_cut(name, getattr(torch.ops.fastrl, name).default, differentiable)

    def not_built(*args: object) -> None:
        raise ImportError(
            f"{name}: expected the compiled module fastrl._C, got none ({missing}). Build it with "
            "`pip install --no-build-isolation .`, or use fastrl.reference, which needs none."
        )

    return not_built


def _short_cut(
    name: str, overload: Callable[..., Any], differentiable: int | None
) -> Callable[..., Any]:
    """The op, past the autograd formula's Python (half of a small call's time) where there is
    nothing to differentiate; torch's own wrapper makes the same step, only later. Tangents of
    forward mode would be lost in it. Where there is, straight into the formula: the wrapper takes
    longer than that."""

    def call(*args: Any) -> Any:
        if forward_ad._current_level >= 0:
            _refuse_tangents(name, args[:differentiable])
        if torch.compiler.is_compiling():
            return overload(*args)
        if torch.is_grad_enabled() and (
            torch._C._any_requires_grad(*args[:differentiable]) or is_transformed()
        ):
            function = None if is_transformed() else _functions.get(name)
            return overload(*args) if function is None else function.apply(*args)
        with torch._C._AutoDispatchBelowAutograd():
            return overload(*args)

    return call


def is_transformed() -> bool:
    """Whether vmap, or another transform of torch.func, is at work: its tensors do not say whether
    those behind them require grad, and share memory."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def may_require_grad(x: torch.Tensor) -> bool:
    return torch.is_grad_enabled() and (x.requires_grad or is_transformed())


def _refuse_tangents(name: str, args: Sequence[Any]) -> None:
    """Torch's wrapper of an autograd formula drops them without a word. What torch.compile traces
    with does not show them: it is to make the call outside of its graphs."""
    for x in args:
        if isinstance(x, torch.Tensor) and (
            torch.compiler.is_compiling() or forward_ad.unpack_dual(x).tangent is not None
        ):
            raise NotImplementedError(
                f"{_shown(name)}: expected no derivative in forward mode, got a tensor with a "
                "tangent. Use the plain definition in fastrl.reference, or reverse mode."
            )


def _shown(name: str) -> str:
    """The op of which it is a part."""
    if name in ("td_bwd", "value_grads"):
        return "returns"
    for suffix in ("_", "_fwd", "_bwd", "_state", "_frozen"):
        name = name.removesuffix(suffix)
    return name.replace("kept_logprobs", "token_logprobs")


def refuse_second_derivative(name: str) -> NoReturn:
    raise NotImplementedError(
        f"{_shown(name)}: expected to be differentiated once, got a second derivative. "
        "Use the plain definition in fastrl.reference for it."
    )


def refuse_create_graph(name: str) -> None:
    """In the backward pass of a function that torch would differentiate again without a word."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        refuse_second_derivative(name)


def differentiable_once(*names: str) -> None:
    """Of backward ops. A second derivative would be silently incomplete: they are no functions of
    the graph that the first one made."""

    def keep_nothing(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    for name in names:

        def refuse(*_: Any, name: str = name) -> NoReturn:
            refuse_second_derivative(name)

        register_autograd(name, refuse, setup_context=keep_nothing)


def register_fake(name: str, function: Callable[..., Any]) -> None:
    """What shapes and dtypes the op gives, for torch.compile and meta tensors."""
    if module is not None:
        library.register_fake(f"fastrl::{name}", function)


def register_autograd(name: str, backward: Callable[..., Any], *, setup_context: Any) -> None:
    if module is not None:
        library.register_autograd(f"fastrl::{name}", backward, setup_context=setup_context)
        _functions[name] = _function(name, backward, setup_context)


def _function(name: str, backward: Callable[..., Any], setup_context: Callable[..., Any]) -> Any:
    """The formula as torch's wrapper makes one of it, without what that does for other ops."""
    overload = getattr(torch.ops.fastrl, name).default

    def forward(ctx: Any, *args: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            outputs = overload(*args)
        setup_context(ctx, args, outputs)
        return outputs

    def gradients(ctx: Any, *grads: Any) -> Any:
        found = backward(ctx, *grads)
        if isinstance(found, tuple):  # a list stands where tensors came as one, which need none
            return tuple(None if isinstance(x, list) else x for x in found)
        return found

    methods = {"forward": staticmethod(forward), "backward": staticmethod(gradients)}
    return type(name, (torch.autograd.Function,), methods)


def register_torch(function: Callable[..., Any]) -> None:
    """A function of PyTorch and other ops as the implementation of the op of its name. Autocast
    ends at the op: what its inputs are cast to is decided before."""

    def call(*args: Any) -> Any:
        kind = next(x.device.type for x in args if isinstance(x, torch.Tensor))
        # With create_graph grad mode is still on here, and products into buffers refuse it.
        with torch.no_grad(), torch.autocast(kind, enabled=False):
            return function(*args)

    if module is not None:
        library.register_kernel(f"fastrl::{function.__name__}", ("cpu", "cuda"), call)


def register_triton(kernels: str, *names: str) -> None:
    """Launchers of these names in fastrl.kernels.<kernels> as the ops' CUDA implementations.

    The module is imported when one is first called: without a GPU, Triton is not needed.
    """
    if module is not None:
        for name in names:
            # Not library.impl: Dynamo would trace the launcher, called from a frame it skips.
            library.register_kernel(f"fastrl::{name}", "cuda", launcher(kernels, name))


def launcher(kernels: str, name: str) -> Callable[..., Any]:
    """A launcher of fastrl.kernels, called on the device of its first tensor."""

    def call(*args: Any) -> Any:
        try:
            launcher = getattr(importlib.import_module(f"fastrl.kernels.{kernels}"), name)
        except ModuleNotFoundError as error:
            if error.name is None or error.name.partition(".")[0] != "triton":
                raise
            raise ImportError(
                f"{kernels}: expected the package triton for a GPU tensor, got none ({error}). "
                "Install it with `pip install triton`."
            ) from error
        device = next(x.device for x in args if isinstance(x, torch.Tensor))
        with torch.cuda.device(device):  # Triton launches on the current one
            return launcher(*args)

    return call
