"""What pack_groups and from_segments give, cut into completions and into micro-batches."""

import random

import pytest
import torch
from forests import ancestry, random_forest

from fastrl import reference
from fastrl._split import balanced_bins
from fastrl.layout import MicroBatch, PackedBatch, pack_groups


def tokens(*numbers):
    return torch.tensor(numbers, dtype=torch.int64)


def random_groups(seed):
    """Prompts without completions, empty completions and ragged ones; each token is its number."""
    rng = random.Random(seed)
    count = 0

    def fresh(length):
        nonlocal count
        count += length
        return torch.arange(count - length, count)

    prompts, completions = [], []
    for _ in range(rng.randint(1, 9)):
        prompts.append(fresh(rng.randint(1, 6)))
        completions.append([fresh(rng.choice([0, 1, 3, 8])) for _ in range(rng.randint(0, 4))])
    return prompts, completions


def random_batch(seed):
    """Trees of several depths, with empty segments; the masks leave some tokens out."""
    lengths, prefix = random_forest(seed)
    shift = len(prefix)
    more, prefix_of_more = random_forest(seed + 1000)
    lengths, prefix = lengths + more, prefix + [p + shift if p >= 0 else -1 for p in prefix_of_more]
    rng = random.Random(seed)
    masks = []
    for s, length in enumerate(lengths):
        mask = [rng.random() < 0.7 for _ in range(length)]
        if length and not any(lengths[a] for a in ancestry(prefix, s)[:-1]):
            mask[0] = False  # no token before it
        masks.append(torch.tensor(mask, dtype=torch.bool))
    segments = list(torch.arange(sum(lengths)).split(lengths))
    return PackedBatch.from_segments(segments, prefix, masks)


@pytest.mark.parametrize("seed", range(10))
def test_unpack_gives_back_the_completions_of_pack_groups(seed):
    prompts, completions = random_groups(seed)
    batch = pack_groups(prompts, completions)
    got = batch.unpack(batch.target_ids)
    expected = [completion for group in completions for completion in group]
    assert [g.tolist() for g in got] == [e.tolist() for e in expected]


def test_unpack_of_trees_by_the_callers_numbers():
    segments = [tokens(0, 1), tokens(10, 11), tokens(20), tokens(30, 31)]  # 1 is the root
    batch = PackedBatch.from_segments(segments, [3, -1, 1, 1])
    x = torch.arange(10.0).view(5, 2).requires_grad_()
    numbers = batch.segment_order[batch.completion_segments].tolist()
    parts = dict(zip(numbers, batch.unpack(batch.target_ids), strict=True))
    assert {s: part.tolist() for s, part in parts.items()} == {2: [20], 3: [30, 31], 0: [0, 1]}
    batch.unpack(x)[1].sum().backward()
    assert x.grad[:, 0].tolist() == [0, 1, 1, 0, 0]
    assert [len(part) for part in batch.unpack(x.T, dim=1)] == [2, 2, 2]
    assert [part.shape[1] for part in batch.unpack(x.T, dim=1)] == [1, 2, 2]
    moved = batch.to("meta")  # cut by what is known on the host
    assert [len(part) for part in moved.unpack(torch.zeros(5, device="meta"))] == [1, 2, 2]
    with pytest.raises(ValueError, match=r"PackedBatch.unpack: expected x of size M = 5 in dim.*7"):
        batch.unpack(torch.zeros(7))  # one for each token, not for each target


@pytest.mark.parametrize("make", [random_batch, lambda seed: pack_groups(*random_groups(seed))])
@pytest.mark.parametrize("seed", range(15))
def test_micro_batches_hold_each_tree_once_as_it_was(make, seed):
    batch = make(seed)
    layout = batch.layout
    roots = (layout.prefix < 0).nonzero().squeeze(-1)
    sizes = [*layout.cu_seqlens[roots].tolist(), layout.num_tokens]
    largest = max(b - a for a, b in zip(sizes, sizes[1:], strict=False))
    micro_batches = batch.split_by_tokens(max(1, largest + 2))
    assert all(isinstance(micro, MicroBatch) for micro in micro_batches)
    for name in ("tokens", "targets", "completions"):
        held = torch.cat([getattr(micro, f"source_{name}") for micro in micro_batches])
        whole = {
            "tokens": batch.token_ids,
            "targets": batch.target_ids,
            "completions": batch.completion_segments,
        }[name]
        assert held.sort().values.tolist() == list(range(len(whole)))

    for micro in micro_batches:
        at = micro.source_tokens
        assert micro.layout.num_tokens == len(at) <= max(1, largest + 2)
        assert (at.diff() > 0).all()
        assert torch.equal(micro.token_ids, batch.token_ids[at])
        assert torch.equal(micro.layout.position_ids, layout.position_ids[at])
        before = micro.layout.predecessor
        assert torch.equal(torch.where(before < 0, -1, at[before]), layout.predecessor[at])
        # trees are whole, so what a token sees and is seen by came along
        seen = layout.visible_until[at] - at
        assert torch.equal(micro.layout.visible_until - torch.arange(len(at)), seen)
        assert torch.equal(at[micro.target_index], batch.target_index[micro.source_targets])
        assert torch.equal(micro.target_ids, batch.target_ids[micro.source_targets])
        completions = batch.unpack(batch.target_ids)
        expected = [completions[c].tolist() for c in micro.source_completions]
        assert [part.tolist() for part in micro.unpack(micro.target_ids)] == expected
        whole_order = batch.segment_order[batch.completion_segments[micro.source_completions]]
        assert torch.equal(micro.segment_order[micro.completion_segments], whole_order)
    firsts = [micro.segment_order[0].item() for micro in micro_batches]
    assert firsts == sorted(firsts)


