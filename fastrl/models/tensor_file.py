"""safetensors files, one tensor at a time: no second copy of all weights is made in memory."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_DTYPES = {code: dtype for dtype, code in _CODES.items()}
_ALIGNMENT = 8  # bytes, of the header


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors by name; those that share memory, on any device, are written apart.

    `safetensors.torch.save_file` refuses shared memory, holds all tensors on the CPU at once (old
    versions twice), and hides the OSError of a full disk.

    Raises:
        TypeError: a dtype that the format does not have.  OSError: path cannot be written.
    """
    for name, tensor in tensors.items():
        if tensor.dtype not in _CODES:
            raise TypeError(
                f"save: expected {name} of a dtype that safetensors has, got {tensor.dtype}. "
                "Convert it in state_dict."
            )
    # Widest first, as the library does it: then each tensor is aligned.
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        tensor, start = tensors[name], end
        end += tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _CODES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            flat = tensors[name].detach().to("cpu").contiguous().reshape(-1)
            file.write(flat.view(torch.uint8).numpy().data)


class TensorFile:
    """The tensors of a file, each read when it is asked for.

    Raises:
        OSError: there is no such file.
        ValueError: it is not a safetensors file, or cut short.
        ImportError: safetensors is not installed.
    """

    def __init__(self, path: Path) -> None:
        safetensors = import_safetensors()
        try:
            self._file = safetensors.safe_open(path, framework="pt")
        except safetensors.SafetensorError as error:
            raise ValueError(str(error)) from error
        self.names = set(self._file.keys())

    def kinds(self) -> dict[str, str]:
        """As `kinds` has them, without reading a tensor."""
        views = {name: self._file.get_slice(name) for name in self.names}
        return {
            # Of a dtype that torch does not have, the format's own word.
            name: f"{_DTYPES.get(view.get_dtype(), view.get_dtype())} {tuple(view.get_shape())}"
            for name, view in views.items()
        }

    def read(self, name: str) -> Tensor:
        """A tensor in memory of its own, on the CPU.

        Raises:
            KeyError: the file has no such tensor.
        """
        if name not in self.names:
            raise KeyError(name)
        return self._file.get_tensor(name).clone()


def kinds(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """dtype and shape of each tensor, in words."""
    return {name: f"{tensor.dtype} {tuple(tensor.shape)}" for name, tensor in tensors.items()}


def first_difference(
    wanted: Mapping[str, str], found: Mapping[str, str]
) -> tuple[str, str, str] | None:
    """The first name, in order, at which two `kinds` differ, and what each has there."""
    for name in sorted(wanted.keys() | found.keys()):
        here, there = wanted.get(name, "nothing"), found.get(name, "nothing")
        if here != there:
            return name, here, there
    return None


def import_safetensors() -> Any:
    """The library, which is optional."""
    try:
        import safetensors
    except ImportError as error:
        raise ImportError(
            'Saved models need safetensors. Install it with: pip install "fastrl[train]"'
        ) from error
    return safetensors
