"""How well scores foretell judgements: accuracy with its interval, and calibration."""

import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastrl.ops._checks import fail
from fastrl.rewards.preference.pairs import checked_pairs

_Z95 = 1.959963984540054  # 97.5 % quantile of the normal distribution


def evaluate_preferences(model: Any, pairs: Iterable[Any], *, bins: int = 10) -> dict[str, Any]:
    """Compare a model's scores with judgements.

    The model says that the chosen completion is better with probability p = sigmoid(d), d its
    score less the rejected one's.

    Args:
        model: a PreferenceModel or a PreferenceEnsemble.
        pairs: dicts with "prompt", "chosen", "rejected", and perhaps "tie".
        bins: of the reliability table, of equal width over confidences from 1/2 to 1.
    Returns:
        pairs, ties: how many.
        accuracy: share with d > 0; d = 0 counts half; ties are left out. NaN of none.
        accuracy_low, accuracy_high: Wilson's 95 % interval, as if pairs were independent.
        log_loss: mean -y log p - (1 - y) log(1 - p), nats, y = 1, and 1/2 for a tie.
        brier: mean (p - y)^2.
        ece: mean distance of confidence max(p, 1 - p) and accuracy over the bins, weighted with
            their pairs; ties are left out.
        reliability: its table, of the bins with pairs: low, high, count, confidence, accuracy.
        margin: mean d without ties.
    Raises:
        ValueError: no pairs, or a missing column.
    Reference: Wilson 1927; Guo et al. 2017, arXiv:1706.04599 (ece).
    """
    listed = checked_pairs("evaluate_preferences", pairs)
    return summary(preference_margins(model, listed), ties_of(listed), bins)


def preference_margins(model: Any, pairs: list[Any]) -> Tensor:
    """[n] float64: the score of each pair's chosen completion less that of the rejected one."""
    prompts = [pair["prompt"] for pair in pairs]
    completions = [pair[name] for name in ("chosen", "rejected") for pair in pairs]
    chosen, rejected = model.score(prompts * 2, completions).chunk(2)
    return chosen - rejected


def ties_of(pairs: list[Any]) -> Tensor:
    """[n] bool."""
    return torch.tensor([bool(pair.get("tie")) for pair in pairs])


def summary(margins: Tensor, is_tie: Tensor, bins: int = 10) -> dict[str, Any]:
    """What `evaluate_preferences` returns, from margins [n] float64 and ties [n] bool."""
    if bins < 1:
        raise fail("evaluate_preferences", "bins >= 1", bins, "Leave it out for 10.")
    targets = torch.where(is_tie, 0.5, 1.0).double()
    loss = -targets * F.logsigmoid(margins) - (1 - targets) * F.logsigmoid(-margins)
    judged = margins[~is_tie]
    hits = 0.5 * (1 + judged.sign())
    low, high = wilson_interval(float(hits.sum()), len(judged))
    table = _reliability(judged, hits, bins)
    gaps = [row["count"] * abs(row["confidence"] - row["accuracy"]) for row in table]
    return {
        "pairs": len(margins),
        "ties": int(is_tie.sum()),
        "accuracy": float(hits.mean()),
        "accuracy_low": low,
        "accuracy_high": high,
        "log_loss": float(loss.mean()),
        "brier": float((torch.sigmoid(margins) - targets).square().mean()),
        "ece": math.fsum(gaps) / len(judged) if len(judged) else math.nan,
        "reliability": table,
        "margin": float(judged.mean()),
    }


def wilson_interval(hits: float, count: int) -> tuple[float, float]:
    """95 % bounds of a share of `hits` in `count`; (0, 1) of none."""
    if count == 0:
        return 0.0, 1.0
    share, z = hits / count, _Z95
    middle = share + z * z / (2 * count)
    spread = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    scale = 1 + z * z / count
    return max(0.0, (middle - spread) / scale), min(1.0, (middle + spread) / scale)


def _reliability(margins: Tensor, hits: Tensor, bins: int) -> list[dict[str, Any]]:
    confidence = torch.sigmoid(margins.abs())
    place = ((confidence - 0.5) * 2 * bins).long().clamp(max=bins - 1)
    return [
        {
            "low": 0.5 + k / (2 * bins),
            "high": 0.5 + (k + 1) / (2 * bins),
            "count": int((place == k).sum()),
            "confidence": float(confidence[place == k].mean()),
            "accuracy": float(hits[place == k].mean()),
        }
        for k in sorted(set(place.tolist()))
    ]
