"""What a launcher makes Triton compile, compiled without a GPU, and what the code takes of one.

Triton's own launch path derives types and specialisation and then asks its cache hook, which notes
the request and declines: so what is compiled here is what a GPU would be given. triton.compile
keeps its results in Triton's cache, by hash of the source, the request and the compiler.

Spills are judged by the stack: ptxas keeps spilled registers there, and the kernels have no other
use for one, so that 0 bytes of stack and of local memory mean no spills.
"""

import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

# Shared memory that one block may have, in bytes: the CUDA programming guide, compute capabilities.
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
ARCHITECTURES = tuple(SHARED_LIMIT)
REGISTERS_OF_A_THREAD, REGISTERS_OF_A_BLOCK = 255, 65536
# The blocks were chosen by what this Triton makes of them, which CI installs: no spills. What other
# versions make of the same source differs by some registers: a few kernels spill there.
CHOSEN_BY = "3.8."
SPILLS = 0 if triton.__version__.startswith(CHOSEN_BY) else 96  # bytes a thread


@dataclass(frozen=True)
class Request:
    """One kernel in one specialisation, for one architecture."""

    kernel: Any  # triton's JITFunction
    arch: int
    key: str  # Triton's: specialisation and options
    signature: dict[str, str]
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], Any]
    options: dict[str, Any]

    @property
    def name(self) -> str:
        module = self.kernel.module.removeprefix("fastrl.kernels.")
        return f"{module}.{self.kernel.__name__}"

    @property
    def identity(self) -> tuple[str, int, str]:
        return self.name, self.arch, self.key

    @property
    def named_constants(self) -> dict[str, Any]:
        return {self.kernel.arg_names[i]: value for (i, *_), value in self.constants.items()}

    def __str__(self) -> str:
        types = " ".join(sorted({t for t in self.signature.values() if t.startswith("*")}))
        constants = ", ".join(f"{name}={value}" for name, value in self.named_constants.items())
        return f"{self.name} sm_{self.arch} {types} {constants}"


@dataclass(frozen=True)
class Compiled:
    request: Request
    registers: int  # a thread
    stack: int  # bytes a thread, local memory included
    shared: int  # bytes a block
    ttgir: str
    ptx: str
    cubin: bytes

    @property
    def name(self) -> str:
        return self.request.name

    @property
    def takes(self) -> tuple[int, int]:
        return self.shared, self.registers

    @property
    def threads(self) -> int:
        return 32 * self.request.options["num_warps"]


class _NoDevice:
    """Stands in for Triton's driver, far enough for a launch to reach the cache hook."""

    def __init__(self, arch: int):
        self.arch = arch

    def get_current_device(self) -> str:
        return f"sm_{self.arch}"  # no real device's number: Triton keeps what it knows by device

    def get_current_stream(self, device: str) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)


def record(arch: int, function: Callable[..., Any], *arguments: Any) -> list[Request]:
    """Calls a launcher, and returns what it would have had compiled; nothing is launched."""
    requests: list[Request] = []

    def hook(*, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        options = json.loads(compile["specialization_data"])["options"]
        for name, value in options.items():
            options[name] = tuple(value) if isinstance(value, list) else value
        parts = (compile[part] for part in ("key", "signature", "constants"))
        requests.append(Request(fn.jit_function, arch, *parts, compile["configs"][0], options))
        return True  # do not compile, do not launch

    before = triton.knobs.runtime.jit_cache_hook
    triton.knobs.runtime.jit_cache_hook = hook
    triton.runtime.driver.set_active(_NoDevice(arch))
    try:
        function(*arguments)
    finally:
        triton.knobs.runtime.jit_cache_hook = before
        triton.runtime.driver.set_active(None)  # whatever this machine has, when it is next asked
    return requests


def compile_one(request: Request) -> Compiled:
    source = ASTSource(request.kernel, request.signature, request.constants, request.attributes)
    target = GPUTarget("cuda", request.arch, 32)
    kernel = triton.compile(source, target=target, options=request.options)
    asm = kernel.asm
    registers, stack = _usage(asm["cubin"])
    return Compiled(
        request, registers, stack, kernel.metadata.shared, asm["ttgir"], asm["ptx"], asm["cubin"]
    )


def compile_all(requests: list[Request]) -> list[Compiled]:
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # the compiler releases Python's lock
        return list(pool.map(compile_one, requests))


def machine_code(kernel: Compiled) -> str:
    return _dump("--dump-sass", kernel.cubin)


def _dump(what: str, cubin: bytes) -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [_cuobjdump(), what, str(path)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _usage(cubin: bytes) -> tuple[int, int]:
    text = _dump("--dump-resource-usage", cubin)
    found = re.findall(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text)
    assert found and len(found) == text.count("REG:"), f"cuobjdump: expected usage, got {text}"
    return max(int(r) for r, _, _ in found), sum(int(s) + int(m) for _, s, m in found)


def _cuobjdump() -> str:
    """Triton's wheel brings one; a Triton built elsewhere may not."""
    try:
        return triton.knobs.nvidia.cuobjdump.path
    except RuntimeError:
        path = shutil.which("cuobjdump")
        assert path, "expected cuobjdump in triton's package or on PATH, found none"
        return path


def over_budget(kernel: Compiled) -> list[str]:
    """What this code takes that it may not: one line each."""
    limit = SHARED_LIMIT[kernel.request.arch]
    registers = kernel.registers * kernel.threads
    faults = {
        f"spills: {kernel.stack} bytes of stack a thread": kernel.stack > SPILLS,
        f"{kernel.registers} registers a thread": kernel.registers > REGISTERS_OF_A_THREAD,
        f"{registers} registers a block": registers > REGISTERS_OF_A_BLOCK,
        f"{kernel.shared} bytes of shared memory, of {limit}": kernel.shared > limit,
        "rounds float32 to tf32": ".tf32" in kernel.ptx,
        "adds in whatever order": re.search(r"\b(atom|red)\.", kernel.ptx) is not None,
    }
    return [f"{kernel.request}: {fault}" for fault, found in faults.items() if found]


def table(kernels: list[Compiled]) -> list[str]:
    """A line for each kernel and architecture: the most that one of its configurations takes."""
    groups: dict[tuple[str, int], list[Compiled]] = {}
    for kernel in kernels:
        groups.setdefault((kernel.name, kernel.request.arch), []).append(kernel)
    width = max(len(name) for name, _ in groups)
    rows = [f"{'kernel':{width}}  arch    compiled  registers  shared B  stack and spills B"]
    for (name, arch), group in sorted(groups.items()):
        most = [max(getattr(k, part) for k in group) for part in ("registers", "shared", "stack")]
        rows.append(
            f"{name:{width}}  sm_{arch:<4} {len(group):8}  {most[0]:9}  {most[1]:8}  {most[2]:18}"
        )
    return rows
