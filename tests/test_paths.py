"""Returns along a tree: every root-to-leaf path is a trajectory."""

import pytest
import torch
from forests import ancestry, random_forest

import fastrl
from fastrl import reference
from fastrl._paths import LeafPaths
from fastrl.layout import PackedBatch, PackedLayout

# A prompt of 2 tokens; a turn of 2 that a leaf of 1 and a leaf of 2 continue; a leaf of 1 of the
# prompt itself; a prompt of 1 that nothing continues.
LENGTHS, PREFIX = [2, 2, 1, 2, 1, 1], [-1, 0, 1, 1, 0, -1]
IS_ACTION = torch.tensor([False, False, True, True, True, True, True, True, False])
REWARDS = torch.tensor([0.0, 0.0, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 0.0])
VALUES = torch.tensor([0.0, 0.0, 2.0, 4.0, 2.0, 4.0, 8.0, 16.0, 0.0])
NAMESPACES = pytest.mark.parametrize("ops", [fastrl.ops, reference], ids=["ops", "reference"])


def layout_of(lengths, prefix):
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    return PackedLayout(cu_seqlens, torch.tensor(prefix, dtype=torch.int32))


def test_by_hand():
    paths = layout_of(LENGTHS, PREFIX).paths()
    assert paths.index.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3, 5, 6, 0, 1, 7, 8]
    assert paths.cu_seqlens.tolist() == [0, 5, 11, 14, 15]
    assert paths.leaves.tolist() == [2, 3, 4, 5]
    assert [x.dtype for x in (paths.index, paths.cu_seqlens)] == [torch.int64, torch.int32]
    ones = torch.ones(15)
    assert paths.sum(ones).tolist() == [3, 3, 2, 2, 1, 1, 1, 1, 1]
    assert paths.mean(ones).tolist() == [1] * 9
    place = torch.arange(15.0)  # token 0 stands at 0, 5, 11; token 3 at 3, 8
    assert paths.sum(place).tolist() == [16, 19, 9, 11, 4, 9, 10, 13, 14]
    assert repr(paths) == "LeafPaths(4 paths, 15 items on them, on cpu)"


@NAMESPACES
def test_discounted_returns_by_hand(ops):
    """gamma = 0.5. Along the first leaf: 4, 2 + 4 / 2 = 4, 1 + 4 / 2 = 3; along the second: 16,
    8 + 16 / 2 = 16, 2 + 16 / 2 = 10, 1 + 10 / 2 = 6; along the third: 32."""
    paths = layout_of(LENGTHS, PREFIX).paths()
    returns = ops.discounted_returns(
        REWARDS[paths.index],
        gamma=0.5,
        cu_seqlens=paths.cu_seqlens,
        mask=IS_ACTION[paths.index],
    )
    assert returns.tolist() == [0, 0, 3, 4, 4, 0, 0, 6, 10, 16, 16, 0, 0, 32, 0]
    assert paths.mean(returns).tolist() == [0, 0, 4.5, 7, 4, 16, 16, 32, 0]
    assert paths.sum(returns).tolist() == [0, 0, 9, 14, 4, 16, 16, 32, 0]


@NAMESPACES
def test_gae_by_hand(ops):
    """gamma = lambda = 0.5: delta = r + v' / 2 - v, A = delta + A' / 4.

    First leaf: delta 1 + 2 - 2 = 1, 2 + 1 - 4 = -1, 4 - 2 = 2; A 0.875, -0.5, 2.
    Second: delta 1 + 2 - 2 = 1, 2 + 2 - 4 = 0, 8 + 4 - 4 = 8, 16 - 8 = 8; A 1.625, 2.5, 10, 8.
    Third: A 32 - 16 = 16. Returns are A + v: 2.875, 3.5, 4; 3.625, 6.5, 14, 16; 32.
    """
    paths = layout_of(LENGTHS, PREFIX).paths()
    advantages, returns = ops.gae(
        REWARDS[paths.index],
        VALUES[paths.index],
        gamma=0.5,
        gae_lambda=0.5,
        cu_seqlens=paths.cu_seqlens,
        mask=IS_ACTION[paths.index],
    )
    assert paths.sum(advantages).tolist() == [0, 0, 2.5, 2, 2, 10, 8, 16, 0]
    assert paths.mean(returns).tolist() == [0, 0, 3.25, 5, 4, 14, 16, 32, 0]


