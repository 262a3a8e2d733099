"""A GPU that is not there: on_gpu.py's tensors, and the rest of what torch knows of a GPU.

A plugin for a pytest of its own, which test_device.py starts: `-p emulated.device`. All that Python
does around the kernels is as on a GPU: the dispatcher's CUDA implementations, with Triton kernels
in the interpreter and those of csrc/cuda in the emulator, autograd and its thread for the device,
autocast, slices. Tensors of both devices in one op are an error, as there, and a wait is one in
torch's sync debug mode. Nothing is asynchronous; what takes more than that skips a test.
"""

import contextlib
import ctypes
import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

# What test_device.py has built: device.cpp, and the emulator of the kernels.
FOLDER = Path(os.environ["FASTRL_EMULATED"])
os.environ["TRITON_INTERPRET"] = "1"
assert "torch" not in sys.modules, "torch looks once for what a GPU is"
_spec = importlib.util.find_spec("torch")
assert _spec is not None and _spec.origin is not None
for _path in (Path(_spec.origin).parent / "lib" / "libtorch_cpu.so", FOLDER / "device.so"):
    ctypes.CDLL(str(_path), mode=ctypes.RTLD_GLOBAL)

import pytest  # noqa: E402
import torch  # noqa: E402
import torch._dynamo  # noqa: E402, F401 - it lists torch's functions, each once, as they are
from emulated.on_gpu import GPU, KERNELS, Gpu, Numbered, on_gpu, with_inner  # noqa: E402
from torch import library  # noqa: E402
from torch.utils._pytree import tree_map  # noqa: E402


class _Generator(torch._C.Generator):
    def __new__(cls, device: Any = "cpu") -> "_Generator":
        generator = super().__new__(cls, "cpu")
        generator.says = torch.device(device)
        return generator

    device = property(lambda self: self.says)


class _Stream:
    """Of which nothing is ever done, and nothing has to be."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __getattr__(self, name: str) -> Callable[..., bool]:
        return lambda *_: False


def _lacking(name: str) -> Callable[..., Any]:
    def skip(*_: Any, **__: Any) -> Any:
        pytest.skip(f"an emulated GPU has no {name}")

    return skip


def _patch_torch() -> None:
    cuda = torch.cuda
    nothing: Callable[..., Any] = lambda *_, **__: None  # noqa: E731
    there = {
        "_lazy_init": nothing, "_sleep": nothing, "synchronize": nothing, "empty_cache": nothing,
        "set_device": nothing, "is_available": lambda: True, "device_count": lambda: 1,
        "current_device": lambda: 0, "is_initialized": lambda: False,
        "is_bf16_supported": lambda *_, **__: True, "mem_get_info": lambda *_: (0, 0),
        "get_device_capability": lambda *_: (8, 0), "get_device_name": lambda *_: "emulated",
        "set_sync_debug_mode": lambda mode: setattr(Gpu, "debug_mode", mode),
        "device": type("device", (contextlib.nullcontext,), {}),
        "Stream": _Stream, "current_stream": _Stream, "stream": contextlib.nullcontext,
        "get_rng_state": torch.get_rng_state, "set_rng_state": nothing,
        "get_rng_state_all": lambda: [torch.get_rng_state()],
    }  # fmt: skip
    for name, stand_in in there.items():
        setattr(cuda, name, stand_in)
    cuda.random._lazy_init = nothing
    cuda.CUDAGraph = type("CUDAGraph", (), {"__init__": _lacking("graphs")})
    for name in ("memory_allocated", "max_memory_allocated", "reset_peak_memory_stats"):
        setattr(cuda, name, _lacking("memory of its own"))
    torch.compile, library.opcheck = _lacking("compiler"), _lacking("compiler")
    torch.Generator = _Generator
    # Else a module would keep its parameter, and give it the data of another kind of tensor.
    torch.__future__.set_overwrite_module_params_on_conversion(True)


def _record_kernels() -> None:
    """Before fastrl is imported."""
    register = library.register_kernel

    def recorded(op: str, devices: Any, function: Any, **rest: Any) -> Any:
        for_both = not isinstance(devices, str)
        if "cuda" in devices:
            KERNELS[op] = function, for_both
        return register(op, devices, function, **rest)

    library.register_kernel = recorded


def _patch_fastrl() -> None:
    from emulated.emulator import OPS, Emulator

    from fastrl.ops import _binary, _head

    emulator = Emulator(FOLDER / "emulated.so")
    emulator.configure()
    for name in OPS:
        one = len(getattr(torch.ops.fastrl, name).default._schema.returns) == 1

        def scan(*args: Any, name: str = name, one: bool = one) -> Any:
            outputs = emulator(name, *args)
            return outputs[0] if one else tuple(outputs)

        KERNELS[f"fastrl::{name}"] = scan, False
    _binary._SCANS["cuda"] = "CUDA C++"
    launch = _head._bwd_narrow  # the one launcher that no op stands before
    _head._bwd_narrow = lambda *args: tree_map(on_gpu, with_inner(launch, *args))


def _patch_triton() -> None:
    from kernels import bfloat16, interpreter
    from triton.runtime.interpreter import InterpretedFunction

    bfloat16.install()
    interpreter._without_idle_work()
    InterpretedFunction.device_caches = property(_lacking("compiled kernels"))


_patch_torch()
_record_kernels()
_patch_fastrl()
_patch_triton()
Numbered().__enter__()
GPU.__enter__()
