"""Mean and deviation: of a batch, or running over many."""

import math
from collections.abc import Sequence

# Deviations below this share of what was added up are rounding: 10^3 additions in float64.
_ROUNDING = 2.0**-40


class Moments:
    """Count, mean and sum of squared deviations, merged batch by batch.

        n <- d n,  m2 <- d m2                                   (d = 1: nothing is forgotten)
        δ = mean_b - mean,  N = n + n_b
        mean <- mean + δ n_b / N,  m2 <- m2 + m2_b + δ² n n_b / N,  n <- N

    With d = 1 it is that of all numbers together, however they came in batches; with d < 1 each
    number weighs d^k, k batches later. Reference: Chan et al. 1983, The American Statistician
    37(3), on updating formulas.
    """

    def __init__(self) -> None:
        self.count = self.mean = self.m2 = 0.0
        self.largest = 0.0  # magnitude of what went in, forgotten like the rest

    def merge(
        self, numbers: Sequence[float], magnitudes: Sequence[float], decay: float = 1.0
    ) -> None:
        """Take in a batch of finite numbers; one of none changes nothing.

        Args:
            numbers: of the batch.
            magnitudes: what each number was added up from, to know rounding by.
            decay: d above.
        """
        if not numbers:
            return
        size = len(numbers)
        mean = math.fsum(numbers) / size
        m2 = math.fsum((x - mean) ** 2 for x in numbers)
        count, self.m2 = decay * self.count, decay * self.m2
        self.count = count + size
        difference = mean - self.mean if count > 0 else 0.0
        self.mean = self.mean + difference * (size / self.count) if count > 0 else mean
        self.m2 += m2 + difference**2 * (count * size / self.count)
        self.largest = max(decay * self.largest, *magnitudes)

    def deviation(self, *, sample: bool) -> float:
        """sqrt(m2 / (n - 1)) of a sample, else sqrt(m2 / n); 0 where all are equal but rounding."""
        freedom = self.count - 1 if sample else self.count
        deviation = math.sqrt(self.m2 / freedom) if freedom > 0 else 0.0
        return deviation if deviation > _ROUNDING * self.largest else 0.0

    def state_dict(self) -> dict[str, float]:
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, float]) -> None:
        for name in vars(self):
            setattr(self, name, float(state[name]))


def divided(number: float, deviation: float) -> float:
    """number / deviation; where that is 0, so is a finite number, and another becomes NaN."""
    return number / deviation if deviation > 0 else number * 0.0 + 0.0
