"""Launchers run with Triton's interpreter in the place of a GPU.

In a process of its own: Triton chooses when it is imported, and the rest of the tests compile.
"""

import dataclasses
import importlib
import io
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import numpy as np
import torch


class Interpreter:
    def __enter__(self) -> "Interpreter":
        self._pool = ProcessPoolExecutor(1, get_context("spawn"), initializer=_start)
        return self

    def __exit__(self, *_: Any) -> None:
        self._pool.shutdown()

    def __call__(self, module: str, function: str, *arguments: Any) -> Any:
        """As if `function` were called here, with tensors on the CPU; it may write to them."""
        job = self._pool.submit(_run, module, function, _pack(arguments))
        result, after = _unpack(job.result())
        for mine, theirs in zip(arguments, after, strict=True):
            if isinstance(mine, torch.Tensor):
                # All of the storage: what was written beside a strided tensor is to be seen too.
                mine.untyped_storage().copy_(theirs.untyped_storage())
        return result


def _start() -> None:
    assert "triton" not in sys.modules
    os.environ["TRITON_INTERPRET"] = "1"
    torch.set_num_threads(1)
    np.seterr(all="ignore")  # the kernels make infinities and NaN on purpose
    torch.use_deterministic_algorithms(True, warn_only=True)  # fresh tensors hold NaN
    _without_idle_work()


def _without_idle_work() -> None:
    """Leave out what the interpreter does again and again to no effect: half of its time.

    It computes whether whole numbers overflow, of which nobody hears without its option debug. And
    it patches triton.language for each call of a device function, though all functions of a module
    see the same: once for each module that a kernel calls into is enough.
    """
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    assert not builder.options.debug
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
    patch = interpreter._patch_lang
    seen: set[int] = set()  # the globals of the modules, until the kernel's end

    def patch_once(fn: Any) -> Any:
        if id(fn.__globals__) in seen:
            return None  # which nobody asks for within a kernel
        is_kernel = not seen
        seen.add(id(fn.__globals__))
        scope = patch(fn)
        if is_kernel and scope is not None:  # in an older Triton a patch stays
            restore = scope.restore

            def end() -> None:
                seen.clear()
                restore()

            scope.restore = end
        return scope

    interpreter._patch_lang = patch_once


def _run(module: str, function: str, packed: bytes) -> bytes:
    arguments = _unpack(packed)
    result = getattr(importlib.import_module(module), function)(*arguments)
    return _pack((result, arguments))


def _pack(x: Any) -> bytes:
    """With whole storages, so that strides and what lies between rows arrive as well."""
    buffer = io.BytesIO()
    torch.save(x, buffer)
    return buffer.getvalue()


def _unpack(packed: bytes) -> Any:
    return torch.load(io.BytesIO(packed), weights_only=True)