@NAMESPACES
def test_targets_of_a_batch_given_in_another_order(ops):
    """The same tree: segments as given are first leaf, turn, second leaf, prompt, third, prompt."""
    lengths, prefix = [1, 2, 2, 2, 1, 1], [1, 3, 1, -1, 3, -1]
    tokens = torch.arange(9)
    batch = PackedBatch.from_segments(tokens.split(lengths), prefix)
    assert batch.segment_order.tolist() == [3, 1, 0, 2, 4, 5]
    paths = batch.paths()
    assert paths.index.tolist() == [0, 1, 2, 0, 1, 3, 4, 5]
    assert paths.cu_seqlens.tolist() == [0, 3, 7, 8, 8]
    assert paths.leaves.tolist() == [2, 3, 4, 5]
    rewards, values = REWARDS[IS_ACTION], VALUES[IS_ACTION]  # now one per target
    advantages, returns = ops.gae(
        rewards[paths.index],
        values[paths.index],
        gamma=0.5,
        gae_lambda=0.5,
        cu_seqlens=paths.cu_seqlens,
    )
    assert paths.sum(advantages).tolist() == [2.5, 2, 2, 10, 8, 16]
    assert paths.mean(returns).tolist() == [3.25, 5, 4, 14, 16, 32]


ESTIMATORS = {
    "discounted_returns": (1, {}),
    "gae": (2, {"gae_lambda": 0.8}),
    "lambda_returns": (2, {"gae_lambda": 0.8}),
    "vtrace": (3, {"gae_lambda": 0.8, "rho_clip": 1.5}),
    "retrace_returns": (4, {"gae_lambda": 0.8}),
    "n_step_returns": (2, {"n": 3}),
}


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("op", ESTIMATORS)
def test_each_path_by_itself(op, seed):
    lengths, prefix = random_forest(seed)
    layout = layout_of(lengths, prefix)
    paths, n = layout.paths(), layout.num_tokens
    torch.manual_seed(seed)
    count, options = ESTIMATORS[op]
    inputs = [torch.randn(n, dtype=torch.float64) for _ in range(count)]
    is_action = torch.rand(n) < 0.7

    def call(tokens, **packed):
        out = getattr(reference, op)(
            *(x[tokens] for x in inputs), gamma=0.9, mask=is_action[tokens], **options, **packed
        )
        return out if isinstance(out, tuple) else (out,)

    leaves = [s for s in range(len(prefix)) if s not in prefix]
    assert paths.leaves.tolist() == leaves
    bounds = layout.cu_seqlens.tolist()
    totals, counts = torch.zeros(n, dtype=torch.float64), torch.zeros(n)
    together = call(paths.index, cu_seqlens=paths.cu_seqlens)
    for i, leaf in enumerate(leaves):
        runs = [torch.arange(bounds[s], bounds[s + 1]) for s in ancestry(prefix, leaf)]
        tokens = torch.cat(runs)
        own = slice(*paths.cu_seqlens[i : i + 2].tolist())
        assert torch.equal(paths.index[own], tokens)
        assert layout.position_ids[tokens].tolist() == list(range(len(tokens)))
        for got, alone in zip(together, call(tokens), strict=True):
            assert torch.equal(got[own], alone)
        totals[tokens] += together[0][own]
        counts[tokens] += 1
    torch.testing.assert_close(paths.sum(together[0]), totals)
    torch.testing.assert_close(paths.mean(together[0]), totals / counts)


