"""Completions sorted into their groups, and sums within each group."""

import torch
from torch import Tensor


class Groups:
    """Rewards [C] laid out group by group, each group from its lowest reward to its highest.

    What is not finite stands behind the rest of its group and counts for nothing. Sums are of
    float64 and pair neighbours in an order that the places in the group alone decide: no bit of a
    group's numbers depends on the other groups, nor on the order of its own completions. No size
    depends on data, and so no device is asked for one.

    `rewards` is float64 and 0 where not `valid`; `rank` counts from 1 within the group; `count` is
    the number of the group's finite rewards, at each of its completions.
    """

    def __init__(self, rewards: Tensor, group_ids: Tensor) -> None:
        x = rewards.double()
        order = x.where(x.isfinite(), torch.inf).argsort(stable=True)
        self._order = order[group_ids[order].argsort(stable=True)]
        x, ids = x[self._order], group_ids[self._order]
        self.valid = x.isfinite()
        self.rewards = x.where(self.valid, 0)

        place = torch.arange(len(x), device=x.device)
        edge = torch.ones_like(self.valid[:1])
        changes = ids[1:] != ids[:-1]
        is_first, is_last = torch.cat([edge, changes]), torch.cat([changes, edge])
        self._first = place.where(is_first, 0).cummax(0).values
        self._last = place.where(is_last, len(x)).flip(0).cummin(0).values.flip(0)
        self.rank = place - self._first + 1
        self._left = self._last - place  # places to the end of the group
        so_far = self.valid.long().cumsum(0)  # whole numbers: exact in any order
        self.count = so_far[self._last] - so_far[self._first] + self.valid[self._first].long()

    def at_rank(self, x: Tensor, rank: int | Tensor) -> Tensor:
        """[C]: x at the group's completion of that rank; at its first or last if there is none."""
        place = self._first + rank - 1
        return x[torch.minimum(place.maximum(self._first), self._last)]

    def before(self, x: Tensor) -> Tensor:
        """[C]: x one rank lower; anything at rank 1."""
        return x.roll(1)

    def after(self, x: Tensor) -> Tensor:
        """[C]: x one rank higher; anything at the group's end."""
        return x.roll(-1)

    def total(self, x: Tensor) -> Tensor:
        """[C]: the sum of x over the completion's group."""
        return self.sum_up_to(x)[self._last]

    def sum_up_to(self, x: Tensor) -> Tensor:
        """[C]: the sum of x over the ranks up to one's own."""
        return _accumulate(x, self.rank - 1, product=False)

    def sum_from(self, x: Tensor) -> Tensor:
        """[C]: the sum of x over the ranks from one's own."""
        return _accumulate(x.flip(0), self._left.flip(0), product=False).flip(0)

    def product_from(self, x: Tensor) -> Tensor:
        """[C]: the product of x over the ranks from one's own."""
        return _accumulate(x.flip(0), self._left.flip(0), product=True).flip(0)

    def first_equal(self, x: Tensor) -> Tensor:
        """[C]: x at the lowest rank whose reward is the same, so that equals get equal bits."""
        differs = (self.rewards != self.before(self.rewards)) | (self.rank == 1)
        place = torch.arange(len(x), device=x.device)
        return x[place.where(differs, 0).cummax(0).values]

    def restore(self, x: Tensor) -> Tensor:
        """[C] in the caller's order."""
        out = torch.empty_like(x)
        out[self._order] = x
        return out


def _accumulate(x: Tensor, reach: Tensor, *, product: bool) -> Tensor:
    """[C]: the sum (or product) of x over an entry and the `reach` entries before it.

    By doubling: after the step of distance d, an entry holds what the last 2 d entries add up to.
    """
    distance = 1
    while distance < len(x):
        # Only values in reach are combined: another group's would bring their rounding along.
        earlier = x.roll(distance).where(reach >= distance, 1.0 if product else 0.0)
        x = x * earlier if product else x + earlier
        distance *= 2
    return x
