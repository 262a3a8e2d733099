"""A head that FSDP holds in slices, and rows of their own on each of two processes."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

import fastrl


class Scorer(nn.Module):
    """A head with its body; whole says how the head's weight becomes whole."""

    def __init__(self, whole=lambda weight: weight):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Linear(4, 4), nn.Linear(4, 7, bias=False)
        self.whole = whole

    def forward(self, x, ids):
        return fastrl.linear_token_logprobs(self.body(x), self.whole(self.head.weight), ids)


def rows():
    torch.manual_seed(1)
    return list(zip(torch.randn(2, 3, 4), torch.randint(0, 7, (2, 3)), strict=True))


def worker(rank, folder):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Partial

    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/init", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    within = Scorer()  # its forward has gathered all of it
    alone = Scorer(lambda weight: weight.full_tensor(grad_placements=[Partial("avg")]))
    fully_shard(alone.head, mesh=mesh)  # gathered in the head's own forward, which nobody calls
    found = []
    for scorer in (within, alone):
        fully_shard(scorer, mesh=mesh)
        scorer(*rows()[rank]).sum().backward()
        found.append([p.grad.full_tensor() for p in scorer.parameters()])
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("way", ["in the forward", "as the error says"])
def test_gradients_are_those_of_all_rows(ranks, way):
    scorer = Scorer()
    (sum(scorer(*part).sum() for part in rows()) / 2).backward()
    for rank in ranks:
        for found, p in zip(rank[way != "in the forward"], scorer.parameters(), strict=True):
            torch.testing.assert_close(found, p.grad)


@pytest.fixture(scope="module")
def ranks(two_ranks, tmp_path_factory):
    return two_ranks.run(__file__, tmp_path_factory.mktemp("ranks"))