def test_shared_tokens_get_the_gradient_of_unshared_copies():
    lengths, prefix = [3, 2, 4, 0, 2, 2, 1], [-1, 0, 1, 1, 3, 0, -1]
    layout = layout_of(lengths, prefix)
    paths, n = layout.paths(), layout.num_tokens
    logprobs = torch.randn(n, dtype=torch.float64, requires_grad=True)
    values = torch.randn(n, dtype=torch.float64, requires_grad=True)
    rewards, is_action = torch.randn(n, dtype=torch.float64), (layout.prefix >= 0)
    is_action = is_action[layout.segment_ids]
    on_paths = is_action[paths.index]
    advantages, returns = fastrl.gae(
        rewards[paths.index],
        values.detach()[paths.index],
        gamma=0.9,
        gae_lambda=0.7,
        cu_seqlens=paths.cu_seqlens,
        mask=on_paths,
    )

    def policy_loss(logprobs, weights, mask):
        return fastrl.policy_gradient_loss(logprobs, weights, loss_mask=mask, normalizer=1)

    losses = (
        policy_loss(logprobs, paths.sum(advantages), is_action),
        policy_loss(logprobs[paths.index], advantages, on_paths),
    )
    shared, copies = (torch.autograd.grad(loss, logprobs)[0] for loss in losses)
    torch.testing.assert_close(shared, copies)
    assert shared[:3].eq(0).all() and shared[3:-1].ne(0).all()

    # the mean is where the copies' squared errors are least, and each copy pulls once
    copied = ((values[paths.index] - returns).square() * on_paths).sum()
    number = paths.sum(on_paths.double())
    shared_error = (number * (values - paths.mean(returns)).square()).sum()
    got, expected = (torch.autograd.grad(loss, values)[0] for loss in (shared_error, copied))
    torch.testing.assert_close(got, expected)


def test_sum_and_mean_are_differentiable_and_keep_the_dtype():
    paths = layout_of([1, 2, 1, 0, 2], [-1, 0, 1, 1, 0]).paths()
    x = torch.randn(len(paths.index), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(paths.sum, x)
    assert torch.autograd.gradcheck(paths.mean, x)
    assert paths.sum(x.float()).dtype == paths.mean(x.float()).dtype == torch.float32


def test_many_leaves_are_summed_exactly():
    """float32, one after another, would stop at 2^24."""
    paths = layout_of([1] + [0] * 3, [-1, 0, 0, 0]).paths()
    assert paths.sum(torch.tensor([2.0**24, 1.0, 1.0])).tolist() == [2**24 + 2]


@pytest.mark.parametrize(
    ("lengths", "prefix", "index", "bounds"),
    [
        ([], [], [], [0]),
        ([0], [-1], [], [0, 0]),
        ([2], [-1], [0, 1], [0, 2]),
        ([0, 0, 3], [-1, 0, 0], [0, 1, 2], [0, 0, 3]),
        ([2, 0, 1, 0], [-1, 0, 1, -1], [0, 1, 2], [0, 3, 3]),
        ([1, 1, 1, 1], [-1, -1, 1, 2], [0, 1, 2, 3], [0, 1, 4]),
    ],
)
def test_empty_segments_and_roots_that_are_leaves(lengths, prefix, index, bounds):
    paths = layout_of(lengths, prefix).paths()
    assert paths.index.tolist() == index
    assert paths.cu_seqlens.tolist() == bounds
    assert paths.sum(torch.ones(len(index))).tolist() == [1] * len(index)
    returns = fastrl.discounted_returns(
        torch.ones(len(index)), gamma=0.0, cu_seqlens=paths.cu_seqlens
    )
    assert returns.tolist() == [1] * len(index)


def test_paths_follow_the_layout_to_another_device():
    layout = layout_of(LENGTHS, PREFIX)
    assert layout.to("cpu").paths().index.tolist() == layout.paths().index.tolist()
    assert layout.to("meta")._subtree_end.is_meta


@pytest.mark.gpu
def test_paths_on_a_gpu():
    layout = layout_of(LENGTHS, PREFIX)
    ours, there = layout.paths(), layout.to("cuda").paths()
    x = torch.randn(len(ours.index))
    for a, b in ((ours.index, there.index), (ours.cu_seqlens, there.cu_seqlens)):
        assert torch.equal(a, b.cpu())
    assert torch.equal(ours.sum(x), there.sum(x.cuda()).cpu())
    assert torch.equal(ours.mean(x), there.mean(x.cuda()).cpu())


def test_bad_arguments():
    paths = layout_of(LENGTHS, PREFIX).paths()
    with pytest.raises(ValueError, match=r"paths: expected x \[P\] = \(15,\), got \(9,\)"):
        paths.sum(torch.ones(9))
    # two leaves below a prompt of 2^30 tokens
    with pytest.raises(ValueError, match=r"expected fewer than 2\*\*31 items .*, got 2147483650"):
        LeafPaths(torch.tensor([2**30, 1, 1]), torch.tensor([3, 2, 3]))