def test_micro_batches_by_hand():
    prompts = [tokens(1, 2), tokens(3), tokens(4, 5, 6), tokens(7)]
    completions = [[tokens(10), tokens()], [tokens(11, 12)], [tokens(13)], []]
    batch = pack_groups(prompts, completions)  # trees of 3, 3, 4 and 1 tokens
    one, two = batch.split_by_tokens(6)
    assert one.token_ids.tolist() == [1, 2, 10, 3, 11, 12]
    assert one.layout.prefix.tolist() == [-1, 0, 0, -1, 3]
    assert one.layout.cu_seqlens.tolist() == [0, 2, 3, 3, 4, 6]
    assert one.target_index.tolist() == [2, 4, 5] and one.predict_index.tolist() == [1, 3, 4]
    assert one.source_targets.tolist() == [0, 1, 2] and two.source_targets.tolist() == [3]
    assert one.source_completions.tolist() == [0, 1, 2] and two.source_completions.tolist() == [3]
    assert two.token_ids.tolist() == [4, 5, 6, 13, 7]
    assert two.source_tokens.tolist() == [6, 7, 8, 9, 10]
    assert two.segment_order.tolist() == [5, 6, 7]
    assert repr(two) == (
        "MicroBatch(1 target, 1 completion, PackedLayout(5 tokens, 3 segments, 2 trees: 3 + 1 | 1))"
    )
    (whole,) = batch.split_by_tokens(11)
    assert torch.equal(whole.token_ids, batch.token_ids)
    (again,) = two.split_by_tokens(5)  # sources count in the batch that was split
    assert again.source_targets.tolist() == [0]
    moved = two.to("meta")
    assert isinstance(moved, MicroBatch) and moved.source_targets.is_meta
    there = batch.to("meta").split_by_tokens(6)  # needs nothing that is only there
    assert [len(micro.token_ids) for micro in there] == [6, 5]
    for name in ("token_ids", "target_ids", "predict_index", "source_tokens", "source_completions"):
        assert all(getattr(micro, name).is_meta for micro in there)
    assert there[1].layout.position_ids.is_meta


def test_a_batch_is_built_where_its_tokens_are_whatever_the_default_device():
    prompts, completions = random_groups(2)
    expected = pack_groups(prompts, completions)
    with torch.device("meta"):  # as with torch.set_default_device("cuda")
        batch = pack_groups(prompts, completions)
        micro_batches = batch.split_by_tokens(40)
    assert torch.equal(batch.predict_index, expected.predict_index)
    assert [x.device.type for m in micro_batches for x in (m.token_ids, m.layout.prefix)] == [
        "cpu"
    ] * (2 * len(micro_batches))
    there = pack_groups(
        [p.to("meta") for p in prompts], [[c.to("meta") for c in g] for g in completions]
    )
    assert all(v.is_meta for k, v in vars(there).items() if hasattr(v, "is_meta") and k[0] != "_")
    assert there.layout.visible_until.is_meta
    assert [len(x) for x in there.unpack(there.target_ids)] == [
        len(x) for g in completions for x in g
    ]


def test_a_tree_is_not_cut():
    batch = pack_groups([tokens(1), tokens(2, 3)], [[tokens(4)], [tokens(5, 6), tokens(7)]])
    message = r"split_by_tokens: expected max_tokens >= 5, the tokens of tree 1, got 4\. Raise it"
    with pytest.raises(ValueError, match=message):
        batch.split_by_tokens(4)
    assert [len(micro.token_ids) for micro in batch.split_by_tokens(5)] == [2, 5]
    with pytest.raises(ValueError, match="expected max_tokens >= 1, room for a token, got 0"):
        pack_groups([], []).split_by_tokens(0)


def test_take_wants_a_bool_for_each_completion():
    batch = pack_groups([tokens(1), tokens(2)], [[tokens(3), tokens(4)], [tokens(5)]])
    for error, message, given in (
        (TypeError, "completions as a tensor, got list", [True] * 3),
        (TypeError, "completions bool, got torch.int64", torch.tensor([0, 1, 2])),
        (ValueError, r"completions \[C\] = \(3,\), got \(5,\)", torch.ones(5).bool()),
    ):
        with pytest.raises(error, match=f"PackedBatch.take: expected {message}"):
            batch.take(given)


def test_micro_batches_of_nothing():
    assert pack_groups([], []).split_by_tokens(1) == []
    empty = PackedBatch.from_segments([tokens(), tokens()], [-1, 0])
    (micro,) = empty.split_by_tokens(1)
    assert micro.layout.num_segments == 2 and micro.source_completions.tolist() == [0]


