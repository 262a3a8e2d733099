"""Two processes hold unequal slices of one vocabulary; each calls worker."""

import re

import pytest
import torch
import torch.distributed as dist

import fastrl
from fastrl import reference

WIDTHS = (300, 401)  # of the ranks' slices of the vocabulary


def problem():
    torch.manual_seed(0)
    logits = 3 * torch.randn(9, sum(WIDTHS))
    logits[0, :300] = -torch.inf  # nothing of it on the first rank
    logits[1, 5] = 40.0  # all of it there
    hidden, weight = torch.randn(9, 16), torch.randn(sum(WIDTHS), 16)
    bias = torch.randn(sum(WIDTHS))
    ids = torch.tensor([310, 5, -100, 299, 300, 700, 0, 17, 650])
    return logits, hidden, weight, bias, ids


def kept_sets():
    """Of a row its token and two more, from both slices."""
    ids = problem()[-1].clamp(min=0)
    sets = torch.stack([ids, (ids + 350) % sum(WIDTHS), (ids + 1) % sum(WIDTHS)], 1)
    return sets.flatten(), torch.arange(0, sets.numel() + 1, 3, dtype=torch.int32)


def results(ops, logits, hidden, weight, bias, ids, **parallel):
    """Outputs, and the gradients in the leaves."""
    leaves = [x.clone().requires_grad_() for x in (logits, hidden, weight, bias)]
    logits, hidden, weight, bias = leaves
    options = {"temperature": 0.7, "return_entropy": True, **parallel}
    outputs = (
        *ops.token_logprobs(logits, ids, **options),
        *ops.linear_token_logprobs(hidden, weight, ids, bias=bias, softcap=4.0, **options),
        ops.token_logprobs(logits, ids, **(options | {"return_entropy": False})),
    )
    loss = sum((output * (1 + i)).sin().sum() for i, output in enumerate(outputs))
    gradients = torch.autograd.grad(loss, leaves)
    return [output.detach() for output in outputs], list(gradients)


