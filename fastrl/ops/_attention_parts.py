"""What attention on a CPU works through: rectangles and causal triangles of pairs, as views."""

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor

# A layout's longer triangles are cut into these and the squares between them: of a triangle torch's
# flash attention computes all pairs with up to 512 keys. A group of 16 x 128 tokens on 512 takes
# 0.93 of its time so, with 128 here 0.94 and with 256 0.95. A dense batch is left to torch whole:
# on two threads what is saved there goes for passes over the outputs.
TRIANGLE = 64


class Part(NamedTuple):
    """Pairs of some rows of the batch: each of `segments` times `length` tokens, from query_start
    among the queries and from key_start among the keys, of which `queries` see `keys`.

    merge: the queries have an output already, from the parts before.
    add: the keys have gradients already.
    shared: how many queries there are depends on what else continues the keys.
    """

    rows: slice
    query_start: int
    key_start: int
    length: int
    segments: int
    queries: slice
    keys: slice
    causal: bool
    merge: bool
    add: bool = False
    shared: bool = False

    def of_queries(self, x: Tensor) -> Tensor:
        return self._cut(x, self.query_start, self.queries)

    def of_keys(self, x: Tensor) -> Tensor:
        return self._cut(x, self.key_start, self.keys)

    def _cut(self, x: Tensor, start: int, tokens: slice) -> Tensor:
        """A view of x [B, H, T, ...]: [rows, H, tokens, ...], or [segments, H, ...] of one row."""
        if self.segments == 1:
            return x[self.rows, :, start + tokens.start : start + tokens.stop]
        x = x[self.rows.start, :, start : start + self.segments * self.length]
        return x.unflatten(1, (self.segments, self.length)).transpose(0, 1)[:, :, tokens]


def parts_of_layout(listed: list[list[int]], halve: bool) -> Iterator[Part]:
    """Of `attention_parts`; neighbours of equal length that see but themselves go together."""
    row, covered, at = slice(0, 1), 0, 0  # the queries before `covered` have an output
    while at < len(listed):
        start, end, key_start, key_end, causal = listed[at]
        merge, at = start < covered, at + 1
        covered = max(covered, end)
        if not causal:
            if start < end:
                queries, keys = (
                    slice(start - key_start, end - key_start),
                    slice(0, key_end - key_start),
                )
                place = (row, key_start, key_start, end - key_start, 1)
                yield Part(*place, queries, keys, False, merge, add=True, shared=True)
            continue
        length, segments = end - start, 1
        while at < len(listed):
            next_start, next_end, _, _, next_causal = listed[at]
            like = next_causal and next_start == end and next_end - next_start == length
            if not like or merge != (next_start < covered):
                break
            end, segments, at = next_end, segments + 1, at + 1
            covered = max(covered, end)
        yield from _triangle(row, start, start, length, segments, merge, halve)


def parts_of_row(rows: slice, start: int, end: int, queries: int, causal: bool) -> Iterator[Part]:
    """Of the keys [start, end) of a dense row. The last query stands at the last key, and those
    that would stand before the first see none; the keys before the first query are a rectangle,
    those at the queries a triangle."""
    if end <= start:
        return
    standing = min(queries, end - start) if causal else queries
    first = queries - standing
    before = end - start - (standing if causal and standing > 1 else 0)
    if before:
        every = slice(0, standing), slice(0, before)
        yield Part(rows, first, start, before, 1, *every, False, False)
    if causal and standing > 1:
        at = first, start + before, standing
        yield from _triangle(rows, *at, 1, before > 0, False)


def _triangle(
    rows: slice,
    query_start: int,
    key_start: int,
    length: int,
    segments: int,
    merge: bool,
    halve: bool,
) -> Iterator[Part]:
    """Each of the segments sees itself causally: triangles, then squares from small to large, so
    that each key's first gradient is of a triangle."""

    def pieces(size: int) -> Iterator[tuple[tuple[slice, int, int, int, int], int, int]]:
        """Where a Part of pieces of `size` tokens is; of each its first token and their number."""
        if segments == 1 or length % size == 0:
            count, rest = divmod(segments * length, size)
            if count:
                yield (rows, query_start, key_start, size, count), 0, size
            if rest:
                at = count * size
                yield (rows, query_start + at, key_start + at, rest, 1), 0, rest
            return
        for at in range(0, length, size):
            place = (rows, query_start, key_start, length, segments)
            yield place, at, min(size, length - at)

    size = TRIANGLE if halve else length
    for place, at, count in pieces(size):
        tokens = slice(at, at + count)
        yield Part(*place, tokens, tokens, True, merge)
    while size < length:
        for place, at, count in pieces(2 * size):
            if count > size:
                queries, keys = slice(at + size, at + count), slice(at, at + size)
                yield Part(*place, queries, keys, False, True, add=True)
        size *= 2
