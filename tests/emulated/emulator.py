"""The kernels and launchers of csrc/cuda on a CPU, built with g++: torch.ops.fastrl_emulated.

The ops there have the schemas of torch.ops.fastrl. Every tensor stands in memory of its own that
ends, or begins, where the next byte may not be touched.
"""

import ctypes
import os
import subprocess
import weakref
from ctypes import c_bool, c_size_t, c_void_p
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, library

import fastrl

HERE = Path(__file__).parent
CSRC = Path(fastrl.__file__).parent.parent / "csrc"
TORCH = Path(torch.__file__).parent
OPS = ["gae", "lambda_returns", "discounted_returns", "vtrace", "retrace_returns", "n_step_returns"]
OPS += ["td_bwd", "vtrace_bwd", "retrace_returns_bwd", "n_step_returns_bwd", "value_grads"]

FLAGS = ["-std=c++17", "-O1", "-fPIC", "-pthread", "-fvisibility=hidden", "-ffp-contract=off"]
FLAGS += ["-Wall", "-Wno-unknown-pragmas", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
FLAGS += ["-include", str(HERE / "emulator.h"), f"-I{HERE / 'shim'}", f"-I{HERE}", f"-I{CSRC}"]
FLAGS += [f"-isystem{TORCH / 'include'}"]
# Of device code: each ends in a trap, which the emulator reports.
CHECKS = ["-fsanitize=alignment,bounds,shift,signed-integer-overflow"]
CHECKS += ["-fsanitize-undefined-trap-on-error"]
EMULATOR = []
if "FASTRL_WATCHED" in os.environ:  # tests/threads/test_cuda_races.py
    CHECKS += ["-fsanitize=thread", "-g1", "--param=tsan-distinguish-volatile=1"]
    EMULATOR += ["-DFASTRL_WATCHED"]
PARTS = [
    ("ops.cpp", []), ("kernels.cpp", ["-DPART=0", *CHECKS]), ("kernels.cpp", ["-DPART=1", *CHECKS]),
    ("emulator.cpp", EMULATOR),
]  # fmt: skip


def compile_parts(compiler: str, folder: Path, parts: list, link: list[str]) -> Path:
    """A library of these files, which are compiled side by side, each with its own flags."""
    objects = [str(folder / f"{i}.o") for i in range(len(parts))]
    running = [
        subprocess.Popen([compiler, *FLAGS, *flags, "-c", str(HERE / file), "-o", to])
        for (file, flags), to in zip(parts, objects, strict=True)
    ]
    assert not any([process.wait() for process in running])
    shared = folder / "emulated.so"
    command = [compiler, "-shared", "-pthread", *objects, *link, "-o", str(shared)]
    subprocess.run(command, check=True)
    return shared


def build(compiler: str, folder: Path) -> Path:
    link = [f"-L{TORCH / 'lib'}", "-ltorch_cpu", "-lc10"]
    return compile_parts(compiler, folder, PARTS, link)


class Emulator:
    def __init__(self, path: Path) -> None:
        self.path = path
        self._schemas = library.Library("fastrl_emulated", "DEF")
        for name in OPS:
            schema = str(getattr(torch.ops.fastrl, name).default._schema)
            self._schemas.define(schema.removeprefix("fastrl::"))
        torch.ops.load_library(str(path))
        self._library = ctypes.CDLL(str(path))
        self._library.emulator_guarded.restype = c_void_p
        self._library.emulator_guarded.argtypes = [c_size_t, c_bool]
        self._library.emulator_free.argtypes = [c_void_p, c_size_t, c_bool]
        self._at_end = False

    def configure(self, workers: int = 3, seed: int = 0) -> None:
        """How many blocks run at a time, and the order in which they start."""
        self._library.emulator_configure(workers, seed)

    def __call__(self, op: str, *arguments: Any) -> list[Tensor]:
        """All that the op gives."""
        guarded = [self.guarded(x) if isinstance(x, Tensor) else x for x in arguments]
        outputs = getattr(torch.ops.fastrl_emulated, op)(*guarded)
        return [outputs] if isinstance(outputs, Tensor) else list(outputs)

    def guarded(self, x: Tensor) -> Tensor:
        """x as it lies, gaps included."""
        if x.numel() == 0:
            return x
        last = sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True)) + 1
        size, self._at_end = last * x.element_size(), not self._at_end
        at = self._library.emulator_guarded(size, self._at_end)
        buffer = (ctypes.c_char * size).from_address(at)
        weakref.finalize(buffer, self._library.emulator_free, at, size, self._at_end)
        memory = torch.frombuffer(buffer, dtype=x.dtype, count=last)
        memory.copy_(x.as_strided((last,), (1,)))
        return memory.as_strided(x.shape, x.stride())
