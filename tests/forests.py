"""Forests of segments for the tests of layouts and paths."""

import random


def random_forest(seed):
    """lengths and prefix of a depth-first forest, empty segments included."""
    rng = random.Random(seed)
    prefix, path = [], []
    for s in range(rng.randint(1, 12)):
        del path[rng.randint(0, len(path)) :]
        prefix.append(path[-1] if path else -1)
        path.append(s)
    return [rng.choice([0, 1, 2, 3, 5]) for _ in prefix], prefix


def ancestry(prefix, s):
    """s and all that it continues, from the root."""
    return [*ancestry(prefix, prefix[s]), s] if s >= 0 else []
