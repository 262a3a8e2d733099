"""The logits of a language model's head, a slice of the vocabulary or of the rows at a time.

Matrix products are the vendor library's; what becomes of a slice is ours. Logits are float32,
whatever the dtype of hidden and weight: on a CPU the slices of 16-bit inputs are promoted, on a GPU
the product of 16-bit inputs gives float32.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fastrl.ops import _binary
from fastrl.ops._quick_product import is_quick, quick_product

# Logits of a slice, or 256 columns of all rows where those are more. CPU: a slice stays in the
# cache between product and passes, and larger ones make the product no faster; where malloc gives
# each of several slices other pages, they add up. GPU: 16 384 columns of 8192 rows, 0.5 GB.
_CPU_SLICE, _GPU_SLICE = 2**20, 2**27
_LEAST_WIDTH = 256
# Rows of a slice that has the whole vocabulary: with fewer the products become slower.
_CPU_ROWS, _GPU_ROWS = 256, 1024
# Entries of a 16-bit gradient, 1 GB, that waits for its products. They add to a float32 gradient as
# large as the weight, which is read and written each time: behind 1024 rows, at D = 4096, for about
# as long as the product takes.
_GPU_GRADIENT = 2**29
ALL = slice(None)

_bwd_inplace = _binary.op("token_logprobs_bwd_")
_empty = _binary.op("empty_matrix")


class Head:
    """hidden [N, D], weight [V, D], bias [V] or None; softcap or None."""

    def __init__(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None
    ) -> None:
        dtype = hidden.dtype
        self._on_gpu = hidden.device.type == "cuda"
        self._is_narrow = self._on_gpu and dtype == weight.dtype and dtype != torch.float32
        self.has_half_factors = self._is_narrow and dtype == torch.float16
        self.dtype = dtype if self._is_narrow else torch.float32  # of the products' factors
        self.hidden = hidden.to(self.dtype)
        self.weight, self.bias, self.softcap = weight, bias, softcap
        self._buffers: dict[str, Tensor] = {}
        self._whole_weight: Tensor | None = None

    def vocab_slices(self) -> Iterator[slice]:
        """For all rows at once."""
        budget = _GPU_SLICE if self._on_gpu else _CPU_SLICE
        width = max(_LEAST_WIDTH, budget // max(1, len(self.hidden)) // 64 * 64)
        return _cut(len(self.weight), width)

    def row_slices(self) -> Iterator[list[slice]]:
        """For the whole vocabulary at once; of one size, since small ones are slow. Together those
        whose gradients wait for each other."""
        rows = len(self.hidden)
        count = max(1, round(rows / (_GPU_ROWS if self._on_gpu else _CPU_ROWS)))
        size = max(1, -(-rows // count))
        # Those of float16 have a scale each, and those of float32 lie over the slice's logits.
        waits = self._is_narrow and not self.has_half_factors
        together = max(1, _GPU_GRADIENT // (size * len(self.weight))) if waits else 1
        parts = list(_cut(rows, size))
        return (parts[i : i + together] for i in range(0, len(parts), together))

    def room_for_gradient(self, rows: int) -> Tensor | None:
        """[rows, V] in the dtype of the products' factors; None where it lies over the logits."""
        if not self._is_narrow:
            return None
        return self.buffer("gradient", rows, len(self.weight), dtype=self.dtype)

    def weight_of(self, columns: slice) -> Tensor:
        if columns == ALL:  # converted once, and not for every slice of rows
            if self._whole_weight is None:
                self._whole_weight = self._as_factor(self.weight)
            return self._whole_weight
        return self._as_factor(self.weight[columns])

    def logits(self, rows: slice, columns: slice, *, for_backward: bool = False) -> Tensor:
        """[n, width] float32, perhaps in memory that the next call uses again."""
        x, w = self.hidden[rows], self.weight_of(columns)
        if is_quick(x, w):
            out = quick_product(x, w)
        else:
            out = self.buffer("logits", len(x), len(w))
            self.product(x, w.t(), out)
        if self.bias is not None:
            out += self.bias[columns].float()
        if self.softcap is not None:
            out.div_(self.softcap)
            if for_backward:  # d softcap tanh(x / softcap) / dx: 1 - tanh^2 would cancel
                torch.cosh(out, out=self.buffer("slope", *out.shape)).pow_(-2)
            out.tanh_().mul_(self.softcap)
        return out

    def gradient(
        self,
        logits: Tensor,
        g: Tensor | None,
        h: Tensor | None,
        *saved: Any,
        out: Tensor | None = None,
    ) -> Tensor:
        """Of the products' result, in the dtype of their factors; over the logits where it can.

        saved: token_ids, logprobs, entropy, row_max, log_total, temperature, ignore_index,
            vocab_start.
        out: where a 16-bit one goes, if not into memory that the next call uses again.
        """
        if self._is_narrow and out is None:
            out = self.buffer("gradient", *logits.shape, dtype=self.dtype)
        if out is not None and self.softcap is None:
            _bwd_narrow(out, g, h, logits, *saved)
            return out
        _bwd_inplace(g, h, logits, *saved)
        if self.softcap is not None:
            logits.mul_(self.buffer("slope", *logits.shape))
        return logits if out is None else out.copy_(logits)

    def product(self, a: Tensor, b: Tensor, out: Tensor, *, add: bool = False) -> Tensor:
        """out = a b, or out += a b; sums are float32, and so is out unless it is 16-bit."""
        if out.dtype != torch.float32:
            product = self.product(a, b, self.buffer("product", *out.shape))
            return out.add_(product) if add else out.copy_(product)
        if a.stride(-1) == 1 and is_quick(a, b.t()):  # rows with a weight, not a weight's gradient
            product = quick_product(a, b.t())
            return out.add_(product) if add else out.copy_(product)
        if self._is_narrow and add:
            return torch.addmm(out, a, b, torch.float32, out=out)
        if self._is_narrow:
            return torch.mm(a, b, torch.float32, out=out)
        return torch.addmm(out, a, b, out=out) if add else torch.mm(a, b, out=out)

    def buffer(self, name: str, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Uninitialised or with what a former call left; the first slice is the largest."""
        size = shape[0] * shape[1]
        found = self._buffers.get(name)
        if found is None or found.numel() < size:
            found = self._buffers[name] = empty_matrix(self.hidden, 1, size, dtype)[0]
        return found[:size].view(shape)

    def _as_factor(self, x: Tensor) -> Tensor:
        return x.to(self.dtype)


_bwd_narrow = _binary.launcher("token_logprobs", "token_logprobs_bwd_out")


def empty_matrix(like: Tensor, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Uninitialised. A CPU's system needs longer to find hundreds of megabytes than an op to fill
    them: there it is memory that was used before."""
    if like.device.type == "cpu":
        return _empty(like.new_empty(0, dtype=dtype), rows, columns)
    return like.new_empty((rows, columns), dtype=dtype)


def _empty_fake(like: Tensor, rows: int, columns: int) -> Tensor:
    return like.new_empty((rows, columns))


_binary.register_fake("empty_matrix", _empty_fake)


def _cut(size: int, width: int) -> Iterator[slice]:
    return (slice(at, min(at + width, size)) for at in range(0, size, width))


class CountedRows:
    """The rows that count. A GPU cannot say how many without being waited for: there ignored rows
    take part in the products, as zeros, and in nothing else."""

    def __init__(self, hidden: Tensor, token_ids: Tensor, ignore_index: int) -> None:
        self.hidden, self.token_ids, self._count = hidden, token_ids, len(token_ids)
        self._index: Tensor | None = None  # None: all of them
        self._ignored: Tensor | None = None  # of those that take part; None: none
        self._numbers: Tensor | None = None
        if hidden.device.type == "cpu":
            index = (token_ids != ignore_index).nonzero()[:, 0]
            if len(index) < self._count:
                self._index = index
                self.hidden, self.token_ids = hidden[index], token_ids[index]
        else:
            self._ignored = token_ids == ignore_index
            # NaN times 0 would be NaN
            self.hidden = hidden.masked_fill(self._ignored[:, None], 0)

    def pick(self, x: Tensor) -> Tensor:
        return x if self._index is None else x[self._index]

    def index(self, rows: slice) -> Tensor:
        """Where these rows stand among all."""
        if self._index is not None:
            return self._index[rows]
        if self._numbers is None:
            self._numbers = torch.arange(self._count, device=self.token_ids.device)
        return self._numbers[rows]

    def ignored(self, rows: slice) -> Tensor | None:
        """[n] bool, those of these rows that do not count; None: they all do."""
        return None if self._ignored is None else self._ignored[rows]

    def scatter(self, x: Tensor) -> Tensor:
        """[N, ...], 0 in ignored rows."""
        if self._index is None:
            return x
        return x.new_zeros((self._count, *x.shape[1:])).index_copy_(0, self._index, x)
