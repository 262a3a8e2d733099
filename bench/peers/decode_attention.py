"""Decoding as others do it: torch's attention over caches with a copy of the prompt in each row."""

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from bench.case import Arguments, Case, Implementation, Outputs, Unavailable
from bench.peers.peer import REFERENCE, Peer, compiled_reference, on_cuda
from bench.workloads.decode_attention import layout_of

_BACK_ENDS = {"cuDNN": "CUDNN_ATTENTION", "efficient": "EFFICIENT_ATTENTION"}  # that take a mask


def _caches(case: Case, arguments: Arguments) -> tuple[Tensor, Tensor]:
    """Keys and values of each row, without what no row has."""
    prompt, rows, ends = layout_of(case)
    both = []
    for own, shared in (("key", "prefix_key"), ("value", "prefix_value")):
        parts = [arguments[own][:, :, : int(ends.max())]]
        if prompt:
            parts.insert(0, arguments[shared].repeat_interleave(rows, dim=0))
        both.append(torch.cat(parts, dim=2))
    return both[0], both[1]


def _positions(case: Case, query: Tensor) -> Tensor:
    """[B, T], of the queries among these keys."""
    prompt, _, ends = layout_of(case)
    queries = query.shape[2]
    return (prompt + ends[:, None] - queries + torch.arange(queries)).to(query.device)


def _rule(case: Case, query: Tensor) -> Callable[..., Tensor]:
    """Whether query i of row b sees key j."""
    position, window = _positions(case, query), case.options.get("window", 2**40)
    return lambda b, h, i, j: (j <= position[b, i]) & (j > position[b, i] - window)


def _sdpa(*, fold: bool, back_end: str | None = None) -> Implementation:
    """Copies and mask are made once, outside of the clock.

    fold: the query heads that share a head of keys stand as queries of one, so that keys are read
    once for all of them whatever the back end does with grouped queries.
    """

    def build(case: Case, arguments: Arguments) -> Callable[[], Outputs]:
        if "softcap" in case.options:
            raise Unavailable("has no softcap")
        query, (key, value) = arguments["query"], _caches(case, arguments)
        batch, heads, queries, width = query.shape
        b = torch.arange(batch, device=query.device)[:, None, None]
        i = torch.arange(queries, device=query.device)[:, None]
        mask = _rule(case, query)(b, 0, i, torch.arange(key.shape[2], device=query.device))[:, None]
        if fold and heads != key.shape[1]:
            group = heads // key.shape[1]
            query = query.reshape(batch, key.shape[1], group * queries, width)
            mask = mask.repeat(1, 1, group, 1)
        gqa = query.shape[1] != key.shape[1]

        def run() -> Outputs:
            output = scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=gqa)
            return (output.view(batch, heads, queries, width),)

        if back_end is None:
            return run
        on_cuda(query)
        kernel = importlib.import_module("torch.nn.attention")
        chosen = getattr(kernel.SDPBackend, _BACK_ENDS[back_end])

        def run_there() -> Outputs:
            with kernel.sdpa_kernel(chosen):
                return run()

        return run_there

    return build


def _flex(case: Case, arguments: Arguments) -> Callable[[], Outputs]:
    """Compiled, with copies and block mask made once, outside of the clock."""
    query = arguments["query"]
    if query.device.type != "cuda":
        raise Unavailable("is timed on a GPU alone: to compile it takes a CPU longer than the case")
    flex = importlib.import_module("torch.nn.attention.flex_attention")
    key, value = _caches(case, arguments)
    batch, heads, queries, _ = query.shape
    rule, keys = _rule(case, query), key.shape[2]
    options: dict[str, Any] = {"enable_gqa": heads != key.shape[1]}
    options["block_mask"] = flex.create_block_mask(rule, batch, None, queries, keys, query.device)
    if (softcap := case.options.get("softcap")) is not None:
        options["score_mod"] = lambda score, *_: softcap * torch.tanh(score / softcap)
    attend = torch.compile(flex.flex_attention, dynamic=False)
    return lambda: (attend(query, key, value, **options),)


def of(op: str) -> list[Peer]:
    return [
        REFERENCE,
        Peer("torch SDPA, a copy of the prompt each", "torch", _sdpa(fold=False)),
        Peer("torch SDPA, the same with folded heads", "torch", _sdpa(fold=True)),
        *(
            Peer(f"torch SDPA, {name}, folded heads", "torch", _sdpa(fold=True, back_end=name))
            for name in _BACK_ENDS
        ),
        Peer("torch FlexAttention, a copy each", "torch", _flex),
        Peer("torch.compile", "torch", compiled_reference),
    ]
