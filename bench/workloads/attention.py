"""Queries, keys and values of the attention cases."""

import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from bench.case import Arguments, Case, Outputs, Workload, call_reference
from bench.workloads.pieces import BLOCK, SEED, in_blocks, size_in_bytes
from fastrl import reference
from fastrl.layout import PackedLayout

_GROUP = re.compile(r"(?:(\d+) \+ )?(\d+) x (\d+)(?:\.\.(\d+))?")


def layout_of(text: str) -> PackedLayout:
    """ "512 + 16 x 128": a prompt of 512 tokens with 16 completions of 128; "300 + 8 x 16..240":
    with 8 whose lengths rise evenly; without a prompt, rows that share nothing; several groups with
    commas between them."""
    lengths, prefix = [], []
    for group in text.split(", "):
        found = _GROUP.fullmatch(group)
        assert found, group
        count, low = int(found[2]), int(found[3])
        high = int(found[4] or low)
        steps = max(count - 1, 1)
        if found[1]:
            prefix += [-1] + [len(lengths)] * count
            lengths.append(int(found[1]))
        else:
            prefix += [-1] * count
        lengths += [low + (high - low) * i // steps for i in range(count)]
    bounds = torch.tensor([0, *lengths]).cumsum(0).int()
    return PackedLayout(bounds, torch.tensor(prefix, dtype=torch.int32))


def make_attention(case: Case, device: torch.device) -> Arguments:
    """shape: (B, Hq, Hkv, T, S, D)."""
    batch, query_heads, key_heads, queries, keys, width = case.shape
    generator = torch.Generator(device).manual_seed(SEED)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(case.dtype)

    arguments: Arguments = {
        "query": normal(batch, query_heads, queries, width),
        "key": normal(batch, key_heads, keys, width),
        "value": normal(batch, key_heads, keys, width),
    }
    if case.layout:
        layout = layout_of(case.layout)
        assert layout.num_tokens == queries == keys and batch == 1, (layout.num_tokens, case.name)
        arguments["layout"] = layout.to(device)
    if "key_end" in case.inputs:  # caches between half full and full
        ends = torch.linspace(keys // 2, keys, batch).int()
        arguments["key_end"] = ends.to(device)
    return arguments


def visible_pairs(case: Case, arguments: Arguments) -> int:
    """Queries and keys that see each other, of one head: the useful work."""
    batch, _, _, queries, keys, _ = case.shape
    if case.layout:
        seen = arguments["layout"].position_ids.cpu() + 1
    else:
        ends = arguments.get("key_end", torch.full((batch,), keys)).cpu()
        seen = ends[:, None] - queries + torch.arange(queries) + 1
        if not case.options.get("causal", True):
            seen = ends[:, None].expand(-1, queries)
    return int(seen.clamp(max=case.options.get("window", keys)).sum())


def attention_flops(case: Case, arguments: Arguments) -> int:
    """Two products a pair forward, five backward: the scores are computed again there, by all but
    eager, which keeps them."""
    heads, width = case.shape[1], case.shape[5]
    products = {"forward": 2, "backward": 5, "both": 7}[case.mode]
    return 2 * products * width * heads * visible_pairs(case, arguments)


def attention_bytes(case: Case, arguments: Arguments) -> int:
    """Forward: query, key and value in, output out. Backward: these and the output's gradient in,
    three gradients out. Of a cache, the keys that exist."""
    query = size_in_bytes(arguments["query"])
    cache = size_in_bytes(arguments["key"]) + size_in_bytes(arguments["value"])
    if "key_end" in arguments:
        full = case.shape[0] * case.shape[4]
        cache = cache * int(arguments["key_end"].sum()) // full
    forward, backward = 2 * query + cache, 4 * query + 2 * cache
    return {"forward": forward, "backward": backward, "both": forward + backward}[case.mode]


def attention_definition(case: Case, arguments: Arguments) -> Outputs:
    """fastrl.reference, for some queries at a time.

    Where a row's queries end at its last key, so do those of a block at an earlier one. A layout
    has no such form: there the block sees a cache of what is visible, written down here.
    """
    query, key, value = (arguments[k] for k in ("query", "key", "value"))
    batch, heads, queries, _ = query.shape
    rows = max(1, BLOCK // (batch * heads * key.shape[2]))
    if queries <= rows:
        return call_reference(case, arguments)
    options = {k: v for k, v in case.options.items() if k != "causal"}
    layout = arguments.get("layout")
    if layout is None and not case.options.get("causal", True):
        return in_blocks(lambda _, q: _reference(q, key, value, causal=False), [query], rows, 2)
    if layout is None:
        ends = arguments.get("key_end", torch.full((batch,), key.shape[2], device=query.device))

        def dense(start: int, q: Tensor) -> Outputs:
            key_end = (ends - queries + start + q.shape[2]).int()
            return _reference(q, key, value, key_end=key_end, **options)

        return in_blocks(dense, [query], rows, 2)
    assert not options, "a layout together with other options has no definition in blocks"

    def packed(start: int, q: Tensor) -> Outputs:
        return (_masked_attention(q, key, value, _sees(layout, start, q.shape[2])),)

    return in_blocks(packed, [query], rows, 2)


def _reference(*tensors: Tensor, **options: Any) -> Outputs:
    return (reference.attention(*tensors, **options),)


def _sees(layout: PackedLayout, start: int, count: int) -> Tensor:
    """[count, N] bool: which keys the queries from `start` on see."""
    i = torch.arange(start, start + count, device=layout.visible_until.device)[:, None]
    j = torch.arange(layout.num_tokens, device=i.device)
    return (j <= i) & (i < layout.visible_until)


def _masked_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    dtype = query.dtype if query.dtype == torch.float64 else torch.float32
    heads = query.shape[1] // key.shape[1]
    q, k, v = (x.to(dtype) for x in (query, key, value))
    k, v = (x.repeat_interleave(heads, dim=1) for x in (k, v))
    scores = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~mask, -torch.inf)
    return (scores.softmax(-1) @ v).to(query.dtype)


def _heads(case: Case) -> Iterator[slice | None]:
    """The first and the last of the heads of keys: a score for each pair of tokens, in float64,
    would not fit for all of them."""
    last = case.shape[2] - 1
    for head in sorted({0, last}):
        yield slice(head, head + 1)


def _cut_heads(case: Case, x: Tensor, key_heads: slice) -> Tensor:
    """Those heads of keys, or the heads of queries that read them."""
    if x.dim() != 4:
        return x
    queries_per_key = x.shape[1] // case.shape[2]
    return x[:, key_heads.start * queries_per_key : key_heads.stop * queries_per_key]


def _output_shape(case: Case) -> tuple[int, ...]:
    batch, query_heads, _, queries, _, width = case.shape
    return batch, query_heads, queries, width


WORKLOADS = {
    "attention": Workload(
        make_attention, attention_bytes, ("query", "key", "value"), _heads, attention_definition,
        upstream_shape=_output_shape, count_flops=attention_flops, cut=_cut_heads,
    ),
}  # fmt: skip
