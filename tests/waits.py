"""Counts what would wait for a GPU, on a CPU: each look at a tensor that would be on the device."""

import contextlib
import sys
from collections import Counter

import torch
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from fastrl import _transfer, layout

# Whose result's size, or whose result itself, the host has to know.
_WAITING = {
    "_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim",
    "unique_consecutive", "bincount", "equal", "is_nonzero",
}  # fmt: skip
_TO_THE_HOST = {"cpu", "tolist", "numpy", "__array__"}


class Waits(TorchDispatchMode):
    """`device` is what is computed from the tensors that `on_the_device` was told of, or from what
    `on_device` has moved; `counts` are the looks at it, by what has looked."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()
        self._device = {}  # storages, held so that no other gets their address

    def on_the_device(self, *tensors):
        for x in tensors:
            self._device[x.untyped_storage()._cdata] = x

    def is_on_it(self, x):
        return isinstance(x, torch.Tensor) and x.untyped_storage()._cdata in self._device

    def on_the_host(self, x):
        """A copy there, which was waited for."""
        copy = x.detach().clone()
        self._device.pop(copy.untyped_storage()._cdata, None)
        return copy

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if any(map(self.is_on_it, pytree.tree_leaves((args, kwargs)))):
            if reason := _why_it_waits(func, args, kwargs):
                self.counts[reason] += 1
        else:
            return func(*args, **kwargs)
        out = func(*args, **kwargs)
        self.on_the_device(*(x for x in pytree.tree_leaves(out) if isinstance(x, torch.Tensor)))
        return out


def _why_it_waits(func, args, kwargs):
    name = func.overloadpacket.__name__
    if name in _WAITING:
        return name
    if name == "repeat_interleave" and kwargs.get("output_size") is None:
        return "repeat_interleave of an unknown size"
    if name == "segment_reduce" and not kwargs.get("unsafe"):
        return "segment_reduce that looks at the lengths"
    if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
        if any(x is not None and x.dtype == torch.bool for x in args[1]):
            return f"{name} by a mask"
    return None


class _ToTheHost(TorchFunctionMode):
    """What a CPU's tensors do without an op of aten."""

    def __init__(self, waits):
        super().__init__()
        self._waits = waits

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        if not args or not self._waits.is_on_it(args[0]):
            return func(*args, **kwargs)
        if name in _TO_THE_HOST or (name == "to" and "cpu" in args[1:]):
            self._waits.counts[name] += 1
            return func(self._waits.on_the_host(args[0]), *args[1:], **kwargs)
        return func(*args, **kwargs)


@contextlib.contextmanager
def counted_waits(monkeypatch, *on_the_device):
    """Waits: of what happens within."""
    waits, own = Waits(), _transfer.on_device

    def marked(tensors, device):
        moved = [x if waits.is_on_it(x) else waits.on_the_host(x) for x in own(tensors, device)]
        waits.on_the_device(*moved)
        return moved

    for module in list(sys.modules.values()):
        # Of layouts, those that a batch is built from are on the host, and stay there.
        if vars(module).get("on_device") is own and module is not layout:
            monkeypatch.setattr(module, "on_device", marked)
    waits.on_the_device(*on_the_device)
    with waits, _ToTheHost(waits):
        yield waits
    monkeypatch.undo()