def groupings(count):
    """All ways to put that many items into bins, numbered by their first items."""
    if count == 0:
        yield []
        return
    for first in groupings(count - 1):
        for b in range(max(first, default=-1) + 2):
            yield [*first, b]


def loads_of(sizes, bins):
    loads = [0] * (max(bins) + 1)
    for size, b in zip(sizes, bins, strict=True):
        loads[b] += size
    return loads


@pytest.mark.parametrize("seed", range(30))
def test_bins_are_few_and_even_beside_the_best_of_all(seed):
    rng = random.Random(seed)
    sizes = [rng.choice([0, 1, 2, 5, rng.randint(1, 30)]) for _ in range(7)]
    capacity = max(max(sizes), 1) + rng.choice([0, 3, 20])
    bins = balanced_bins(sizes, capacity)
    loads = loads_of(sizes, bins)
    assert list(dict.fromkeys(bins)) == list(range(len(loads)))
    assert max(loads) <= capacity
    possible = [loads_of(sizes, b) for b in groupings(7)]
    fewest = min(len(other) for other in possible if max(other) <= capacity)
    assert len(loads) <= fewest * 11 / 9 + 6 / 9  # the bound of best fit
    lowest = min(max(other) for other in possible if len(other) == len(loads))
    assert max(loads) <= lowest * 4 / 3  # the bound of the least loaded; 11/9 that of the other


@pytest.mark.parametrize("seed", range(10))
def test_many_bins_are_even(seed):
    rng = random.Random(seed)
    sizes = [rng.randint(100, 900) for _ in range(500)]
    loads = loads_of(sizes, balanced_bins(sizes, 4096))
    assert len(loads) <= -(-sum(sizes) // 4096) + 1
    assert max(loads) <= 4096 and max(loads) - min(loads) <= max(sizes)


def test_bins_by_hand():
    assert balanced_bins([], 5) == []
    assert balanced_bins([4] * 10, 16) == [0, 1, 2, 0, 1, 2, 0, 1, 2, 0]  # 4, 3, 3; not 4, 4, 2
    # the least loaded first, even, would need a third bin of 6: 3 + 2 + 2
    assert balanced_bins([3, 3, 2, 2, 2], 6) == [0, 0, 1, 1, 1]
    assert balanced_bins([7, 1, 7], 7) == [0, 1, 2]
    assert balanced_bins([0, 0], 1) == [0, 0]


def test_gradients_of_micro_batches_add_up_to_the_whole_batchs():
    """With the whole batch's denominator as normalizer, for each of the reductions."""
    torch.manual_seed(0)
    batch = pack_groups(*random_groups(3))
    num_tokens, num_targets = batch.layout.num_tokens, len(batch.target_ids)
    weight = torch.randn(num_tokens, 7, dtype=torch.float64, requires_grad=True)
    head = torch.randn(7, num_tokens, dtype=torch.float64)
    advantages = torch.randn(num_targets, dtype=torch.float64)
    num_completions = int((batch.completion_cu_seqlens.diff() > 0).sum())

    def logprobs_of(part):
        hidden = weight[part.token_ids][part.predict_index]
        return reference.token_logprobs(hidden @ head, part.target_ids)

    old = logprobs_of(batch).detach() + 0.2 * torch.randn(num_targets, dtype=torch.float64)

    def loss_of(part, at, **options):
        bounds = part.completion_cu_seqlens
        return reference.ppo_loss(
            logprobs_of(part), old[at], advantages[at], cu_seqlens=bounds, **options
        )

    micro_batches = batch.split_by_tokens(30)
    assert len(micro_batches) > 1
    for reduction in ("token_mean", "sequence_mean", "sequence_mean_token_sum"):
        whole = loss_of(batch, slice(None), reduction=reduction)
        (expected,) = torch.autograd.grad(whole, weight)
        normalizer = num_targets if reduction == "token_mean" else num_completions
        total = torch.zeros_like(weight)
        for micro in micro_batches:
            loss = loss_of(micro, micro.source_targets, reduction=reduction, normalizer=normalizer)
            total += torch.autograd.grad(loss, weight)[0]
        torch.testing.assert_close(total, expected, rtol=1e-12, atol=1e-15)
        assert expected.abs().max() > 1e-2


def test_leaf_values_go_through_the_whole_batch_or_the_micro_batchs_own_leaves():
    segments = [tokens(0), tokens(1, 2), tokens(3), tokens(4), tokens(5), tokens(6, 7)]
    batch = PackedBatch.from_segments(segments, [-1, 0, 1, 1, -1, 4])  # leaves: 2, 3, 5
    values = torch.tensor([1.0, 10.0, 100.0])
    whole = batch.sum_over_leaves(values)
    first, second = batch.split_by_tokens(5)
    assert torch.equal(first.sum_over_leaves(values[:2]), whole[first.source_targets])
    assert torch.equal(second.sum_over_leaves(values[2:]), whole[second.source_targets])
