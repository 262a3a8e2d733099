"""The ceilings: how fast this machine copies memory, and how fast it multiplies matrices."""

from pathlib import Path

import torch

_LEAST = 256 * 2**20
_MOST = 1024 * 2**20
_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
_SQUARE = {"cpu": 2048, "cuda": 8192}  # large enough to be at full rate, and no larger


def last_level_cache_bytes() -> int:
    """0 where the system does not tell."""
    sizes = [p.read_text().strip() for p in _CACHES.glob("index*/size")]
    units = {"K": 2**10, "M": 2**20}
    return max((int(s[:-1]) * units[s[-1]] for s in sizes if s[-1:] in units), default=0)


class Copy:
    """Two buffers far bigger than the caches; a call copies one.

    On the CPU four times the last-level cache each (256 MB to 1 GB), on a GPU 1 GB.
    """

    def __init__(self, device: torch.device) -> None:
        on_cpu = device.type == "cpu"
        size = min(max(4 * last_level_cache_bytes(), _LEAST), _MOST) if on_cpu else _MOST
        self._source = torch.zeros(size // 4, device=device)  # zeros: each page is really there
        self._target = torch.ones(size // 4, device=device)
        self.bytes = 2 * size  # read and written

    def __call__(self) -> None:
        self._target.copy_(self._source)


class Product:
    """The vendor's matrix product [m, k] x [k, n] in the dtype of a case; random: on zeros some
    processors are faster."""

    def __init__(
        self, device: torch.device, dtype: torch.dtype, shape: tuple[int, int, int] | None
    ) -> None:
        self.shape = shape or (_SQUARE[device.type],) * 3
        m, k, n = self.shape
        self._a = torch.randn(m, k, device=device).to(dtype)
        # [n, k], as the weight of a linear layer lies in memory
        self._b = torch.randn(n, k, device=device).to(dtype)
        self._out = torch.empty(m, n, device=device, dtype=dtype)
        self.flops = 2 * m * k * n

    def __call__(self) -> None:
        with torch.no_grad():
            torch.mm(self._a, self._b.T, out=self._out)
