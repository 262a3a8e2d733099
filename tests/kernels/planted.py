"""Small kernels with an error each, and their healthy twins: test_harness.py catches the former."""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _double_kernel(x_ptr, out_ptr, N, BLOCK: tl.constexpr, SKIP_LAST: tl.constexpr):
    stop = N
    if SKIP_LAST:
        stop = N - BLOCK
    for n0 in range(0, stop, BLOCK):
        offs = n0 + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + offs, mask=offs < N)
        tl.store(out_ptr + offs, 2.0 * x, mask=offs < N)


def double(x: Tensor, skip_last: bool) -> Tensor:
    out = torch.empty_like(x)
    _double_kernel[(1,)](x_ptr=x, out_ptr=out, N=x.numel(), BLOCK=64, SKIP_LAST=skip_last)
    return out


@triton.jit
def _add_kernel(x_ptr, y_ptr, out_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    x, y = tl.load(x_ptr + offs).to(tl.bfloat16), tl.load(y_ptr + offs).to(tl.bfloat16)
    tl.store(out_ptr + offs, x + y)


def add_in_bfloat16(x: Tensor, y: Tensor) -> Tensor:
    out = torch.empty_like(x, dtype=torch.bfloat16)
    _add_kernel[(1,)](x_ptr=x, y_ptr=y, out_ptr=out, BLOCK=x.numel())
    return out


@triton.jit
def _copy_kernel(x_ptr, out_ptr, N, BLOCK: tl.constexpr, READS: tl.constexpr, WRITES: tl.constexpr):
    n0 = tl.program_id(0) * BLOCK
    offs = n0 + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs, mask=offs < N + READS, other=0.0)
    tl.store(out_ptr + offs, x, mask=offs < N)
    if WRITES:  # at a row's end what is another program's
        tl.store(out_ptr + (n0 + BLOCK) % N, 0.0)


def copy(x: Tensor, reads: int, writes: int) -> Tensor:
    out = torch.empty_like(x)
    _copy_kernel[(triton.cdiv(x.numel(), 16),)](
        x_ptr=x, out_ptr=out, N=x.numel(), BLOCK=16, READS=reads, WRITES=writes
    )
    return out


def overwrite(x: Tensor) -> None:
    """All of the memory that x is a part of."""
    torch.empty(0, dtype=x.dtype).set_(x.untyped_storage()).fill_(7)


@triton.jit
def _sum_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    x = tl.load(x_ptr + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK))
    tl.atomic_add(out_ptr, tl.sum(x, axis=0))


def sum_of_blocks(x: Tensor) -> None:
    """Each adds to the same number as it comes by."""
    _sum_kernel[(x.numel() // 64,)](x_ptr=x, out_ptr=x, BLOCK=64)


@triton.jit
def _softmax_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs)
    e = tl.exp(x - tl.max(x, axis=0))
    tl.store(out_ptr + offs, e / tl.sum(e, axis=0))


def softmax(x: Tensor, num_warps: int) -> None:
    """One block for all of x: with few warps, more numbers a thread than it has registers."""
    _softmax_kernel[(1,)](x_ptr=x, out_ptr=x, BLOCK=x.numel(), num_warps=num_warps)


@triton.jit
def _matmul_kernel(
    a_ptr, b_ptr, out_ptr, K,
    BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    offs, offs_k = tl.arange(0, BLOCK), tl.arange(0, BLOCK_K)
    total = tl.zeros([BLOCK, BLOCK], tl.float32)
    for k0 in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        a = tl.load(a_ptr + offs[:, None] * K + (k0 + offs_k)[None, :])
        b = tl.load(b_ptr + (k0 + offs_k)[:, None] * BLOCK + offs[None, :])
        total = tl.dot(a, b, total, input_precision=PRECISION)
    tl.store(out_ptr + offs[:, None] * BLOCK + offs[None, :], total)


def matmul(a: Tensor, b: Tensor, block_k: int, stages: int, precision: str) -> Tensor:
    out = torch.empty(a.shape[0], b.shape[1])
    _matmul_kernel[(1,)](
        a_ptr=a, b_ptr=b, out_ptr=out, K=a.shape[1], BLOCK=a.shape[0], BLOCK_K=block_k,
        STAGES=stages, PRECISION=precision,
    )  # fmt: skip
    return out
