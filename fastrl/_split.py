"""Trees into few bins of a bounded capacity, filled evenly, for _batch.py."""

import heapq
from bisect import bisect_left, insort

import torch
from torch import Tensor


def bins_of_trees(bounds: Tensor, is_root: Tensor, max_tokens: int) -> list[int]:
    """The bin of each tree, of which none holds more tokens than max_tokens.

    Args:
        bounds: [S + 1] int64, where segments begin, on the host.
        is_root: [S] bool, where a tree begins.
    """
    roots = is_root.nonzero().squeeze(-1)
    sizes = torch.cat([bounds[roots], bounds[-1:]]).diff().tolist()
    largest = max(sizes, default=0)
    if max_tokens < max(1, largest):
        tree = sizes.index(largest) if sizes else 0
        what = f"the tokens of tree {tree}" if largest else "room for a token"
        raise ValueError(
            f"split_by_tokens: expected max_tokens >= {max(1, largest)}, {what}, got {max_tokens}. "
            "Raise it, or pack fewer completions with one prompt: a tree is not cut, since its "
            "prompt would be computed twice."
        )
    return balanced_bins(sizes, max_tokens)


def members(bins: Tensor, count: int) -> tuple[Tensor, ...]:
    """Which items each of count bins holds, rising, from the bin of each item, or -1."""
    held = (bins >= 0).nonzero().squeeze(-1)
    sizes = torch.bincount(bins[held], minlength=count).tolist()
    return held[bins[held].argsort(stable=True)].split(sizes) if count else ()


def balanced_bins(sizes: list[int], capacity: int) -> list[int]:
    """The bin of each item: numbers from 0, by the first item in each. The same in every run.

    As few as the rules below find, from ceil(sum / capacity) on: even if that many bins can be
    filled evenly, else the tightest that fit.

    Args:
        sizes: >= 0 and <= capacity each.
        capacity: >= 1, most that a bin may hold.
    """
    if not sizes:
        return []
    order = sorted(range(len(sizes)), key=lambda i: -sizes[i])  # stable: ties by number
    fewest = max(1, -(-sum(sizes) // capacity))
    packed = _best_fit(sizes, order, capacity)
    for count in range(fewest, _count(packed) + 1):
        spread = _least_loaded(sizes, order, count)
        if _fullest(sizes, spread) <= capacity:
            return _by_first_item(spread)
    return _by_first_item(_tightest(sizes, order, capacity))


def _least_loaded(sizes: list[int], order: list[int], count: int) -> list[int]:
    """Each item, from the largest on, into the bin that has least in it: even, but not the most
    that fits. Graham 1969, SIAM J. Appl. Math. 17."""
    bins = [0] * len(sizes)
    loads = [(0, b) for b in range(count)]
    for i in order:
        load, b = loads[0]
        bins[i] = b
        heapq.heapreplace(loads, (load + sizes[i], b))
    return bins


def _best_fit(sizes: list[int], order: list[int], capacity: int) -> list[int]:
    """Each item, from the largest on, into the fullest bin that has room for it: at most 11/9 of
    the fewest bins, and one. Johnson et al. 1974, SIAM J. Comput. 3."""
    bins = [0] * len(sizes)
    rooms: list[tuple[int, int]] = []  # (room, bin), rising
    count = 0
    for i in order:
        at = bisect_left(rooms, (sizes[i], -1))
        if at < len(rooms):
            room, b = rooms.pop(at)
        else:
            room, b = capacity, count
            count += 1
        bins[i] = b
        insort(rooms, (room - sizes[i], b))
    return bins


def _tightest(sizes: list[int], order: list[int], capacity: int) -> list[int]:
    """_best_fit at the least capacity that needs no more bins than this one does.
    Coffman, Garey and Johnson 1978, SIAM J. Comput. 7 (MULTIFIT)."""
    best = _best_fit(sizes, order, capacity)
    count = _count(best)
    low, high = max(max(sizes), -(-sum(sizes) // count)), capacity
    while low < high:
        middle = (low + high) // 2
        bins = _best_fit(sizes, order, middle)
        if _count(bins) <= count:
            best, high = bins, middle
        else:
            low = middle + 1
    return best


def _count(bins: list[int]) -> int:
    return max(bins) + 1


def _fullest(sizes: list[int], bins: list[int]) -> int:
    loads = [0] * _count(bins)
    for size, b in zip(sizes, bins, strict=True):
        loads[b] += size
    return max(loads)


def _by_first_item(bins: list[int]) -> list[int]:
    names: dict[int, int] = {}
    return [names.setdefault(b, len(names)) for b in bins]
