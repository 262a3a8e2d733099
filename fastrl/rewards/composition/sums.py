"""Sums of rewards: as they are, or each normalised first."""

from collections.abc import Mapping, Sequence

from fastrl.rewards.composition._composition import Batch, Composition, Parts, mean_of
from fastrl.rewards.composition._entries import Entry, weighted_sum
from fastrl.rewards.composition._normalizer import Normalizer
from fastrl.rewards.composition._weights import Weight, Weights


class WeightedSum(Composition):
    """reward = Σ_k w_k s_k over the parts k that have an opinion.

    The weights of the others stay as they are: they do not make up for a missing part. A weight
    of 0 does not hide NaN or infinity. Each weight is logged as "rewards/<name>/<part>/weight".
    What else holds is in `Composition`.

    Args:
        parts: reward functions, in a list or by name.
        weights: of each part, in the same order or by name: a number, StepSchedule,
            SaturationSchedule, or anything else that gives a weight for trainer_state.global_step;
            None: 1 each.
        name: what metrics call it.
    Raises:
        ValueError, TypeError: parts or weights do not fit.
    """

    def __init__(
        self,
        parts: Parts,
        weights: Mapping[str, Weight] | Sequence[Weight] | None = None,
        *,
        name: str = "weighted_sum",
    ) -> None:
        super().__init__(parts, name)
        self._weights = self._remembered["weights"] = Weights(self._op, list(self.parts), weights)

    def _combined(self, given: dict[str, list[Entry]], batch: Batch) -> list[Entry]:
        weights = self._weights(batch.step)
        for part, weight in weights.items():
            batch.log(part, "weight", weight)
            self._weights.observe(part, mean_of(given[part]))
        terms = [self._term(part, entries, batch) for part, entries in given.items()]
        factors = [weights[part] for part in given]
        rows = zip(zip(*terms, strict=True), batch.lasts, strict=True)
        return [weighted_sum(entries, factors, last) for entries, last in rows]

    def _term(self, part: str, entries: list[Entry], batch: Batch) -> list[Entry]:
        return entries


class NormalizedSum(WeightedSum):
    """reward = Σ_k w_k (s_k - mean_k) / deviation_k over the parts k that have an opinion.

    s_k is a completion's total of part k. Mean and deviation are of the totals of that part that
    are given and finite, over one of:

    - "batch": all of this call, n - 1 in the deviation's denominator;
    - "group": those of this call with an equal prompt, n - 1 as well;
    - "running": all of all calls so far, n in the denominator. This call's are taken in first.
      With a decay, those of k calls ago weigh decay^k.

    Where all totals are equal, or there is but one, the part adds 0: there is no epsilon in the
    denominator, and what differs by no more than rounding counts as equal. A part that gives
    r_t for each id adds r_t / deviation for each and, at the first id that the policy wrote,
    -mean / deviation: a constant there moves no policy gradient, whatever gamma. In "running", a
    call without a finite total of a part leaves its statistics as they are.

    Weights then say what a part matters in deviations, whatever its scale. "group" is what TRL
    calls "normalize_then_sum", without its 1e-4. What else holds is in WeightedSum.

    Args:
        parts, weights, name: as for WeightedSum.
        over: "batch", "group" or "running".
        decay: in (0, 1), or None to forget nothing; for "running" alone.
    Raises:
        ValueError, TypeError: an argument does not fit.
    Reference: Liu et al. 2026, GDPO, arXiv:2601.05242.
    """

    def __init__(
        self,
        parts: Parts,
        weights: Mapping[str, Weight] | Sequence[Weight] | None = None,
        *,
        over: str = "batch",
        decay: float | None = None,
        name: str = "normalized_sum",
    ) -> None:
        super().__init__(parts, weights, name=name)
        self._normalizer = Normalizer(self._op, list(self.parts), over, decay)
        self._remembered["statistics"] = self._normalizer

    def _term(self, part: str, entries: list[Entry], batch: Batch) -> list[Entry]:
        return self._normalizer(part, entries, batch)
