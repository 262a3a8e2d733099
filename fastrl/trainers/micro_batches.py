"""A batch in parts of a bounded number of tokens, whose gradients add up to the whole's."""

import torch
from torch import Tensor

from fastrl.layout import PackedBatch

Part = tuple[PackedBatch, Tensor]  # and which of the whole batch's targets it holds, [n]


def micro_batches(batch: PackedBatch, max_tokens: int | None) -> list[Part]:
    """Parts of at most max_tokens tokens, prompts included; each target is in one of them.

    A prompt stays with all its completions where they fit together. Where they do not, it is read
    once for each part; and one completion with its prompt may be longer than max_tokens.

    Args:
        max_tokens: >= 1; None: the whole batch is the one part.
    Raises:
        ValueError: a tree of several turns has more tokens than that.
    """
    if max_tokens is None or batch.layout.num_tokens <= max_tokens:
        return [(batch, torch.arange(len(batch.target_ids), device=batch.token_ids.device))]
    of_tree, sizes = trees_of_completions(batch), tree_sizes(batch)
    is_large = sizes > max_tokens
    if not bool(is_large.any()) or not is_flat(batch):
        return [(micro, micro.source_targets) for micro in batch.split_by_tokens(max_tokens)]
    parts: list[Part] = []
    if bool((~is_large[of_tree]).any()):
        rest = batch.take(~is_large[of_tree])
        parts += [
            (micro, rest.source_targets[micro.source_targets])
            for micro in rest.split_by_tokens(max_tokens)
        ]
    for tree in is_large.nonzero().squeeze(1).tolist():
        for completions in _runs(batch, (of_tree == tree).nonzero().squeeze(1), max_tokens):
            part = batch.take(completions)
            parts.append((part, part.source_targets))
    return parts


def tree_sizes(batch: PackedBatch) -> Tensor:
    """[trees] int64 on the host: tokens of each tree."""
    bounds, is_root = batch.layout._host_bounds, batch.layout._host_prefix < 0
    return torch.cat([bounds[:-1][is_root], bounds[-1:]]).diff()


def trees_of_completions(batch: PackedBatch) -> Tensor:
    """[C] int64 on the host: the tree of each completion."""
    of_segment = (batch.layout._host_prefix < 0).cumsum(0) - 1
    return of_segment[batch._host_completion_segments]


def is_flat(batch: PackedBatch) -> bool:
    """Whether each completion continues a prompt, and nothing continues a completion."""
    parents = batch.layout._host_prefix
    parents_of = parents[batch._host_completion_segments]
    return bool((parents_of >= 0).all() and (parents[parents_of] < 0).all())


def _runs(batch: PackedBatch, completions: Tensor, max_tokens: int) -> list[Tensor]:
    """[C] bool each: a prompt's completions, as many at a time as fit with it."""
    lengths = batch.layout._host_bounds.diff()
    segments = batch._host_completion_segments[completions]
    prompt = int(lengths[batch.layout._host_prefix[segments[0]]])
    runs: list[list[int]] = [[]]
    size = prompt
    for completion, length in zip(completions.tolist(), lengths[segments].tolist(), strict=True):
        if runs[-1] and size + length > max_tokens:
            runs.append([])
            size = prompt
        runs[-1].append(completion)
        size += length
    masks = torch.zeros(len(runs), len(batch._host_completion_segments), dtype=torch.bool)
    for mask, run in zip(masks, runs, strict=True):
        mask[run] = True
    return list(masks)
