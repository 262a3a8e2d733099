"""The tables that attention walks on a GPU, against brute force: each visible pair is met once, and
nothing that a table lists is empty."""

import itertools
import time

import pytest
import torch
from forests import random_forest

from fastrl import _tiles
from fastrl._tiles import TILE, attention_tiles
from fastrl.layout import PackedLayout


def layout_of(lengths, prefix):
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    return PackedLayout(cu_seqlens, torch.tensor(prefix, dtype=torch.int32))


def tables_of(layout):
    bounds = layout.cu_seqlens.long()
    until = torch.cat([layout.visible_until.long(), bounds[-1:]])[bounds[:-1]]
    return attention_tiles(bounds[:-1], bounds[1:], until)


def rows_of(layout):
    """The tables as lists, without the rows that hold no token."""
    tables = tables_of(layout)
    assert all(len(table) >= 2 and table.dtype == torch.int32 for table in tables)
    query_tiles, segments, key_tiles, key_sums = (table.tolist() for table in tables)
    N, nothing = layout.num_tokens, [0, 0, len(key_sums) - 1, 1]
    assert key_sums[-1] == nothing and (len(key_sums) > 2 or key_sums[0] == [0, 0, 0, 1])
    return (
        [row for row in query_tiles if row != [N, -1]],
        [row for row in segments if row[0] < row[1]],
        [row for row in key_tiles if row[0] < row[1]],
        [row for row in key_sums if row[0] < row[1]],
    )


def visible_in(layout):
    token = torch.arange(layout.num_tokens)
    return (token <= token[:, None]) & (token[:, None] < layout.visible_until)


def forest_of(seed):
    lengths, prefix = random_forest(seed)
    return [length * (3 + 17 * (seed % 4)) for length in lengths], prefix


def met_by_queries(segments, first, last_segment):
    """The segments that a tile walks, in order, as the kernel finds its way."""
    segment = last_segment
    while segment >= 0:
        yield segment
        start, *_, parent = segments[segment]
        segment = segment - 1 if start > first else parent


@pytest.mark.parametrize("seed", range(40))
def test_every_query_meets_its_keys_once_from_its_own_segment_to_the_root(seed):
    layout = layout_of(*forest_of(seed))
    query_tiles, segments, *_ = rows_of(layout)
    N, met = layout.num_tokens, torch.zeros(layout.num_tokens, layout.num_tokens, dtype=torch.int32)
    assert sorted(first for first, _ in query_tiles) == list(range(0, N, TILE))
    for first, last_segment in query_tiles:
        last = min(first + TILE, N) - 1
        order = list(met_by_queries(segments, first, last_segment))
        assert order == sorted(order, reverse=True)
        for s in order:
            start, end, until, shift, _ = segments[s]
            assert start <= last and first < until  # some query of the tile sees some key
            for i in range(max(first, start), min(last + 1, until)):
                met[i, start : min(i + 1, end)] += 1
            assert (layout.position_ids[start:end] == torch.arange(start, end) + shift).all()
    assert torch.equal(met, visible_in(layout).int())


@pytest.mark.parametrize("split", [128, 256, 8192])
@pytest.mark.parametrize("seed", range(20))
def test_every_key_meets_its_queries_once_in_order(monkeypatch, seed, split):
    monkeypatch.setattr(_tiles, "SPLIT", split)
    layout = layout_of(*forest_of(seed))
    _, segments, key_tiles, key_sums = rows_of(layout)
    visible, roots = visible_in(layout), [start for start, *_, parent in segments if parent < 0]
    met, parts = torch.zeros_like(visible, dtype=torch.int32), {}
    for first, end, begin, stop, slot, first_segment, end_segment in key_tiles:
        root = max(start for start in roots if start <= first)
        assert (first - root) % TILE == 0 and (begin - first) % split == 0
        assert first < end <= first + TILE and begin < stop <= begin + split
        met[begin:stop, first:end] += visible[begin:stop, first:end].int()
        assert visible[stop - 1, first:end].any() and visible[begin, first:end].any()
        parts.setdefault((first, end), []).append((begin, stop, slot))
        of_queries = {int(s) for s in layout.segment_ids[begin:stop].unique()}
        starts = [segments[s][0] for s in range(first_segment, end_segment)]
        assert of_queries == {int(layout.segment_ids[start]) for start in starts}
    assert torch.equal(met, visible.int())
    for (first, end), of_tile in parts.items():
        ordered = sorted(of_tile)
        assert all(a[1] == b[0] for a, b in itertools.pairwise(ordered))
        if len(ordered) == 1:
            assert ordered[0][2] == -1
            continue
        slots = [slot for *_, slot in ordered]
        assert slots == list(range(slots[0], slots[0] + len(slots)))  # summed in this order
        assert all(key_sums[slot] == [first, end, slots[0], len(slots)] for slot in slots)
    assert len(key_sums) == sum(len(of_tile) for of_tile in parts.values() if len(of_tile) > 1)


