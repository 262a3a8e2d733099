"""Which process computes which completions: whole prompts, where that is balanced enough."""

import torch
from torch import Tensor

from fastrl.layout import PackedBatch
from fastrl.trainers.micro_batches import is_flat, tree_sizes, trees_of_completions


def shares(batch: PackedBatch, active: Tensor, count: int) -> Tensor:
    """[C] int64 on the host: the process, of `count`, that computes each completion.

    A process has a run of the batch's trees, or where that is less work for the busiest one, of
    its completions: a prompt whose completions are cut apart is then read by both.

    Args:
        active: [C] bool on the host, the completions that are computed at all.
    """
    tree, sizes = trees_of_completions(batch), tree_sizes(batch)
    sizes_of_completions = batch.layout._host_bounds.diff()[batch._host_completion_segments]
    lengths = sizes_of_completions * active
    is_read = torch.zeros_like(sizes).index_add_(0, tree, active.long()) > 0
    if not is_flat(batch):  # turns between root and leaves: a tree stays whole
        return _by_middle(sizes * is_read, count)[tree]
    prompts = sizes.index_add(0, tree, -sizes_of_completions)
    of_trees = (prompts * is_read).index_add(0, tree, lengths)
    by_tree = _by_middle(of_trees, count)[tree]
    is_first = active & (tree != torch.cat([tree.new_tensor([-1]), tree[:-1]]))
    by_completion = _by_middle(lengths + prompts[tree] * is_first, count)

    def largest(owner: Tensor) -> int:
        loads = lengths.new_zeros(count).index_add_(0, owner, lengths)
        read = (owner * len(sizes) + tree)[active].unique()
        return int(loads.index_add_(0, read // len(sizes), prompts[read % len(sizes)]).max())

    return min(by_tree, by_completion, key=largest)


def _by_middle(costs: Tensor, count: int) -> Tensor:
    """The part of `count` equal parts of the whole cost in which each one's middle lies."""
    middles = costs.cumsum(0) - costs / 2
    return (middles * count / costs.sum().clamp(min=1)).long().clamp(max=count - 1)
