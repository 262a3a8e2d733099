"""Two processes hold unequal slices of one vocabulary; each calls worker."""

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


def second_derivatives_refused(logits, hidden, weight, bias, ids, **parallel):
    """The messages of both ops."""
    logits, hidden = (x.clone().requires_grad_() for x in (logits, hidden))
    messages = []
    for logprobs, leaf in (
        (fastrl.token_logprobs(logits, ids, **parallel), logits),
        (fastrl.linear_token_logprobs(hidden, weight, ids, **parallel), hidden),
    ):
        try:
            torch.autograd.grad(logprobs.square().sum(), leaf, create_graph=True)
        except NotImplementedError as error:
            messages.append(str(error))
    return messages


def worker(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/init", rank=rank, world_size=2)
    logits, hidden, weight, bias, ids = problem()
    start = sum(WIDTHS[:rank])
    own = slice(start, start + WIDTHS[rank])
    parts = (logits[:, own], hidden, weight[own], bias[own], ids)
    found = results(fastrl, *parts, group=dist.group.WORLD, vocab_start=start)
    again = results(fastrl, *parts, group=dist.group.WORLD)  # where it starts is found out
    refused = second_derivatives_refused(*parts, group=dist.group.WORLD, vocab_start=start)
    torch.save((*found, *again, refused), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_slices_give_the_result_of_the_whole(two_ranks, tmp_path):
    first, second = two_ranks.run(__file__, tmp_path)
    for rank in (first, second):
        assert [message[:44] for message in rank[4]] == [
            "token_logprobs: expected to be differentiate",
            "linear_token_logprobs: expected to be differ",
        ]
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
