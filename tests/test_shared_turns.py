"""A model on a packed tree gets the gradients of unshared copies, one path at a time."""

import random

import pytest
import torch
from forests import ancestry
from torch import nn

from fastrl import reference
from fastrl.layout import PackedBatch, pack_groups

VOCABULARY, WIDTH, HEADS = 11, 8, 2


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.norms = nn.ModuleList([nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)])

    def forward(self, x, layout):
        heads = self.qkv(self.norms[0](x)).view(1, len(x), 3, HEADS, -1)
        query, key, value = heads.transpose(1, 3).unbind(2)  # [1, H, N, D] each
        mixed = reference.attention(query, key, value, layout=layout)
        x = x + self.out(mixed[0].transpose(0, 1).flatten(1))
        return x + self.down(nn.functional.gelu(self.up(self.norms[1](x))))


class TinyTransformer(nn.Module):
    """Two layers, learned positions: where a token stands must be right too."""

    def __init__(self):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(64, WIDTH)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, token_ids, layout):
        """[N, V] logits; layout None: one causal sequence."""
        positions = torch.arange(len(token_ids)) if layout is None else layout.position_ids
        x = self.tokens(token_ids) + self.positions(positions)
        for block in self.blocks:
            x = block(x, layout)
        return self.head(x)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return TinyTransformer().double()


def gradients(model, loss):
    return torch.autograd.grad(loss, list(model.parameters()))


def random_tree(seed):
    """Segments, prefix and masks of some trees of up to five levels, with empty segments."""
    rng = random.Random(seed)
    prefix, path = [], []
    for s in range(rng.randint(2, 14)):
        del path[max(rng.randint(0, len(path)), len(path) - 3) :]
        del path[4:]
        prefix.append(path[-1] if path else -1)
        path.append(s)
    segments, masks = [], []
    for s in range(len(prefix)):
        length = rng.choice([0, 1, 2, 4])
        segments.append(torch.tensor([rng.randrange(VOCABULARY) for _ in range(length)]).long())
        mask = torch.tensor([rng.random() < 0.8 for _ in range(length)]).bool()
        if not any(len(segments[a]) for a in ancestry(prefix, s)[:-1]):
            mask[:1] = False  # no token before it
        masks.append(mask)
    return segments, prefix, masks


def loss_of_copies(model, segments, prefix, masks, leaves, weights):
    """Each path from a root to a leaf as a sequence of its own."""
    total = torch.zeros((), dtype=torch.float64)
    for leaf, weight in zip(leaves, weights, strict=True):
        path = ancestry(prefix, leaf)
        token_ids = torch.cat([segments[s] for s in path])
        is_target = torch.cat([masks[s] for s in path])
        if len(token_ids) < 2:
            continue
        logprobs = model(token_ids, None)[:-1].log_softmax(-1)
        picked = logprobs.gather(1, token_ids[1:, None]).squeeze(1)
        total = total - weight * picked[is_target[1:]].sum()
    return total


@pytest.mark.parametrize("seed", range(25))
def test_trees(model, seed):
    segments, prefix, masks = random_tree(seed)
    batch = PackedBatch.from_segments(segments, prefix, masks)
    leaves = [s for s in range(len(prefix)) if s not in prefix]
    order = batch.segment_order.tolist()
    assert [order[leaf] for leaf in batch.paths().leaves] == leaves
    weights = torch.randn(len(leaves), dtype=torch.float64)

    logprobs = reference.token_logprobs(
        model(batch.token_ids, batch.layout)[batch.predict_index], batch.target_ids
    )
    packed = -(batch.sum_over_leaves(weights) * logprobs).sum()
    copies = loss_of_copies(model, segments, prefix, masks, leaves, weights)
    torch.testing.assert_close(packed, copies, rtol=1e-12, atol=1e-12)
    if not len(batch.target_ids):
        return
    got, expected = gradients(model, packed), gradients(model, copies)
    for (name, _), ours, theirs in zip(model.named_parameters(), got, expected, strict=True):
        torch.testing.assert_close(
            ours, theirs, rtol=1e-10, atol=1e-12, msg=lambda m, n=name: n + m
        )


def test_the_trees_are_deep_shared_and_have_empty_segments():
    depths, empty, shared = set(), 0, 0
    for seed in range(25):
        segments, prefix, _ = random_tree(seed)
        depths |= {len(ancestry(prefix, s)) - 1 for s in range(len(prefix))}
        empty += sum(len(x) == 0 for x in segments)
        shared += sum(prefix.count(s) > 1 for s in range(len(prefix)))
    assert depths == {0, 1, 2, 3, 4} and empty > 10 and shared > 10


def test_micro_batches_of_groups(model):
    """Through the model, prompts without completions and empty completions among them."""
    rng = random.Random(5)

    def tokens(length):
        return torch.tensor([rng.randrange(VOCABULARY) for _ in range(length)]).long()

    prompts = [tokens(n) for n in (3, 1, 5, 2, 4)]
    completions = [[tokens(n) for n in group] for group in ([2, 0, 4], [], [1], [6, 6], [3, 0])]
    batch = pack_groups(prompts, completions)
    advantages = torch.randn(len(batch.target_ids), dtype=torch.float64)

    def loss_of(part, at):
        logits = model(part.token_ids, part.layout)[part.predict_index]
        return reference.policy_gradient_loss(
            reference.token_logprobs(logits, part.target_ids), advantages[at],
            normalizer=len(batch.target_ids),
        )  # fmt: skip

    expected = gradients(model, loss_of(batch, slice(None)))
    micro_batches = batch.split_by_tokens(15)
    assert len(micro_batches) == 3
    parts = [gradients(model, loss_of(micro, micro.source_targets)) for micro in micro_batches]
    for ours, theirs in zip(map(sum, zip(*parts, strict=True)), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-13)
