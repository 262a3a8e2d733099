"""Two processes hold the parts of one problem; each calls worker."""

import torch
import torch.distributed as dist

from fastrl import reference

WIDTHS = (3, 4)  # of the ranks' slices of the vocabulary: unequal


def problem():
    torch.manual_seed(0)
    logits, weight = torch.randn(5, 7, dtype=torch.float64), torch.randn(7, 2, dtype=torch.float64)
    hidden = torch.randn(5, 2, dtype=torch.float64)
    ids = torch.tensor([0, 6, -100, 3, 2])
    kept = torch.tensor([0, 6, 6, 1, 2, 3, 2]), torch.tensor([0, 2, 3, 4, 6, 7])
    x = torch.tensor([1.0, 5.0, float("nan"), -2.0, 7.0], dtype=torch.float64)
    return logits, hidden, weight, ids, kept, x


def results(logits, hidden, weight, ids, kept, **parallel):
    """Outputs, and the gradients in the given logits, hidden states and weight."""
    leaves = [x.clone().requires_grad_() for x in (logits, hidden, weight)]
    logits, hidden, weight = leaves
    options = {"temperature": 0.7, "return_entropy": True, **parallel}
    outputs = (
        *reference.token_logprobs(logits, ids, **options),
        *reference.token_logprobs(logits, ids, kept=kept, **options),
        *reference.linear_token_logprobs(hidden, weight, ids, softcap=2.0, **options),
    )
    gradients = torch.autograd.grad(sum(output.sin().sum() for output in outputs), leaves)
    return [output.detach() for output in outputs], gradients


def worker(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/init", rank=rank, world_size=2)
    logits, hidden, weight, ids, kept, x = problem()
    start = sum(WIDTHS[:rank])
    own = slice(start, start + WIDTHS[rank])
    group = dist.group.WORLD
    outputs, gradients = results(
        logits[:, own], hidden, weight[own], ids, kept, group=group, vocab_start=start
    )
    part = x[:4] if rank == 0 else x[4:]
    whitened = reference.whiten(part, ~part.isnan(), group=group)
    torch.save((outputs, gradients, whitened), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_parts_give_the_result_of_the_whole(two_ranks, tmp_path):
    first, second = two_ranks.run(__file__, tmp_path)

    logits, hidden, weight, ids, kept, x = problem()
    outputs, gradients = results(logits, hidden, weight, ids, kept)
    torch.testing.assert_close(first[0], outputs)
    torch.testing.assert_close(second[0], first[0], rtol=0, atol=0)
    torch.testing.assert_close(torch.cat([first[1][0], second[1][0]], 1), gradients[0])
    torch.testing.assert_close(first[1][1], gradients[1])  # hidden: whole on every rank
    torch.testing.assert_close(second[1][1], gradients[1])
    torch.testing.assert_close(torch.cat([first[1][2], second[1][2]]), gradients[2])
    valid = ~x.isnan()
    expected = (x - x[valid].mean()) / (x[valid].var() + 1e-8).sqrt()
    whitened = torch.cat([first[2], second[2]])
    torch.testing.assert_close(whitened, expected.masked_fill(~valid, 0))
