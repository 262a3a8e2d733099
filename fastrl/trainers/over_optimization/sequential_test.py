"""When have two rewards parted? A test that is made again and again, with one false-alarm rate.

At evaluation k = 0, 1, 2, ... each of n held-out prompts i has a gold reward G_ki and a proxy
reward P_ki. The trends over the last m + 1 evaluations are, but for a factor, the least-squares
slopes

    g_i = Σ_{s=0..m} (s − m/2) G_{k−m+s, i},        p_i the same of P

**What is tested.** For a span m, the null hypothesis is that the mean of g over prompts is not
below 0, or that of p not above 0. Its opposite says that gold falls while the proxy rises, and
this is the same as: gold − c · proxy falls for every c >= 0, in whatever units the two are
measured. So no scale has to be guessed, and a run in which both fall, or both rise, is honest
whatever their sizes.

**The p-value of a trend** is that of the one-sided sign-flip test. If the mean trend were 0 and
each prompt's trend x_i as likely to be x_i as −x_i, then with fair coins b_i in {0, 1}

    p = P(Σ_i (1 − 2 b_i) x_i >= Σ_i x_i) = P(Σ_i b_i x_i <= 0)

would be at most u with probability u at most. It is computed by adding up the coins one by one on
a grid on which each x_i is rounded down: no signs are drawn, and p is never below the exact one.
The p-value of a span is the larger one of "gold falls" and "the proxy rises" (an
intersection-union test: the null is that one of the two is not so).

**Which spans.** m = 1, 2, 4, ..., as far as there are evaluations since the last alarm. That of
the evaluation is S times the smallest of its S spans' (Bonferroni). All prompts serve, and nothing
is chosen by looking at them beforehand, neither a peak nor a span, so there is no winner's curse
to correct for.

**How often.** Evaluation k is tested at the level

    α_k = α / (2 K) for 1 <= k <= K,     α K / (2 k (k − 1)) after them,     Σ_k α_k <= α

where K is the number of evaluations that the run is planned to have: half of α is spent evenly on
these and half on all that may follow. By the union bound the chance of one false alarm or more is
at most α, however long the run is, and whatever the dependence between evaluations.

**What that rests on.** Prompts drawn independently of each other and not trained on, and rewards
that are independent from prompt to prompt (not so: one that is normalised over a batch, or has a
noise that the completions of one call share); trends symmetric about their mean over prompts (a
difference of two evaluations with the same distribution always is; several completions of each
prompt and many prompts help); and a policy that has not seen the evaluations. It is about the
expectation of gold on such prompts under the policies as they were: where the noise of training
truly lowers gold while it raises the proxy, that is no false alarm.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Rewards = NDArray[np.float64]

_MOST_CELLS = 1 << 18
_COINS_AT_ONCE = 512  # 2^512 is a float64
_FLOAT32 = 2.0**-23  # rewards are of this relative precision


@dataclass(frozen=True)
class Verdict:
    """What one evaluation says.

    Attributes:
        p_value: of the evaluation, corrected for the spans; 1 where nothing can be tested yet.
        threshold: α_k; 0 at the first evaluation, which is compared with nothing.
        is_alarm: p_value <= threshold.
        since: the evaluation at which the clearest span begins.
        is_falling: gold falls at this level, though the proxy need not rise.
        is_stalled: over the second half of the evaluations so far the proxy rises at this level
            and gold not at the level α; and less, at this level, than such a rise of the proxy was
            worth in the first half (`exchange_rate`). Only said in the second half of the planned
            run.
    """

    p_value: float
    threshold: float
    is_alarm: bool
    since: int
    is_falling: bool
    is_stalled: bool


class PartingTest:
    """The test of this module's docstring, an evaluation at a time.

    Args:
        alpha: the chance of one false alarm or more over the whole run, at most; in (0, 1).
        planned: K, evaluations after the first one that the run is planned to have; >= 1.
    """

    def __init__(self, alpha: float, planned: int) -> None:
        self.alpha, self.planned = alpha, planned
        self.begin = 0  # the first evaluation that is looked at: that of the last alarm
        self._gold: list[Rewards] = []
        self._proxy: list[Rewards] = []

    def __len__(self) -> int:
        """Evaluations so far."""
        return len(self._gold)

    def add(self, gold: Tensor, proxy: Tensor) -> Verdict:
        """Take in an evaluation, and test.

        After an alarm the test begins anew with this evaluation: each alarm has its own evidence.

        Args:
            gold, proxy: [n], of the same prompts each time; NaN where a prompt has none. A prompt
                is left out of the spans in which it lacks one.
        """
        self._gold.append(gold.detach().double().cpu().numpy())
        self._proxy.append(proxy.detach().double().cpu().numpy())
        now = len(self) - 1
        threshold = level(now, self.planned, self.alpha)
        lengths = spans(now - self.begin)
        falls = [rises(-trend(self._gold, m)) for m in lengths]
        both = [max(p, rises(trend(self._proxy, m))) for p, m in zip(falls, lengths, strict=True)]
        best = min(range(len(lengths)), key=both.__getitem__, default=None)
        p_value = 1.0 if best is None else min(1.0, len(lengths) * both[best])
        is_alarm = p_value <= threshold
        verdict = Verdict(
            p_value,
            threshold,
            is_alarm,
            now if best is None else now - lengths[best],
            is_falling=bool(falls) and min(falls) * len(falls) <= threshold,
            is_stalled=self._is_stalled(threshold),
        )
        if is_alarm:
            self.begin = now
        return verdict

    def _is_stalled(self, threshold: float) -> bool:
        now = len(self) - 1
        middle = max(self.begin, (now + 1) // 2)
        if 2 * now < self.planned or middle == now:
            return False
        gold, proxy = (trend(of, now - middle) for of in (self._gold, self._proxy))
        if rises(gold) <= self.alpha or rises(proxy) > threshold:
            return False
        worth = exchange_rate(self._gold[: middle + 1], self._proxy[: middle + 1])
        return rises(worth * proxy - gold) <= threshold

    def state_dict(self) -> dict[str, Any]:
        return {
            "planned": self.planned,
            "begin": self.begin,
            "gold": [torch.tensor(row) for row in self._gold],
            "proxy": [torch.tensor(row) for row in self._proxy],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.planned, self.begin = state["planned"], state["begin"]
        self._gold = [row.numpy().copy() for row in state["gold"]]
        self._proxy = [row.numpy().copy() for row in state["proxy"]]


def level(k: int, planned: int, alpha: float) -> float:
    """α_k of the module's docstring; 0 for k = 0."""
    if k < 1:
        return 0.0
    return alpha / (2 * planned) if k <= planned else alpha * planned / (2 * k * (k - 1))


