"""The kernels of csrc/cuda on a CPU: built with g++ and called by ctypes.

Every array stands in memory of its own that ends, or begins, where the next byte may not be touched.
"""

import ctypes
import shutil
import subprocess
from ctypes import POINTER, Structure, byref, c_char_p, c_double, c_int32, c_int64, c_size_t, c_void_p
from pathlib import Path

import torch
from torch import Tensor

import fastrl

HERE = Path(__file__).parent
CSRC = Path(fastrl.__file__).parent.parent / "csrc"
FLAGS = ["-std=c++17", "-O1", "-fPIC", "-pthread", "-ffp-contract=off", "-Wall"]
FLAGS += ["-Wno-unknown-pragmas", "-include", str(HERE / "emulator.h")]
FLAGS += [f"-I{HERE / 'shim'}", f"-I{HERE}", f"-I{CSRC}"]
# Each ends in a trap, which the emulator reports.
FLAGS += ["-fsanitize=alignment,bounds,shift,signed-integer-overflow"]
FLAGS += ["-fsanitize-undefined-trap-on-error"]

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
FORWARD = ["gae", "lambda_returns", "discounted_returns", "vtrace", "retrace_returns"]
BACKWARD = ["td_bwd", "vtrace_bwd", "retrace_returns_bwd"]
OUTPUTS = {"gae": 2, "vtrace": 4, "retrace_returns": 2, "vtrace_bwd": 2, "retrace_returns_bwd": 3}
OUTPUTS |= {"n_step_backward": 2, "value_grads": 3}

FLOATS = ["reward", "value", "next_value", "q_value", "log_ratio", "gamma", "gae_lambda"]
RESULTS = ["grad_first", "grad_second", "td_error", "carried"]
BOOLS = ["terminated", "truncated", "mask"]


class _Array(Structure):
    _fields_ = [("data", c_void_p), ("row_stride", c_int64), ("step_stride", c_int64)]


class _Call(Structure):
    _fields_ = [
        ("cu_seqlens", c_void_p), ("count", c_int64), ("length", c_int64), ("total", c_int64),
        *((name, _Array) for name in (*FLOATS, "bootstrap", *RESULTS, *BOOLS)),
        ("out", _Array * 4),
        *((name, c_double) for name in ("constant_gamma", "constant_lambda", "rho_clip", "c_clip")),
        ("n", c_int64), ("flags", c_int64), ("workers", c_int32), ("seed", c_int32),
    ]  # fmt: skip


def build(folder: Path) -> Path:
    """The library; its parts are compiled side by side."""
    compiler = shutil.which("g++")
    assert compiler is not None
    parts = [("emulator.cpp", 0), ("kernels.cpp", 0), ("kernels.cpp", 1)]
    objects = [str(folder / f"{i}.o") for i in range(len(parts))]
    running = [
        subprocess.Popen([compiler, *FLAGS, f"-DPART={part}", "-c", str(HERE / file), "-o", to])
        for (file, part), to in zip(parts, objects, strict=True)
    ]
    assert not any([process.wait() for process in running])
    library = folder / "kernels.so"
    subprocess.run([compiler, "-shared", "-pthread", *objects, "-o", str(library)], check=True)
    return library


