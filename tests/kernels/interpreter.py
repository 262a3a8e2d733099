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
    _watched()
    importlib.import_module("bfloat16").install()


def _watched() -> None:
    """An error where a program reads or writes beside the launch's tensors, or what another program
    of the launch writes: on a GPU that is foreign memory, or a race, and here often nothing."""
    from triton.runtime import interpreter

    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    init, memory = executor._init_args_hst, _Memory()
    load, store = builder.create_masked_load, builder.create_masked_store

    def init_watched(self: Any, *arguments: Any) -> Any:
        found = init(self, *arguments)
        memory.of_launch([*found[0], *found[1].values()])
        return found

    def load_watched(self: Any, pointers: Any, mask: Any, *rest: Any, **named: Any) -> Any:
        memory.touch(self.grid_idx, pointers, mask, False)
        return load(self, pointers, mask, *rest, **named)

    def store_watched(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        memory.touch(self.grid_idx, pointers, mask, True)
        return store(self, pointers, value, mask, *rest)

    executor._init_args_hst = init_watched
    builder.create_masked_load, builder.create_masked_store = load_watched, store_watched


class _Memory:
    """Of each byte of a launch's tensors: which program has read it, and which has written it."""

    NOBODY, MANY = -1, -2

    def of_launch(self, arguments: list[Any]) -> None:
        spans: list[list[int]] = []
        tensors = [getattr(x, "base", x) for x in arguments]  # of a descriptor
        tensors = [x for x in tensors if isinstance(x, torch.Tensor) and x.numel() > 0]
        for x in sorted(tensors, key=lambda x: x.data_ptr()):
            last = sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))
            begin, end = x.data_ptr(), x.data_ptr() + (last + 1) * x.element_size()
            if spans and begin <= spans[-1][1]:
                spans[-1][1] = max(spans[-1][1], end)
            else:
                spans.append([begin, end])
        self.begin, self.end = np.array(spans or [[0, 0]], np.uint64).T
        sizes = (self.end - self.begin).astype(np.int64)
        self.first = sizes.cumsum() - sizes
        self.reader = np.full(sizes.sum(), self.NOBODY)
        self.writer = self.reader.copy()

    def touch(self, program: tuple[int, ...], pointers: Any, mask: Any, writes: bool) -> None:
        at = pointers.data[np.broadcast_to(mask.data, pointers.data.shape)]
        span = np.searchsorted(self.begin, at, side="right") - 1
        size = pointers.get_element_ty().primitive_bitwidth // 8
        if (span < 0).any() or (at + np.uint64(size) > self.end[span]).any():
            raise IndexError(f"program {program} is beside the tensors of its launch")
        byte = self.first[span] + (at - self.begin[span]).astype(np.int64)
        others = [self.writer[byte], self.reader[byte]] if writes else [self.writer[byte]]
        for other in others:
            if ((other != self.NOBODY) & (other != program[0])).any():
                raise IndexError(f"program {program} is where another one reads or writes")
        if writes:
            self.writer[byte] = program[0]
        else:
            reader = self.reader[byte]
            alone = (reader == self.NOBODY) | (reader == program[0])
            self.reader[byte] = np.where(alone, program[0], self.MANY)


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