def refusals(hidden, weight, ids):
    """What is said of a weight as FSDP2 holds it, and of logits of tensor parallelism. And a second
    derivative is refused on every rank, before any waits for another."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2,))
    weight, logits = (
        distribute_tensor(x, mesh, [Shard(dim)]) for x, dim in ((weight, 0), (hidden @ weight.T, 1))
    )
    calls = (
        lambda: fastrl.linear_token_logprobs(weight, hidden, ids),
        lambda: fastrl.linear_token_logprobs(hidden, hidden, ids, bias=logits[:, 0]),
        lambda: fastrl.linear_token_logprobs(hidden, weight, ids),
        lambda: fastrl.linear_token_loss(hidden, weight, ids, lambda logprobs, *_: logprobs),
        lambda: fastrl.token_logprobs(logits, ids),
    )
    found = []
    for call in calls:
        with pytest.raises(TypeError) as caught:
            call()
        found.append(str(caught.value))
    leaf = hidden.clone().requires_grad_()
    for call in (
        lambda: fastrl.token_logprobs(leaf, ids.clamp(max=7), group=dist.group.WORLD),
        lambda: fastrl.linear_token_logprobs(leaf, hidden, ids, group=dist.group.WORLD),
    ):
        with pytest.raises(NotImplementedError, match="expected to be differentiated once"):
            torch.autograd.grad(call().sum(), leaf, create_graph=True)
    return found


def worker(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/init", rank=rank, world_size=2)
    logits, hidden, weight, bias, ids = problem()
    start = sum(WIDTHS[:rank])
    own = slice(start, start + WIDTHS[rank])
    group = dist.group.WORLD
    parts = (logits[:, own], hidden, weight[own], bias[own], ids)
    found = results(fastrl, *parts, group=group, vocab_start=start)
    again = results(fastrl, *parts, group=group)  # where it starts is found out
    one = slice(0, sum(WIDTHS) * rank)  # nothing on the first rank, all of it on the second
    uneven = results(fastrl, logits[:, one], hidden, weight[one], bias[one], ids, group=group)
    kept = fastrl.token_logprobs(logits[:, own], ids, kept=kept_sets(), group=group)
    refused = refusals(hidden, weight, ids)
    torch.save((*found, *again, *uneven, kept, refused), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(two_ranks, tmp_path_factory):
    return two_ranks.run(__file__, tmp_path_factory.mktemp("ranks"))


def test_slices_give_the_result_of_the_whole(ranks):
    first, second = ranks
    for rank in (first, second):
        for a, b in zip([*rank[0], *rank[1]], [*rank[2], *rank[3]], strict=True):
            assert torch.equal(a, b)  # run to run
    for a, b in zip(first[0], second[0], strict=True):
        assert torch.equal(a, b)  # rank to rank

    logits, hidden, weight, bias, ids = problem()
    wide = (x.double() for x in (logits, hidden, weight, bias))
    outputs, gradients = results(reference, *wide, ids)
    whole, whole_gradients = results(fastrl, logits, hidden, weight, bias, ids)
    for ours, one, truth in zip(first[0], whole, outputs, strict=True):
        torch.testing.assert_close(ours, one, rtol=2e-6, atol=2e-6)
        torch.testing.assert_close(ours.double(), truth, rtol=2e-5, atol=2e-5)
    sharded = [
        torch.cat([first[1][0], second[1][0]], 1),
        first[1][1],
        torch.cat([first[1][2], second[1][2]]),
        torch.cat([first[1][3], second[1][3]]),
    ]
    assert torch.equal(first[1][1], second[1][1])  # hidden: whole on every rank
    for ours, one, truth in zip(sharded, whole_gradients, gradients, strict=True):
        torch.testing.assert_close(ours, one, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(ours.double(), truth, rtol=1e-4, atol=1e-4)


def test_a_rank_without_a_slice(ranks):
    whole, gradients = results(fastrl, *problem())
    for outputs, _ in (rank[4:6] for rank in ranks):
        for ours, one in zip(outputs, whole, strict=True):
            torch.testing.assert_close(ours, one, rtol=2e-6, atol=2e-6)
    of_nothing, of_all = (rank[5] for rank in ranks)
    assert [x.shape for x in of_nothing] == [(9, 0), (9, 16), (0, 16), (0,)]
    assert torch.equal(of_nothing[1], of_all[1])  # hidden: whole on every rank
    for ours, one in zip(of_all, gradients, strict=True):
        torch.testing.assert_close(ours, one, rtol=1e-4, atol=1e-5)


def test_kept_ids_are_those_of_the_whole_vocabulary(ranks):
    logits, *_, ids = problem()
    expected = fastrl.token_logprobs(logits, ids, kept=kept_sets())
    for *_, kept, _ in ranks:
        torch.testing.assert_close(kept, expected)


def test_a_distributed_tensor_is_no_slice(ranks):
    whole = "Use {}.full_tensor()"
    of_fsdp = "Under FSDP call it in the forward of .* or use {}.full_tensor\\(grad_placements="
    expected = (
        ("linear_token_logprobs", "hidden", whole),
        ("linear_token_logprobs", "bias", of_fsdp),
        ("linear_token_logprobs", "weight", of_fsdp),
        ("linear_token_loss", "weight", of_fsdp),
        ("token_logprobs", "logits", whole),
    )
    for message, (op, name, remedy) in zip(ranks[0][-1], expected, strict=True):
        start = f"{op}: expected {name} as a plain tensor, got DTensor. {remedy.format(name)}"
        assert re.match(start, message), message


@pytest.fixture
def group():
    """Of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.mark.parametrize("vocab_start", [0, None])
def test_graphs_break_at_a_group(group, vocab_start):
    """Dynamo, which would otherwise look for hours into the functions of torch.distributed."""
    torch._dynamo.reset()
    logits, hidden, weight, _, ids = problem()
    parallel = {"group": group, "vocab_start": vocab_start}

    def losses(hidden, weight, logits):
        of_head = fastrl.linear_token_logprobs(hidden * 2, weight, ids, **parallel)
        return (of_head * 3).sum() + fastrl.token_logprobs(logits * 2, ids, **parallel).sum()

    leaves = [x.requires_grad_() for x in (hidden, weight, logits)]
    expected = torch.autograd.grad(losses(*leaves), leaves)
    found = torch.autograd.grad(torch.compile(losses, backend="aot_eager")(*leaves), leaves)
    for actual, exact in zip(found, expected, strict=True):
        torch.testing.assert_close(actual, exact)
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="group= .* break the graph here"):
        torch.compile(losses, backend="aot_eager", fullgraph=True)(*leaves)
