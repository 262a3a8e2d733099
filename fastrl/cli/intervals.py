"""How sure a mean over prompts is, and a gain."""

import math
from collections.abc import Sequence

INTERVAL_NOTE = (
    "± is a 95 % interval over prompts: 1.96 standard errors; of the gain, of the paired "
    "differences. It covers the prompts, not other seeds of training."
)


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and half the width of its 95 % interval: 1.96 standard errors over the prompts.

    Prompts are taken as independent; NaN (no usable completion) is left out. One prompt says
    nothing of the width, and none nothing at all: NaN.
    """
    finite = [value for value in values if value is not None and math.isfinite(value)]
    if not finite:
        return math.nan, math.nan
    mean = math.fsum(finite) / len(finite)
    if len(finite) == 1:
        return mean, math.nan
    variance = math.fsum((value - mean) ** 2 for value in finite) / (len(finite) - 1)
    return mean, 1.96 * math.sqrt(variance / len(finite))


def gain_interval(before: Sequence[float], after: Sequence[float]) -> tuple[float, float]:
    """`mean_interval` of the paired differences, prompt by prompt."""
    pairs = zip(before, after, strict=True)
    return mean_interval([b - a for a, b in pairs if a is not None and b is not None])
