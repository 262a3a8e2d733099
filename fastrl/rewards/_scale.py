"""Ratings on a scale of whole numbers, as rewards in [−1, 1]."""

import math
from collections.abc import Sequence


def checked_scale(scale: Sequence[int], op: str) -> tuple[int, int]:
    """The lowest and the highest rating.

    Raises:
        ValueError: these are no two whole numbers that rise.
    """
    ends = list(scale)
    if len(ends) != 2 or not all(type(end) is int for end in ends) or ends[0] >= ends[1]:
        raise ValueError(
            f"{op}: expected scale two whole numbers that rise, got {scale!r}. "
            "Pass the lowest and the highest rating, as in (1, 5)."
        )
    return ends[0], ends[1]


def scaled(ratings: Sequence[float], scale: tuple[int, int], op: str, where: str) -> float | None:
    """The mean of ratings, mapped linearly to [−1, 1]; None without any.

    Raises:
        ValueError: one is not on the scale.
    """
    low, high = scale
    for rating in ratings:
        if not low <= rating <= high:
            raise ValueError(
                f"{op}: expected ratings from {low} to {high}, got {rating} for {where}. "
                "Correct it, or pass another scale."
            )
    if not ratings:
        return None
    return 2 * (math.fsum(ratings) / len(ratings) - low) / (high - low) - 1
