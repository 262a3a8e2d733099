"""The parts that attention works through: exactly the pairs that see each other."""

import pytest
import torch
from forests import ancestry, random_forest

from fastrl._schedule import attention_parts, with_any_length
from fastrl.layout import PackedLayout


def layout_of(lengths, prefix):
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    return PackedLayout(cu_seqlens, torch.tensor(prefix, dtype=torch.int32))


def parts_of(layout):
    """Without the rows of zeros that make up for missing ones."""
    (parts,) = layout.schedule
    real = parts[:, 0] < parts[:, 1]
    assert len(parts) >= 2 and (parts[~real] == 0).all() and real.sum() >= len(parts) - 2
    return parts[real]


def times_covered(parts, num_tokens):
    """[N, N]: in how many of the parts each pair (query, key) is."""
    covered = torch.zeros(num_tokens, num_tokens, dtype=torch.int64)
    for query_start, query_end, key_start, key_end, is_causal in parts.tolist():
        block = torch.ones(query_end - query_start, key_end - key_start, dtype=torch.int64)
        covered[query_start:query_end, key_start:key_end] += block.tril() if is_causal else block
    return covered


@pytest.mark.parametrize("seed", range(40))
def test_each_visible_pair_is_in_one_part_and_no_other_pair_in_any(seed):
    lengths, prefix = random_forest(seed)
    segment_of = [s for s, length in enumerate(lengths) for _ in range(length)]
    expected = torch.tensor(
        [
            [int(j <= i and segment_of[j] in ancestry(prefix, s)) for j in range(len(segment_of))]
            for i, s in enumerate(segment_of)
        ],
        dtype=torch.int64,
    ).view(len(segment_of), len(segment_of))
    layout = layout_of(lengths, prefix)
    parts = parts_of(layout)
    assert parts.dtype == torch.int32
    assert torch.equal(times_covered(parts, layout.num_tokens), expected)
    assert (parts[:, 2] < parts[:, 3]).all()


@pytest.mark.parametrize("seed", range(20))
def test_a_querys_parts_go_from_its_root_down(seed):
    layout = layout_of(*random_forest(seed))
    (parts,) = layout.schedule
    for i in range(layout.num_tokens):
        of_query = parts[(parts[:, 0] <= i) & (i < parts[:, 1])]
        assert (of_query[:, 2].diff() > 0).all()
        assert of_query[:, 4].tolist() == [0] * (len(of_query) - 1) + [1]  # its own segment: last


@pytest.mark.parametrize("seed", range(20))
def test_the_parts_of_a_tree_do_not_depend_on_what_stands_around_it(seed):
    (lengths, prefix), (before, prefix_before), (after, prefix_after) = (
        random_forest(seed + shift) for shift in (0, 100, 200)
    )
    alone = parts_of(layout_of(lengths, prefix))
    s, t = len(before), len(before) + len(lengths)
    shifted = [p + s if p >= 0 else -1 for p in prefix]
    behind = [p + t if p >= 0 else -1 for p in prefix_after]
    packed = parts_of(layout_of([*before, *lengths, *after], [*prefix_before, *shifted, *behind]))
    start, end = sum(before), sum(before) + sum(lengths)
    of_tree = packed[(packed[:, 0] >= start) & (packed[:, 0] < end)]
    assert torch.equal(of_tree - torch.tensor([start] * 4 + [0]), alone)


def test_no_segments_have_no_parts():
    none = torch.zeros(0, dtype=torch.int64)
    assert attention_parts(none, none, none).shape == (0, 5)


def test_lengths_are_marked_as_dynamo_marks_them():
    from torch._dynamo import maybe_mark_dynamic

    ours, theirs = torch.zeros(3), torch.zeros(3)
    with_any_length([ours])
    maybe_mark_dynamic(theirs, 0)
    assert vars(theirs).items() <= vars(ours).items()
    layout = layout_of([3, 2], [-1, 0])
    for one in (layout, layout.to("meta"), layout.to("cpu")):
        for tensor in (one.cu_seqlens, one.prefix, *one.schedule):
            assert tensor._dynamo_weak_dynamic_indices == {0}


def test_compiled_once_for_layouts_of_many_segments():
    compiled = []

    def backend(graph, example_inputs):
        compiled.append(graph)
        return graph.forward

    torch.compiler.reset()

    @torch.compile(backend=backend, fullgraph=True)
    def last_keys(layout):
        return layout.schedule[0][:, 3] + layout.cu_seqlens.sum()

    for completions in (3, 5, 9):
        layout = layout_of([4] + [2] * completions, [-1] + [0] * completions)
        expected = layout.schedule[0][:, 3] + layout.cu_seqlens.sum()
        assert torch.equal(last_keys(layout), expected)
    assert len(compiled) == 1
