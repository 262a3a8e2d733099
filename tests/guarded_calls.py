"""Calls of every op with kernels on the CPU, each tensor where the next byte may not be touched: at
its end, or before its beginning. A program: a kernel that reads one byte too far ends it."""

import ctypes
import mmap
import os
import signal

import torch
from torch import Tensor

import fastrl
from fastrl import _C
from fastrl.layout import PackedLayout

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
LIBC = ctypes.CDLL(None)
# One number; less than a vector and its neighbours; vectors and a rest; more than a block.
VOCABULARIES = (1, 7, 33, 257, 2065)
ROWS = ((1,), (7,), (2, 1, 9), (3, 17), (17, 3))
WIDTHS, KEYS = (1, 7, 16, 33), (1, 63, 65)


class Guarded:
    def __init__(self, at_end: bool) -> None:
        self.at_end = at_end

    def __call__(self, x: Tensor) -> Tensor:
        """x, contiguous, between pages that may not be touched."""
        page, size = mmap.PAGESIZE, x.numel() * x.element_size()
        pages = -(-size // page)
        memory = mmap.mmap(-1, (pages + 2) * page)
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        for i in (0, pages + 1):
            assert LIBC.mprotect(ctypes.c_void_p(address + i * page), page, 0) == 0  # nothing
        offset = page + (pages * page - size if self.at_end else 0)
        inside = torch.frombuffer(memory, dtype=x.dtype, count=x.numel(), offset=offset)
        return inside.view(x.shape).copy_(x)

    def normal(self, *shape: int, dtype: torch.dtype) -> Tensor:
        return self(torch.randn(shape).to(dtype)).requires_grad_()

    def backward(self, *outputs: Tensor) -> None:
        torch.autograd.backward(outputs, [self(torch.ones_like(x)) for x in outputs])


def logits(guarded: Guarded, dtype: torch.dtype) -> None:
    for vocab in VOCABULARIES:
        x = guarded.normal(3, vocab, dtype=dtype)
        ids, kept = guarded(torch.tensor([0, vocab - 1, 0])), guarded(torch.arange(vocab))
        guarded.backward(*fastrl.token_logprobs(x, ids, return_entropy=True))
        torch.ops.fastrl.token_logprobs_state(x.detach(), ids, 1.0, -100, 0, True)
        written = guarded.normal(3, vocab, dtype=dtype)
        guarded.backward(fastrl.token_logprobs(written, ids, inplace_backward=True))
        bounds = guarded(torch.tensor([0, 0, vocab - 1, vocab], dtype=torch.int32))
        guarded.backward(*fastrl.token_logprobs(x, ids, kept=(kept, bounds), return_entropy=True))
        for k, p in ((None, None), (1, None), (vocab // 2 + 1, 0.9), (None, 0.9)):
            fastrl.sample_tokens(x.detach(), seeds=ids, top_k=k, top_p=p, return_kept=True)


def returns(guarded: Guarded, dtype: torch.dtype, shape: tuple[int, ...], side_by_side: bool):
    def of(x: Tensor) -> Tensor:
        return guarded(x.mT.contiguous()).mT if side_by_side else guarded(x)

    tensors = [of(torch.randn(shape).to(dtype)).requires_grad_() for _ in range(5)]
    r, v, q, log_ratio, next_values = tensors
    mask, flags = of(torch.rand(shape) < 0.5), of(torch.rand(shape) < 0.5)
    end = guarded(torch.ones(shape[:-1])).requires_grad_()
    follows = {"next_values": next_values, "truncated": flags, "terminated": mask}
    no_action = {"next_values": next_values, "mask": of(torch.zeros(shape, dtype=torch.bool))}
    masked = {"bootstrap_value": end, "mask": mask}
    for given in ({"bootstrap_value": end}, masked, no_action, follows):
        options = given | {"gamma": 0.9}
        guarded.backward(*fastrl.gae(r, v, gae_lambda=0.9, **options))
        guarded.backward(*fastrl.vtrace(r, v, log_ratio, **options))
        guarded.backward(fastrl.retrace_returns(r, v, q, log_ratio, gae_lambda=0.9, **options))
        guarded.backward(fastrl.discounted_returns(r, **options))
        guarded.backward(fastrl.n_step_returns(r, v, n=2, **options))


def attention(guarded: Guarded, dtype: torch.dtype, width: int) -> None:
    layout = PackedLayout(torch.tensor([0, 70, 75, 92]).int(), torch.tensor([-1, 0, 0]).int())
    q, k, v = (guarded.normal(1, heads, 92, width, dtype=dtype) for heads in (2, 1, 1))
    for options in ({}, {"window": 9}, {"layout": layout}):
        guarded.backward(fastrl.attention(q, k, v, **options))
    for keys in KEYS:
        cache, prefix = ([guarded.normal(n, 1, keys, width, dtype=dtype).detach() for _ in "kv"]
                         for n in (2, 1))  # fmt: skip
        for queries in (1, 3):
            q = guarded.normal(2, 2, queries, width, dtype=dtype).detach()
            fastrl.decode_attention(q, *cache, prefix_key=prefix[0], prefix_value=prefix[1])


def a_byte_too_far_is_seen(guarded: Guarded) -> bool:
    x = guarded(torch.ones(9))
    child = os.fork()
    if child == 0:
        ctypes.string_at(x.data_ptr() + (x.nbytes if guarded.at_end else -1), 1)
        os._exit(0)
    return os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGSEGV


def main() -> None:
    torch.set_num_threads(1)
    levels = [x for x in _C.build_facts()["simd_levels"] if _C.select_simd_level(x)]
    for guarded in (Guarded(at_end=True), Guarded(at_end=False)):
        assert a_byte_too_far_is_seen(guarded)
        for level in levels:
            _C.select_simd_level(level)
            for dtype in FLOATS:
                for shape in ROWS:
                    for side_by_side in (False, True)[: len(shape)]:
                        returns(guarded, dtype, shape, side_by_side)
                for width in WIDTHS:
                    attention(guarded, dtype, width)
                if dtype is not torch.float64:
                    logits(guarded, dtype)
    print("all calls made")


if __name__ == "__main__":
    main()
