"""Tensors that say they are on "cuda" and lie in the CPU's memory, and what becomes of ops on them.

See device.py, which sets all of this up.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._decomp.decompositions import lstm_data_impl, lstm_impl
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_map

CUDA, CPU = torch.device("cuda:0"), torch.device("cpu")
_aten = torch.ops.aten
# By op of ours: what is registered for CUDA, and whether it calls other ops on the same tensors.
KERNELS: dict[str, tuple[Callable[..., Any], bool]] = {}

_WAITING = {
    _aten._local_scalar_dense.default, _aten.nonzero.default, _aten.masked_select.default,
    _aten.equal.default, _aten.is_nonzero.default, _aten._unique2.default, _aten.bincount.default,
}  # fmt: skip
_COPIES = {_aten._to_copy.default, _aten.copy_.default}
_INDEXING = {
    _aten.index.Tensor, _aten.index_put.default, _aten.index_put_.default,
    _aten._index_put_impl_.default,
}  # fmt: skip


class OnGpu(torch.Tensor):
    """`inner`, a tensor of the CPU, in the dress of one of the GPU."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> "OnGpu":
        # dispatch_device: .device and .is_cuda ask __torch_dispatch__.
        x = Tensor._make_subclass(
            cls, inner, False, dispatch_device=True, device_for_backend_keys=CUDA
        )
        x.inner = inner
        return x

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with GPU:  # from a thread that has no mode
            return func(*args, **(kwargs or {}))

    __torch_function__ = torch._C._disabled_torch_function_impl

    def __repr__(self, **_: Any) -> str:
        return f"on_gpu({self.inner!r})"

    def __format__(self, spec: str) -> str:
        return format(self.item() if self.dim() == 0 else repr(self), spec)


def on_gpu(x: Any) -> Any:
    return OnGpu(x) if isinstance(x, Tensor) and not isinstance(x, OnGpu) else x


def _inner(x: Any) -> Any:
    return x.inner if isinstance(x, OnGpu) else x


def with_inner(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return function(*tree_map(_inner, args), **tree_map(_inner, kwargs))


def _wide_product(function: Callable[..., Any]) -> Callable[..., Any]:
    """Of 16-bit factors, in float32: what CUDA alone has."""

    def product(*args: Any, out: Tensor | None = None, beta: float = 1, alpha: float = 1) -> Tensor:
        *added, a, b, dtype = args
        assert a.dtype == b.dtype and a.element_size() == 2 and dtype == torch.float32
        assert all(x.dtype == dtype for x in (*added, *([] if out is None else [out])))
        found = alpha * function(a.float(), b.float())
        for x in added:
            found = found + beta * x
        return found if out is None else out.copy_(found)

    return product


_ON_CPU = {
    getattr(getattr(_aten, name), kind): _wide_product(getattr(torch, name.removeprefix("add")))
    for name in ("mm", "bmm", "addmm")
    for kind in ("dtype", "dtype_out")
}
# Of whole numbers, as well.
_ON_CPU[_aten.histc.default] = lambda x, *args: torch.histc(x.float(), *args)


class Gpu(TorchDispatchMode):
    debug_mode = "default"  # as torch.cuda.set_sync_debug_mode takes it

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.ops.prim.device.default:
            return CUDA if isinstance(args[0], OnGpu) else CPU
        if func is _aten._pin_memory.default:
            return args[0].clone()
        tensors: list[Tensor] = []
        tree_map(lambda x: tensors.append(x) if isinstance(x, Tensor) else None, (args, kwargs))
        device = None if kwargs.get("device") is None else torch.device(kwargs["device"])
        to_gpu = device is not None and device.type == "cuda"
        if not to_gpu and not any(isinstance(x, OnGpu) for x in tensors):
            return func(*args, **kwargs)
        _look_at(func, tensors, args, kwargs)
        if func.namespace == "fastrl":
            return _call(func, args, kwargs)
        if device is not None:
            kwargs["device"] = CPU
        result = with_inner(_ON_CPU.get(func, func), *args, **kwargs)
        if device is not None and not to_gpu:
            return result
        result = tree_map(on_gpu, result)
        if not any(isinstance(x, OnGpu) for x in tensors):
            return result
        return return_and_correct_aliasing(func, args, kwargs, result)


GPU = Gpu()


def _look_at(func: Any, tensors: list[Tensor], args: Any, kwargs: dict[str, Any]) -> None:
    is_ours = [isinstance(x, OnGpu) for x in tensors]
    elsewhere = [x for x, ours in zip(tensors, is_ours, strict=True) if not ours and x.dim() > 0]
    if any(is_ours) and elsewhere and func not in _COPIES | _INDEXING:
        raise RuntimeError(f"{func}: expected tensors on one device, got cuda:0 and cpu")
    waits = func in _WAITING
    if func in _COPIES:
        to = kwargs.get("device") or CUDA
        asynchronous = kwargs.get("non_blocking") or (len(args) > 2 and args[2])
        waits = (bool(elsewhere) or torch.device(to).type == "cpu") and not asynchronous
    elif func in _INDEXING:
        by = [x for x in args[1] if x is not None]
        waits = any(x.dtype in (torch.bool, torch.uint8) or not isinstance(x, OnGpu) for x in by)
    elif func is _aten.repeat_interleave.Tensor:
        waits = kwargs.get("output_size") is None
    if waits and Gpu.debug_mode == "error":
        raise RuntimeError(f"{func}: called a synchronizing CUDA operation")


def _call(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    name = func.name().partition(".")[0]
    function, calls_ops = KERNELS[name]
    expected = func._schema.arguments[len(args) :]
    args = *args, *(kwargs.get(x.name, x.default_value) for x in expected)
    if calls_ops:
        with GPU:
            return function(*args)
    return tree_map(on_gpu, with_inner(function, *args))


class _InTrainingMode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        raise RuntimeError("cudnn RNN backward can only be called in training mode")


def _lstm(*args: Any) -> Any:
    """In place of cuDNN's: by torch's definition of it."""
    args = [list(x) if isinstance(x, tuple) else x for x in args]
    is_packed = isinstance(args[1], Tensor)
    output, *state = (lstm_data_impl if is_packed else lstm_impl)(*args)
    if not args[7 if is_packed else 6]:
        output = _InTrainingMode.apply(output)
    return output, *state


class Numbered(TorchFunctionMode):
    """What would ask a driver for its current device, or the interpreter for one of CUDA's."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def numbered(x: Any) -> Any:
            return CUDA if isinstance(x, (str, torch.device)) and str(x) == "cuda" else x

        args = [numbered(x) for x in args]
        kwargs = {name: numbered(x) for name, x in (kwargs or {}).items()}
        if func is Tensor.cuda:
            return args[0].to(CUDA)
        if func == torch._VF.lstm and isinstance(args[0], OnGpu):
            return _lstm(*args)
        if func is Tensor.tolist and isinstance(args[0], OnGpu):
            return args[0].cpu().tolist()
        if func is Tensor.numpy and isinstance(args[0], OnGpu):
            raise TypeError("can't convert cuda:0 device type tensor to numpy")
        if func in (torch.tensor, torch.as_tensor, torch.asarray) and kwargs.get("device") == CUDA:
            del kwargs["device"]
            return func(*args, **kwargs).to(CUDA)
        if func in (Tensor.__getitem__, Tensor.__setitem__):
            several = isinstance(args[1], tuple)
            at = args[1] if several else (args[1],)
            at = tuple(torch.tensor(x) if isinstance(x, list) else x for x in at)
            args[1] = at if several else at[0]
        return func(*args, **kwargs)
