"""Rewards made of rewards: sums, minimum, product, clipping, normalisation, changing weights.

Each is a reward function itself, so they nest; `_composition.Composition` says what they share.
"""

from fastrl.rewards.composition.minimum import Minimum
from fastrl.rewards.composition.product import Product
from fastrl.rewards.composition.schedules import SaturationSchedule, StepSchedule
from fastrl.rewards.composition.single import Clipped, RunningNormalized, Scaled
from fastrl.rewards.composition.sums import NormalizedSum, WeightedSum

__all__ = [
    "Clipped",
    "Minimum",
    "NormalizedSum",
    "Product",
    "RunningNormalized",
    "SaturationSchedule",
    "Scaled",
    "StepSchedule",
    "WeightedSum",
]
