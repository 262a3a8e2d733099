"""Peak extra memory of a call: what the process held at its worst, beyond what it held before.

Linux keeps the high-water mark of a process's resident memory and resets it on request, so the
figure covers everything that the call touches: tensors, malloc, numpy, a compiler's buffers. It
counts pages, and is good to about a megabyte. On a GPU it is what torch's allocator handed out.
"""

import ctypes
import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from fastrl import _C

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")
_RESET_HIGH_WATER = "5"


def can_measure(device: torch.device) -> bool:
    if device.type == "cuda":
        return True
    return "VmHWM" in _STATUS.read_text() if _STATUS.exists() and _CLEAR.exists() else False


def peak_extra_mib(call: Callable[[], Any], device: torch.device) -> float:
    """Call once before: what is loaded or compiled on first use is not the call's memory."""
    gc.collect()
    if device.type == "cuda":
        return _peak_extra_mib_cuda(call, device)
    # Pages that malloc, or we, have kept free would be used again without a trace.
    ctypes.CDLL(None).malloc_trim(0)
    _C.release_memory()
    _CLEAR.write_text(_RESET_HIGH_WATER)
    before = _high_water_kib()
    outputs = call()
    peak = _high_water_kib()
    del outputs
    return max(0, peak - before) / 1024


@contextmanager
def settled() -> Iterator[None]:
    """What exists now is passed over by the collections inside: of all that torch and the peers
    have brought, each would take a fifth of a second."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def release(device: torch.device) -> None:
    """What nobody holds any more, back to the device: the next one wants the gigabytes."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _peak_extra_mib_cuda(call: Callable[[], Any], device: torch.device) -> float:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    outputs = call()
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device)
    del outputs
    return (peak - before) / 2**20


def _high_water_kib() -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1])
    raise OSError("bench: expected VmHWM in /proc/self/status, got none. Use Linux for memory.")
