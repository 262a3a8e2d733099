"""What attention on a GPU works through in a packed layout: segments, and tiles of queries and of
keys, for layout.py."""

import torch
from torch import Tensor

TILE = 128  # tokens
SPLIT = 8192  # queries that one program of the keys' gradients walks at most


def attention_tiles(starts: Tensor, ends: Tensor, until: Tensor) -> list[Tensor]:
    """[query_tiles, segments, key_tiles, key_sums], int32, heavy tiles first.

    segments [S', 5]: (start, end, until, shift, parent) of those that hold tokens: token j stands
        at position j + shift; parent is a row of this table, or -1. What a tile of queries sees is
        found on the way from the last segment that begins in it to the root of its first token, so
        that the table stays as small as the layout however deep the tree is.
    query_tiles [.., 2]: (first token, last segment) of each TILE tokens of the batch.
    key_tiles [.., 7]: (first token, end, query_begin, query_end, slot, first segment, end segment)
        of each TILE tokens of a tree, counted from its root, and of the queries that see any of
        them. More than SPLIT queries are cut, at fixed lengths, into a row each, with a slot for
        its sum; slot is -1 where there is nothing to add up. The segments are those of the queries.
    key_sums [slots, 4]: (first token, end, first slot, slots) of the tile that each slot is of.

    Each table has two rows at least, since for torch.compile a size of 0 or 1 is another program:
    what is added holds no token. So that key_sums of two rows are known to sum nothing, longer ones
    have one such row as well.

    All of a tree's rows follow from the tree alone, but for query_tiles; there a token's own
    segments come in the same order in whichever tile it stands.

    Args:
        starts, ends: [S] int64, the tokens of each segment, on the host.
        until: [S] int64, the end of the subtree below it.
    """
    has_tokens = starts < ends
    starts, ends, until = starts[has_tokens], ends[has_tokens], until[has_tokens]
    parent = _parents(starts, until)
    shift = _first_positions(parent, ends - starts) - starts
    segments = torch.stack([starts, ends, until, shift, parent], dim=1)
    keys, key_sums = _key_tiles(starts, until, parent)
    queries = _query_tiles(starts, ends, shift)
    num_tokens = int(ends[-1]) if len(ends) else 0
    slot = torch.arange(len(key_sums), max(2, len(key_sums) + 1))
    tables = [
        _at_least_two(queries, [num_tokens, -1]),
        _at_least_two(segments, [0] * 5),
        _at_least_two(keys, [0] * 7),
        torch.cat([key_sums, torch.stack([0 * slot, 0 * slot, slot, 0 * slot + 1], dim=1)]),
    ]
    return [table.int().contiguous() for table in tables]


def _at_least_two(rows: Tensor, nothing: list[int]) -> Tensor:
    missing = [nothing] * (2 - len(rows))
    return torch.cat([rows, torch.tensor(missing, dtype=rows.dtype).view(-1, rows.shape[1])])


def _depths(starts: Tensor, until: Tensor) -> Tensor:
    """How many subtrees that began before a segment have not ended where it begins."""
    ended = torch.searchsorted(until.sort().values, starts, right=True)
    return torch.arange(len(starts)) - ended


def _parents(starts: Tensor, until: Tensor) -> Tensor:
    """Of each segment the last one before it that is one step nearer to the root, or -1."""
    count, depth = len(starts), _depths(starts, until)
    order = torch.arange(count)
    by_depth = (depth * count + order).sort().values  # all of one depth in a stretch, in order
    above = torch.searchsorted(by_depth, (depth - 1) * count + order) - 1
    parent = by_depth[above.clamp(min=0)] % max(1, count)
    return torch.where(depth > 0, parent, -1)


def _first_positions(parent: Tensor, lengths: Tensor) -> Tensor:
    """The sum of the lengths above each segment, by doubling the steps that are taken at once."""
    total = torch.where(parent >= 0, lengths[parent], 0)
    while bool((parent >= 0).any()):
        total = total + torch.where(parent >= 0, total[parent], 0)
        parent = torch.where(parent >= 0, parent[parent], -1)
    return total


def _query_tiles(starts: Tensor, ends: Tensor, shift: Tensor) -> Tensor:
    num_tokens = int(ends[-1]) if len(ends) else 0
    first = torch.arange(0, num_tokens, TILE)
    last = (first + TILE).clamp(max=num_tokens) - 1
    first_segment = torch.searchsorted(starts, first, right=True) - 1
    last_segment = torch.searchsorted(starts, last, right=True) - 1
    # Keys before the tile, and a block for each segment that begins in it.
    weight = first + shift[first_segment] + TILE * (last_segment - first_segment)
    heavy_first = weight.argsort(descending=True, stable=True)
    return torch.stack([first, last_segment], dim=1)[heavy_first]


def _key_tiles(starts: Tensor, until: Tensor, parent: Tensor) -> tuple[Tensor, Tensor]:
    root, root_end = starts[parent < 0], until[parent < 0]
    first = _counted_from(root, (root_end - root + TILE - 1) // TILE, TILE)
    end = torch.minimum(first + TILE, root_end[torch.searchsorted(root, first, right=True) - 1])
    # The last query is that of the segment in the tile whose subtree reaches farthest.
    first_segment = torch.searchsorted(starts, first, right=True) - 1
    counts = torch.searchsorted(starts, end) - first_segment
    tile = torch.arange(len(first)).repeat_interleave(counts)
    reach = until[_counted_from(first_segment, counts, 1)]
    query_end = torch.zeros_like(first).scatter_reduce(0, tile, reach, "amax")

    slots = (query_end - first + SPLIT - 1) // SPLIT
    tile = torch.arange(len(first)).repeat_interleave(slots)
    begin = _counted_from(first, slots, SPLIT)
    stop = torch.minimum(begin + SPLIT, query_end[tile])
    is_part = slots[tile] > 1
    slot = torch.where(is_part, is_part.cumsum(0) - 1, -1)
    of_queries = torch.searchsorted(starts, begin, right=True) - 1, torch.searchsorted(starts, stop)
    table = torch.stack([first[tile], end[tile], begin, stop, slot, *of_queries], dim=1)
    first_slot = torch.where(slots > 1, slots, 0).cumsum(0) - slots
    sums = torch.stack([first, end, first_slot, slots], dim=1)[tile[is_part]]
    return table[(stop - begin).argsort(descending=True, stable=True)], sums


def _counted_from(first: Tensor, counts: Tensor, step: int) -> Tensor:
    """first[0], first[0] + step, ... (counts[0] of them), first[1], ..."""
    ends = counts.cumsum(0)
    index = torch.arange(int(ends[-1]) if len(ends) else 0)
    within = index - (ends - counts).repeat_interleave(counts)
    return first.repeat_interleave(counts) + step * within