def test_heavy_tiles_come_first():
    query_tiles, _, key_tiles, _ = tables_of(layout_of([1000, 300, 5, 300, 700], [-1, 0, 0, 0, -1]))
    assert query_tiles[:4, 0].tolist() == [1280, 1536, 1152, 1408]  # edges count as well
    assert query_tiles[-1, 0] == 0
    lengths = key_tiles[:, 3] - key_tiles[:, 2]
    assert torch.equal(lengths, lengths.sort(descending=True).values)


def test_by_hand():
    """A prompt of 150 with completions of 100, none and 30; then 10 tokens alone."""
    layout = layout_of([150, 100, 0, 30, 10], [-1, 0, 0, 0, -1])
    query_tiles, segments, key_tiles, key_sums = rows_of(layout)
    assert segments == [
        [0, 150, 280, 0, -1],
        [150, 250, 250, 0, 0],
        [250, 280, 280, -100, 0],
        [280, 290, 290, -280, -1],
    ]
    assert query_tiles == [[128, 2], [256, 3], [0, 0]]
    assert key_tiles == [
        [0, 128, 0, 280, -1, 0, 3],
        [128, 256, 128, 280, -1, 0, 3],
        [256, 280, 256, 280, -1, 2, 3],
        [280, 290, 280, 290, -1, 3, 4],
    ]
    assert key_sums == []


@pytest.mark.parametrize("lengths, prefix", [([], []), ([0], [-1]), ([0, 0], [-1, 0])])
def test_without_tokens(lengths, prefix):
    layout = layout_of(lengths, prefix)
    assert [table.shape for table in tables_of(layout)] == [(2, 2), (2, 5), (2, 7), (2, 4)]
    assert rows_of(layout) == ([], [], [], [])


def test_a_tree_that_begins_with_nothing():
    """Below an empty root stand two trees, as far as attention goes."""
    segments = rows_of(layout_of([0, 3, 0, 2, 4], [-1, 0, 1, 2, 0]))[1]
    assert segments == [[0, 3, 5, 0, -1], [3, 5, 5, 0, 0], [5, 9, 9, -5, -1]]


def test_a_layout_has_them_wherever_it_is_moved():
    layout = layout_of([150, 100, 30], [-1, 0, 0])
    moved = layout.to("meta")
    expected = tables_of(layout)
    assert [table.shape for table in moved.schedule] == [table.shape for table in expected]
    assert all(table.is_meta and table.dtype == torch.int32 for table in moved.schedule)
    assert len(layout.schedule) == 1  # on a CPU there is another


def test_many_segments_are_quick():
    """10^5: prompts with 16 completions; and one chain, which a list of what each tile sees would
    make 4 10^7 rows of."""
    count = 10**5
    segment, starts = torch.arange(count), torch.arange(count + 1) * 30
    end_of_group = (segment // 17 * 17 + 17).clamp(max=count)
    until = torch.where(segment % 17 == 0, starts[end_of_group], starts[1:])
    chain = torch.arange(count + 1)
    for bounds, ends_of_trees in ((starts, until), (chain, torch.full((count,), count))):
        best = float("inf")
        for _ in range(5):
            begin = time.perf_counter()
            tables = attention_tiles(bounds[:-1], bounds[1:], ends_of_trees)
            best = min(best, time.perf_counter() - begin)
        assert tables[1].shape == (count, 5)
        assert best < 0.2  # 0.03 on an idle machine
