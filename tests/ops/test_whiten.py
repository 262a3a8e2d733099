"""Two processes hold the parts of one batch; each calls worker."""

import pytest
import torch
import torch.distributed as dist

import fastrl

NAN = float("nan")
# Per case the parts of both ranks, and their masks.
CASES = {
    "parts of unequal sizes and shapes": (
        [torch.tensor([[1.0, 5.0], [NAN, -2.0]]), torch.tensor([5.0, 7.0, 0.5])],
        [torch.tensor([[True, True], [False, True]]), torch.tensor([True, False, True])],
    ),
    "no mask on one rank": (
        [torch.tensor([3.0, NAN, 8.0]), torch.tensor([4.0, 3.0])],
        [torch.tensor([True, False, True]), None],
    ),
    "nothing on one rank": ([torch.zeros(0), torch.tensor([1.0, 2.0, 6.0])], [None, None]),
    "nothing that counts on one rank": (
        [torch.full((3,), NAN), torch.tensor([1.0, 2.0, 6.0])],
        [torch.zeros(3, dtype=torch.bool), None],
    ),
    "one entry on each": ([torch.tensor([1.0]), torch.tensor([3.0])], [None, None]),
    "one entry in all": (
        [torch.tensor([4.0, NAN]), torch.zeros(0)],
        [torch.tensor([True, False]), None],
    ),
    "nothing anywhere": ([torch.zeros(0), torch.tensor([NAN])], [None, torch.tensor([False])]),
    "a large offset": (
        [2.0**40 + torch.arange(7).double(), 2.0**40 - torch.arange(30).double()],
        [None, None],
    ),
    "two dtypes": ([torch.tensor([1.0, 2.0]).bfloat16(), torch.tensor([6.0, 2.0])], [None, None]),
    "a NaN that counts": ([torch.tensor([1.0, NAN]), torch.tensor([2.0, 3.0])], [None, None]),
}


def worker(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/init", rank=rank, world_size=2)
    results = {
        name: fastrl.whiten(parts[rank], masks[rank], group=dist.group.WORLD)
        for name, (parts, masks) in CASES.items()
    }
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(two_ranks, tmp_path_factory):
    return two_ranks.run(__file__, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("name", CASES)
def test_parts_give_the_result_of_the_whole(ranks, name):
    parts, masks = CASES[name]
    masks = [
        torch.ones_like(part, dtype=torch.bool) if mask is None else mask
        for part, mask in zip(parts, masks, strict=True)
    ]
    flat = [torch.cat([x.flatten() for x in both]) for both in (parts, masks)]
    whole = fastrl.whiten(*flat).split([part.numel() for part in parts])
    for rank in (0, 1):
        got = ranks[rank][name]
        assert got.dtype == torch.promote_types(parts[rank].dtype, torch.float32)
        assert (got[~masks[rank]] == 0).all()
        torch.testing.assert_close(got, whole[rank].view_as(got).to(got.dtype), equal_nan=True)


def test_parts_by_hand(ranks):
    # 1, 5, -2, 5, 0.5: mean 1.9, squares 0.81 + 9.61 + 15.21 + 9.61 + 1.96 = 37.2, over 4
    scale = (9.3 + 1e-8) ** -0.5
    first, second = (ranks[rank]["parts of unequal sizes and shapes"] for rank in (0, 1))
    expected = torch.tensor([[-0.9, 3.1], [0.0, -3.9]]) * scale
    torch.testing.assert_close(first, expected)
    torch.testing.assert_close(second, torch.tensor([3.1, 0.0, -1.4]) * scale)
    assert first[0, 1] == second[0]  # equal entries, equal bits, whichever rank has them
    assert ranks[0]["one entry in all"].tolist() == [0, 0]
    assert ranks[1]["a NaN that counts"].isnan().all()


@pytest.mark.parametrize(
    "arguments, options, error, message",
    [
        ((torch.arange(3),), {}, TypeError, "x of dtype float32"),
        (([1.0],), {}, TypeError, "x as a tensor, got list"),
        ((torch.ones(3), torch.ones(2) > 0), {}, ValueError, r"mask \(3,\) like x, got \(2,\)"),
        ((torch.ones(3), torch.ones(3)), {}, TypeError, "mask of dtype bool, got torch.float32"),
        ((torch.ones(3),), {"group": 0}, TypeError, "group as a ProcessGroup, got int. Pass one"),
    ],
)
def test_bad_arguments(arguments, options, error, message):
    with pytest.raises(error, match=message) as caught:
        fastrl.whiten(*arguments, **options)
    assert str(caught.value).startswith("whiten: expected ")
