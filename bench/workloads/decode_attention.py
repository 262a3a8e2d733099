"""Queries, caches and shared prompts of the decode_attention cases."""

import re
from collections.abc import Iterator

import torch
from torch import Tensor

from bench.case import Arguments, Case, Workload
from bench.workloads.pieces import SEED, size_in_bytes

_LAYOUT = re.compile(r"(?:(\d+) \+ (\d+) x )?(\d+)\.\.(\d+)")


def layout_of(case: Case) -> tuple[int, int, Tensor]:
    """Length of the prompt (0: none), rows for each of them, and how many keys each row has."""
    found = _LAYOUT.fullmatch(case.layout)
    assert found, case.layout
    prompt, rows, low, high = (int(x or 0) for x in found.groups())
    batch, _, _, _, room, _ = case.shape
    assert high <= room and (not prompt or batch % rows == 0), case.name
    return prompt, rows or 1, torch.linspace(low, high, batch).int()


def make(case: Case, device: torch.device) -> Arguments:
    batch, query_heads, key_heads, queries, room, width = case.shape
    prompt, rows, ends = layout_of(case)
    generator = torch.Generator(device).manual_seed(SEED)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(case.dtype)

    arguments: Arguments = {
        "query": normal(batch, query_heads, queries, width),
        "key": normal(batch, key_heads, room, width),
        "value": normal(batch, key_heads, room, width),
        "key_end": ends.to(device),
    }
    if prompt:
        arguments["prefix_key"] = normal(batch // rows, key_heads, prompt, width)
        arguments["prefix_value"] = normal(batch // rows, key_heads, prompt, width)
    return arguments


def count_bytes(case: Case, arguments: Arguments) -> int:
    """Each prompt once, of the caches the keys that exist; query in, output out."""
    own = arguments["key"][0, :, 0]
    total = 2 * size_in_bytes(own) * int(arguments["key_end"].sum())
    prefix = (arguments[k] for k in ("prefix_key", "prefix_value") if k in arguments)
    total += sum(size_in_bytes(x) for x in prefix)
    return total + 2 * size_in_bytes(arguments["query"])


def count_flops(case: Case, arguments: Arguments) -> int:
    """Two products for each query and key that it sees."""
    heads, queries, width = case.shape[1], case.shape[3], case.shape[5]
    prompt, _, ends = layout_of(case)
    seen = prompt + ends[:, None] - queries + torch.arange(queries) + 1
    return 4 * width * heads * int(seen.clamp(max=case.options.get("window", 2**40)).sum())


def _heads(case: Case) -> Iterator[slice | None]:
    """The first and the last of the heads of keys: the definition copies prompts for each row."""
    last = case.shape[2] - 1
    for head in sorted({0, last}):
        yield slice(head, head + 1)


def _cut_heads(case: Case, x: Tensor, key_heads: slice) -> Tensor:
    if x.dim() != 4 or x.shape[1] == case.shape[2]:
        return x[:, key_heads] if x.dim() == 4 else x
    group = case.shape[1] // case.shape[2]
    return x[:, key_heads.start * group : key_heads.stop * group]


def _output_shape(case: Case) -> tuple[int, ...]:
    batch, query_heads, _, queries, _, width = case.shape
    return batch, query_heads, queries, width


WORKLOADS = {
    "decode_attention": Workload(
        make, count_bytes, (), _heads, upstream_shape=_output_shape, count_flops=count_flops,
        cut=_cut_heads,
    ),
}  # fmt: skip