class Kernels:
    def __init__(self, library: Path) -> None:
        self._library = ctypes.CDLL(str(library))
        self._library.guarded.restype = c_void_p
        self._library.guarded.argtypes = [c_size_t, ctypes.c_bool]
        self._library.free_guarded.argtypes = [c_void_p, c_size_t, ctypes.c_bool]
        for name in ("scan_forward", "scan_backward", "n_step", "n_step_backward", "value_grads"):
            function = getattr(self._library, name)
            function.restype = c_char_p
            function.argtypes = [c_int32, c_int32, POINTER(_Call)]
        self.workers, self.seed = 3, 0
        self._held: list[tuple[int, int, bool]] = []

    def __call__(self, kernel: str, like: Tensor, **arguments: object) -> list[Tensor]:
        """All outputs of the kernel; of those not in `wanted` (indices) no entry is written.

        like: shape and layout of the steps; it and the other arrays are of any float dtype.
        """
        outputs = OUTPUTS.get(kernel, 1)
        wanted = arguments.pop("wanted", range(outputs))
        call, results = self._call(kernel, like, outputs, wanted, arguments)
        function, number = getattr(self._library, kernel, None), 0
        for name, kernels in (("scan_forward", FORWARD), ("scan_backward", BACKWARD)):
            if kernel in kernels:
                function, number = getattr(self._library, name), kernels.index(kernel)
        try:
            if like.numel():  # nothing is launched otherwise
                error = function(number, DTYPES.index(self._dtype), byref(call))
                assert not error, error.decode()
            return [
                torch.empty(0) if x is None else x[0].as_strided(x[1].shape, x[1].stride()).clone()
                for x in results
            ]
        finally:
            for held in self._held:
                self._library.free_guarded(*held)
            self._held.clear()

    def _call(self, kernel, like, outputs, wanted, arguments):
        self._dtype = arguments.pop("dtype", None) or like.dtype
        result = torch.float64 if self._dtype is torch.float64 else torch.float32
        cu_seqlens = arguments.pop("cu_seqlens", None)
        call = _Call(
            constant_gamma=1.0, constant_lambda=1.0, rho_clip=1.0, c_clip=1.0,
            workers=self.workers, seed=self.seed, total=like.numel(),
        )  # fmt: skip
        if cu_seqlens is None:
            call.length = like.shape[-1]
            call.count = like.numel() // max(1, call.length)
        else:
            call.cu_seqlens = self._guard(cu_seqlens)[0]
            call.count = len(cu_seqlens) - 1
        for name, x in arguments.items():
            if x is None:
                continue
            if name == "bootstrap":
                x = x.to(self._dtype).contiguous().reshape(-1)
                setattr(call, name, _Array(self._guard(x)[0], 1, 0))
            elif isinstance(x, Tensor):
                dtype = (
                    torch.uint8 if name in BOOLS else result if name in RESULTS else self._dtype
                )
                assert x.shape == like.shape
                setattr(call, name, self._array(x, dtype, cu_seqlens is not None)[0])
            elif name in ("gamma", "gae_lambda"):
                setattr(call, {"gamma": "constant_gamma"}.get(name, "constant_lambda"), x)
            else:
                setattr(call, name, x)
        results = []
        for k in range(outputs):
            if k not in wanted:
                results.append(None)
            elif kernel == "value_grads" and k == 2:  # an entry a row, and 0 to begin with
                at, memory = self._guard(torch.zeros(call.count, dtype=result))
                call.out[k] = _Array(at, 1, 0)
                results.append((memory, memory))
            else:
                empty = torch.empty_like(like, dtype=result)
                call.out[k], memory = self._array(empty, result, cu_seqlens is not None, fill=False)
                results.append((memory, empty))
        return call, results

    def _array(self, x: Tensor, dtype, packed: bool, fill: bool = True):
        """x as it lies, gaps included, in guarded memory."""
        if x.dtype is torch.bool:
            x = x.view(torch.uint8)
        elif x.dtype is not dtype:
            x = torch.empty_strided(x.shape, x.stride(), dtype=dtype).copy_(x)
        last = sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True)) + 1
        base = x.as_strided((last,), (1,)) if x.numel() else x.reshape(-1)
        at, memory = self._guard(base, fill)
        step = x.stride(-1)
        rows = [(n, s) for n, s in zip(x.shape[:-1], x.stride()[:-1], strict=True) if n > 1]
        row = step if packed else rows[-1][1] if rows else 0
        return _Array(at, row, step), memory

    def _guard(self, x: Tensor, fill: bool = True) -> tuple[int, Tensor]:
        """Every other array ends at the edge, the others begin there."""
        size, at_end = max(1, x.numel()) * x.element_size(), len(self._held) % 2 == 0
        at = self._library.guarded(size, at_end)
        self._held.append((at, size, at_end))
        buffer = (ctypes.c_char * size).from_address(at)
        memory = torch.frombuffer(buffer, dtype=x.dtype, count=max(1, x.numel()))[: x.numel()]
        if fill:
            memory.copy_(x)
        return at, memory
