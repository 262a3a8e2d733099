"""Which blocks, warps and loads the attention kernels take: pure functions of shape, dtype and
chip."""

import torch
import triton
from torch import Tensor

# Not measured on a GPU yet: large blocks that compile without spills, with no more than two
# warpgroups. (By Triton 3.8: of the 336 kernels that the tests compile, two spill 8 bytes with 3.6,
# one 88 with 3.7, and five up to 40 with 3.9.)
# Per kernel and padded head size: BLOCK_M, BLOCK_N, num_warps, num_stages, and a second set where a
# softcap, or a window in a layout, takes too many registers for the first. M counts queries and N
# keys, whichever of the two a program holds. Both divide the TILE of a layout.
Sizes = tuple[int, int, int, int]
Table = dict[str, dict[int, tuple[Sizes, ...]]]
_SM80: Table = {  # 16-bit inputs, within the 99 KiB of shared memory of sm_86, sm_89 and sm_120
    "fwd": {
        32: ((128, 64, 8, 3),),
        64: ((128, 64, 8, 3),),
        128: ((128, 64, 8, 2), (64, 64, 8, 2)),
        256: ((64, 32, 8, 2),),
    },
    "dq": {
        32: ((128, 64, 8, 3),),
        64: ((128, 64, 8, 3), (128, 32, 8, 3)),
        128: ((64, 64, 8, 2),),
        256: ((64, 32, 8, 1),),
    },
    "dkdv": {
        32: ((32, 128, 8, 3), (32, 64, 8, 1)),
        64: ((32, 128, 8, 2), (32, 64, 8, 1)),
        128: ((64, 64, 8, 1),),
        256: ((32, 32, 8, 1),),
    },
}
_SM90: Table = {  # 16-bit inputs
    "fwd": {
        32: ((128, 128, 8, 3),),
        64: ((128, 128, 8, 3),),
        128: ((128, 128, 8, 2), (128, 64, 8, 3)),
        256: ((128, 64, 8, 2), (128, 32, 8, 3)),
    },
    "dq": {
        32: ((128, 64, 8, 3),),
        64: ((128, 64, 8, 3),),
        128: ((128, 64, 8, 2),),
        256: ((128, 32, 8, 2),),
    },
    "dkdv": {
        32: ((64, 128, 8, 2),),
        64: ((64, 128, 8, 2), (32, 128, 8, 2)),
        128: ((64, 128, 8, 2), (32, 128, 8, 2)),
        256: ((64, 32, 8, 2), (32, 32, 8, 2)),
    },
}
_SM100: Table = {  # 16-bit inputs
    "fwd": {
        32: ((128, 128, 8, 3), (64, 64, 8, 3)),
        64: ((128, 128, 8, 3), (64, 64, 8, 3)),
        128: ((128, 64, 8, 3),),
        256: ((64, 64, 8, 2),),
    },
    "dq": {
        32: ((128, 64, 8, 3),),
        64: ((128, 64, 8, 3),),
        128: ((128, 64, 8, 2),),
        256: ((64, 64, 8, 1),),
    },
    "dkdv": {
        32: ((64, 128, 8, 3), (64, 64, 8, 2)),
        64: ((64, 128, 8, 3), (64, 64, 8, 2)),
        128: ((64, 64, 8, 2),),
        256: ((64, 32, 8, 2),),
    },
}
_FLOAT32: Table = {  # on every chip: without tensor cores, products are the threads' own
    "fwd": {
        32: ((32, 32, 8, 1),),
        64: ((32, 32, 8, 1),),
        128: ((32, 32, 8, 1), (32, 16, 8, 1)),
        256: ((16, 16, 8, 1),),
    },
    "dq": {
        32: ((32, 32, 8, 1),),
        64: ((32, 32, 8, 1),),
        128: ((16, 16, 8, 1),),
        256: ((16, 16, 8, 1),),
    },
    "dkdv": {
        32: ((32, 32, 8, 1),),
        64: ((16, 32, 8, 1),),
        128: ((16, 16, 8, 1),),
        256: ((16, 16, 8, 1),),
    },
}
ROWS = {"BLOCK_M": 32, "num_warps": 4}
SUMS = {"BLOCK": 32, "num_warps": 4}
_L2_SHARE = 16 * 2**20  # bytes of keys and values that are to stay in the L2 cache


def chip() -> int:
    """The compute capability, as 90; of the interpreter, the least that is supported."""
    if triton.knobs.runtime.interpret:
        return 80
    return triton.runtime.driver.active.get_current_target().arch


def padded(head_size: int) -> int:
    """The width of a block of rows: tensor cores take 16 numbers at least, blocks powers of two."""
    return max(32, triton.next_power_of_2(head_size))


def config_for(
    kernel: str, head_size: int, dtype: torch.dtype, tight: bool, chip: int
) -> dict[str, int]:
    """Of "fwd", "dq" or "dkdv"; of nothing that differs between a row alone and in a batch.

    tight: there is a softcap, or a window in a layout.
    """
    table = {9: _SM90, 10: _SM100}.get(chip // 10, _SM80)
    table = _FLOAT32 if dtype == torch.float32 else table
    block_d = padded(head_size)
    sizes = table[kernel][block_d][-1 if tight else 0]
    names = ("BLOCK_M", "BLOCK_N", "num_warps", "num_stages")
    config = {**dict(zip(names, sizes, strict=True)), "BLOCK_D": block_d}
    if dtype == torch.float32 and (kernel != "dq" or block_d < 128):
        config["maxnreg"] = 255  # or ptxas spills a little so that more blocks run at a time
    return config


def descriptors_fit(chip: int, *tensors: Tensor) -> bool:
    """Whether the copy engine of Hopper and later chips can load blocks of these: every address and
    stride is a multiple of 16 bytes, and no axis is broadcast."""
    return chip // 10 in (9, 10) and all(
        x.element_size() == 2
        and x.numel() > 0
        and x.data_ptr() % 16 == 0
        and all(
            n == 1 or (s > 0 and s % 8 == 0) for n, s in zip(x.shape, x.stride()[:3], strict=False)
        )
        for x in tensors
    )


def lanes_of_section(lanes: int, lanes_of_source: int, source_bytes: int) -> int:
    """How many lanes run together: those whose sources, each shared by some, stay in the L2."""
    return max(1, min(lanes, lanes_of_source * max(1, _L2_SHARE // max(1, source_bytes))))
