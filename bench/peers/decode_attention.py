"""Decoding as others do it: torch SDPA over caches that hold a copy of the prompt for each row."""

from collections.abc import Callable

import torch
from torch.nn.functional import scaled_dot_product_attention

from bench.case import Arguments, Case, Outputs, Unavailable
from bench.peers.peer import REFERENCE, Peer, compiled_reference
from bench.workloads.decode_attention import layout_of


def _copies(fold: bool) -> Callable[[Case, Arguments], Callable[[], Outputs]]:
    """Copies and mask are made once, outside of the clock, and without what no row has.

    fold: the query heads that share a head of keys stand as queries of one, so that keys are read
    once for all of them whatever the back end does with grouped queries.
    """

    def build(case: Case, arguments: Arguments) -> Callable[[], Outputs]:
        if "softcap" in case.options:
            raise Unavailable("has no softcap")
        query, key = arguments["query"], arguments["key"]
        batch, heads, queries, width = query.shape
        prompt, rows, ends = layout_of(case)
        longest, both = int(ends.max()), []
        for own, shared in (("key", "prefix_key"), ("value", "prefix_value")):
            parts = [arguments[own][:, :, :longest]]
            if prompt:
                parts.insert(0, arguments[shared].repeat_interleave(rows, dim=0))
            both.append(torch.cat(parts, dim=2))
        position = prompt + ends[:, None] - queries + torch.arange(queries)  # [B, T]
        j, first = torch.arange(prompt + longest), position - case.options.get("window", 2**40)
        mask = (j <= position[..., None]) & (j > first[..., None])
        mask = mask[:, None].to(query.device)
        if fold and heads != key.shape[1]:
            group = heads // key.shape[1]
            query = query.reshape(batch, key.shape[1], group * queries, width)
            mask = mask.repeat(1, 1, group, 1)
        gqa = query.shape[1] != key.shape[1]

        def run() -> Outputs:
            output = scaled_dot_product_attention(query, *both, attn_mask=mask, enable_gqa=gqa)
            return (output.view(batch, heads, queries, width),)

        return run

    return build


def of(op: str) -> list[Peer]:
    return [
        REFERENCE,
        Peer("torch SDPA, a copy of the prompt each", "torch", _copies(fold=False)),
        Peer("torch SDPA, the same with folded heads", "torch", _copies(fold=True)),
        Peer("torch.compile", "torch", compiled_reference),
    ]
