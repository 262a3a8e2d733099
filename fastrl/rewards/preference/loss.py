"""The Bradley-Terry loss of pairs, on whole completions or on all their prefixes."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastrl.rewards.preference.config import PreferenceConfig
from fastrl.rewards.preference.model import PreferenceModel
from fastrl.rewards.preference.packing import Item, Pass, passes
from fastrl.rewards.preference.pairs import Pair


def pair_passes(pairs: Sequence[Pair], max_tokens: int | None, device: torch.device) -> list[Pass]:
    """Passes in which both completions of a pair stand together."""
    items = [Item(pair.prompt, (pair.chosen, pair.rejected)) for pair in pairs]
    return passes(items, max_tokens, device)


def pass_loss(
    model: PreferenceModel, part: Pass, pairs: Sequence[Pair], config: PreferenceConfig
) -> tuple[Tensor, Tensor]:
    """The sum of the losses of the n pairs in a pass, and their margins.

        l = -y log sigmoid(d - m) - (1 - y) log sigmoid(m - d) + c (s_chosen + s_rejected)^2,

    d = s_chosen - s_rejected, y = 1 - label_smoothing; of a tie y = 1/2 and m = 0. With
    token_loss "mean" it is the mean of l over the prefixes of t = 1, 2, ... tokens of both, a
    completion that has ended staying whole.

    Args:
        pairs: all of them; the pass knows which ones it holds.
    Returns:
        loss: 0-d, with a graph.
        margins: [n], d of the whole completions, detached.
    """
    held = [pairs[index] for index in part.items]
    values = model.packed_values(part.batch, freeze_trunk=config.freeze_trunk)
    rows = [
        _rows(pair, starts, config.token_loss)
        for pair, starts in zip(held, part.starts, strict=True)
    ]
    lengths = torch.tensor([x.shape[1] for x in rows])
    chosen, rejected = torch.cat(rows, 1).to(values.device)
    begin_chosen, begin_rejected = torch.tensor(part.starts).to(values.device).T
    owner = torch.arange(len(held)).repeat_interleave(lengths).to(values.device)
    chosen_scores = values[chosen] - values[begin_chosen][owner]
    rejected_scores = values[rejected] - values[begin_rejected][owner]

    wanted = [_margin(pair, config) for pair in held]
    targets = [0.5 if pair.is_tie else 1 - config.label_smoothing for pair in held]
    margin = values.new_tensor(wanted)[owner]
    target = values.new_tensor(targets)[owner]
    lead = chosen_scores - rejected_scores - margin
    losses = -target * F.logsigmoid(lead) - (1 - target) * F.logsigmoid(-lead)
    losses = losses + config.centering * (chosen_scores + rejected_scores).square()
    loss = (losses / lengths.to(losses)[owner]).sum()
    # The last prefix of each pair is the whole of both.
    last = (lengths.cumsum(0) - 1).to(values.device)
    margins = (chosen_scores - rejected_scores).detach()[last]
    return loss, margins


def _margin(pair: Pair, config: PreferenceConfig) -> float:
    if pair.is_tie:
        return 0.0
    return pair.margin if config.margin is None else config.margin


def _rows(pair: Pair, starts: tuple[int, ...], token_loss: str) -> Tensor:
    """[2, prefixes] int64: the rows of the values of both, one prefix a column."""
    ends = torch.tensor([[len(pair.chosen)], [len(pair.rejected)]])
    longest = int(ends.max())
    begin = 1 if token_loss == "mean" and longest else longest
    read = torch.arange(begin, longest + 1).expand(2, -1).minimum(ends)
    return torch.tensor(starts)[:, None] + read
