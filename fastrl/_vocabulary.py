"""The softmax of a row from the slices of its vocabulary.

A state is [..., 6] float64 and describes one slice of a row's logits x_j:

    max        m, of the slice
    rest       sum of exp((x_j - m) / T) over x_j < m: the maximum stays out, so p -> 1 keeps digits
    count      entries equal to m
    weighted   sum of exp((x_j - m) / T) (m - x_j)
    target     the token's logit, where the slice has it, else 0
    found      1 where the slice has it, else 0
"""

import torch
from torch import Tensor

SIZE = 6


def empty_state(token_ids: Tensor) -> Tensor:
    """[N, 6] of a slice without an entry, which adds nothing to the others."""
    state = token_ids.new_zeros((token_ids.numel(), SIZE), dtype=torch.float64)
    state[:, 0] = -torch.inf
    return state


def merge_states(states: Tensor, temperature: float) -> Tensor:
    """[N, 6] from [K, N, 6]: the state of K slices together, in the order given."""
    if len(states) == 1:  # on a GPU two dozen launches
        return states[0]
    m, rest, count, weighted, target, found = states.unbind(-1)  # [K, N] each
    top = m.amax(0)
    # A slice with nothing finite (count 0) adds nothing, but a NaN in its rest must not vanish.
    stays = (m == top) | (count == 0)
    gap = torch.where(stays, 0.0, top - m)
    shrink = torch.exp(-gap / temperature)
    total = rest + count
    parts = (
        torch.where(stays, rest, shrink * total),
        torch.where(stays, count, 0.0),
        torch.where(stays, weighted, shrink * (weighted + gap * total)),
        target,
        found,
    )
    return torch.stack([top, *(part.sum(0) for part in parts)], dim=-1)


def target_and_total(state: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """The target's log-prob and the log total, [N] float64, from the state [N, 6] of the whole
    vocabulary; NaN for an id that no slice has."""
    m, rest, count, _, target, found = state.unbind(-1)
    log_total = torch.log1p(rest + (count - 1.0))
    logit = torch.where(found == 1, target, torch.nan)
    return (logit - m) / temperature - log_total, log_total


def finish(
    state: Tensor, token_ids: Tensor, temperature: float, ignore_index: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """logprobs, entropy, row max and log total, float32 [N] each, from the state [N, 6] of the
    whole vocabulary; 0 in ignored rows, NaN for an id that no slice has."""
    m, rest, count, weighted, *_ = state.unbind(-1)
    logprobs, log_total = target_and_total(state, temperature)
    entropy = log_total + weighted / (rest + count) / temperature
    ignored = token_ids == ignore_index
    outputs = (logprobs, entropy, m, log_total)
    return tuple(x.float().masked_fill(ignored, 0.0) for x in outputs)  # type: ignore[return-value]


def partial_states(partials: Tensor, target: Tensor, found: Tensor, counted: Tensor) -> Tensor:
    """[K, N, 6] from [N, K, 4] and what is known of a row's target; zeros in rows that do not
    count, where partials hold anything."""
    states = partials.new_zeros((*partials.shape[:2], SIZE), dtype=torch.float64)
    states[..., :4] = partials
    states[:, 0, 4] = torch.where(found, target.double(), 0.0)
    states[:, 0, 5] = found.double()
    return torch.where(counted[:, None, None], states, 0.0).transpose(0, 1)
