"""Scores whose differences are log-odds: one temperature, fitted to held-out judgements."""

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from fastrl.ops._checks import fail
from fastrl.rewards.preference.evaluation import ties_of
from fastrl.rewards.preference.pairs import checked_pairs

_OP = "calibrate"


@dataclass(frozen=True)
class Calibration:
    """What a preference model's scores are divided by, and how they lie then.

    Attributes:
        temperature: of the raw scores, above 0.
        offset, scale: mean and standard deviation of the divided scores of the completions that it
            was fitted to; what `PreferenceReward(normalize=True)` brings to 0 and 1.
        pairs: how many pairs it was fitted to; 0: none, and the rest are the neutral values.
    """

    temperature: float = 1.0
    offset: float = 0.0
    scale: float = 1.0
    pairs: int = 0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def calibrate(model: Any, pairs: Iterable[Any]) -> Calibration:
    """Fit the temperature T of a preference model to pairs that it was not trained on.

        min over T > 0 of  -mean( y log sigmoid(d / T) + (1 - y) log sigmoid(-d / T) ),

    d the chosen completion's score less the rejected one's, y = 1/2 for a tie and else
    (n + 1) / (n + 2) of n pairs, which keeps T above 0 where every pair is right. Newton's method
    in 1/T, in which the loss is convex, with bisection where a step leaves the bracket. The order
    of scores stays, and so does the accuracy. Mean and deviation of the scores are taken along.

    Args:
        model: a PreferenceModel, whose `calibration` is set.
        pairs: as `train_preference_model` takes them.
    Returns:
        The calibration, which replaces an earlier one.
    Raises:
        ValueError: no pairs; or the scores lead the wrong way on the whole, and no T is best.
    Reference: Guo et al. 2017, arXiv:1706.04599; Platt 1999 (the targets).
    """
    listed = checked_pairs(_OP, pairs)
    prompts = [pair["prompt"] for pair in listed]
    completions = [pair[name] for name in ("chosen", "rejected") for pair in listed]
    scores = model.score(prompts * 2, completions)
    chosen, rejected = scores.chunk(2)
    factor = best_factor(chosen - rejected, ties_of(listed))
    model.calibration = Calibration(
        temperature=model.calibration.temperature / factor,
        offset=float(scores.mean()) * factor,
        scale=float(scores.std()) * factor,
        pairs=len(listed),
    )
    return model.calibration


def best_factor(margins: Tensor, is_tie: Tensor) -> float:
    """1/T: what margins [n] float64 are best multiplied with; is_tie [n] bool."""
    judged = int((~is_tie).sum())
    right = torch.tensor((judged + 1) / (judged + 2), dtype=torch.float64)
    targets = torch.where(is_tie, 0.5, right)

    def slopes(factor: float) -> tuple[float, float]:
        """First and second derivative of the mean loss."""
        p = torch.sigmoid(factor * margins)
        first, second = (p - targets) * margins, p * (1 - p) * margins.square()
        return float(first.mean()), float(second.mean())

    if not slopes(0.0)[0] < 0:
        got = f"a mean margin of {float(margins[~is_tie].mean()) if judged else 0.0:g}"
        raise fail(_OP, "margins above 0 on the whole", got, "Train the model better first.")
    low, high = 0.0, 1.0 / float(margins.abs().max())
    while slopes(high)[0] < 0:
        low, high = high, 2 * high
    factor = high
    while high - low > 1e-12 * high:
        first, second = slopes(factor)
        low, high = (factor, high) if first < 0 else (low, factor)
        step = factor - first / second if second > 0 else math.inf
        if not low < step < high:
            step = (low + high) / 2
        if abs(step - factor) <= 1e-12 * factor:
            return step
        factor = step
    return factor