def spans(longest: int) -> list[int]:
    """1, 2, 4, ..., as far as `longest`."""
    return [1 << power for power in range(max(0, longest).bit_length())]


def trend(rewards: list[Rewards], span: int) -> Rewards:
    """[n]: each prompt's trend over the last span + 1 evaluations, twice the sum above.

    Evaluations are compared two by two, the last with the first: what has not changed gives an
    exact 0, and so does a change that is below the precision of the rewards.
    """
    rows = np.stack(rewards[-span - 1 :])
    pairs = (span + 1) // 2
    weights = span - 2.0 * np.arange(pairs)
    early, late = rows[:pairs], rows[::-1][:pairs]
    slope = weights @ (late - early)
    smallest = _FLOAT32 * (weights @ (np.abs(late) + np.abs(early)))
    slope[np.abs(slope) <= smallest] = 0
    # An evaluation in the middle weighs nothing, but a prompt without it is not complete.
    return slope + 0 * rows.sum(0)


def exchange_rate(gold: list[Rewards], proxy: list[Rewards]) -> float:
    """How much more gold a prompt has that has 1 more of the proxy: a least-squares slope, or 0.

    Over the prompts of each evaluation, around its means, so that no trend is in it.
    """
    together, variance = 0.0, 0.0
    for g, p in zip(gold, proxy, strict=True):
        is_known = np.isfinite(g + p)
        if is_known.any():
            g, p = g[is_known] - g[is_known].mean(), p[is_known] - p[is_known].mean()
            together, variance = together + float(g @ p), variance + float(p @ p)
    return max(0.0, together / variance) if variance > 0 else 0.0


def rises(trends: Rewards) -> float:
    """The sign-flip p-value of a mean trend above 0, from [n]; NaN are left out.

    1 where the mean is not above 0: the exact one is then above 1/2.
    """
    x = trends[np.isfinite(trends)]
    if not x.sum() > 0:
        return 1.0
    x = np.sort(x / np.abs(x).max())  # squares neither vanish nor overflow
    # Rounding moves the sum by 2 % of its deviation at most, as far as memory allows.
    cell = max(np.sqrt(np.square(x).sum()) / (50 * len(x)), -x[x < 0].sum() / _MOST_CELLS)
    steps = np.floor(x / cell).astype(np.int64).tolist()
    lowest = -sum(step for step in steps if step < 0)
    # Of the sums from -lowest to 0. The negative ones come first: from above 0 none comes back.
    chance = np.zeros(lowest + 1)
    chance[lowest] = 1.0
    for start in range(0, len(steps), _COINS_AT_ONCE):
        coins = steps[start : start + _COINS_AT_ONCE]
        for step in coins:
            if step < 0:
                chance[:step] += chance[-step:]
            elif step == 0:
                chance *= 2
            elif step <= lowest:
                chance[step:] += chance[:-step]
        chance *= 0.5 ** len(coins)
    return float(chance.sum())


def fewest_prompts(planned: int, alpha: float) -> int:
    """With fewer, the last planned evaluation could raise no alarm, whatever its rewards are.

    No p-value of n prompts is below 2^-n, where all of them rise.
    """
    return math.ceil(math.log2(len(spans(planned)) / level(planned, planned, alpha)))
