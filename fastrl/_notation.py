"""A layout in a few words, for layout.py."""

from itertools import groupby

from torch import Tensor

SEGMENTS = 512  # that are looked at, so that printing costs the same for a batch of any size
WIDTH = 80  # of what is said about the trees


def layout_text(bounds: Tensor, prefix: Tensor, num_trees: int) -> str:
    """ "9 tokens, 5 segments, 2 trees: 3 + (2, 0, 1) | 3".

    "3 + (2, 0, 1)" is a segment of 3 tokens and the three that continue it, "512 + 16 x 128" one of
    512 and 16 of 128, "3 + 2 + 1" a chain; each of these may be a tree in parentheses. "|" stands
    between trees.

    Args:
        bounds: [S + 1] int64, on the host like prefix.
        prefix: [S] int64, depth first.
    """
    num_segments = len(prefix)
    sizes = [counted(int(bounds[-1]), "token"), counted(num_segments, "segment")]
    if not num_segments:
        return ", ".join(sizes)
    trees = _trees(bounds[: SEGMENTS + 1].diff().tolist(), prefix[: SEGMENTS + 1].tolist())
    return ", ".join([*sizes, f"{counted(num_trees, 'tree')}: {_row(trees, num_trees)}"])


def counted(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _trees(lengths: list[int], prefix: list[int]) -> list[str]:
    """Each tree's text; prefix may have one segment more: the first that is not looked at."""
    below: list[list[str]] = [[] for _ in lengths]
    if len(prefix) > len(lengths):
        ancestor = prefix[len(lengths)]
        while ancestor >= 0:  # more continues it than is looked at
            below[ancestor].append("...")
            ancestor = prefix[ancestor]
    trees: list[str] = []
    for s in reversed(range(len(lengths))):
        of_parent = below[prefix[s]] if prefix[s] >= 0 else trees
        of_parent.append(_tree(lengths[s], below[s][::-1]))
    return trees[::-1]


def _tree(length: int, children: list[str]) -> str:
    runs = [text for _, text in _runs(children)]
    if not runs:
        return str(length)
    return f"{length} + {runs[0]}" if len(runs) == 1 else f"{length} + ({', '.join(runs)})"


def _runs(texts: list[str]) -> list[tuple[int, str]]:
    """Equal neighbours as one: how many, and "16 x 128"."""
    runs = [(len(list(run)), text) for text, run in groupby(texts)]
    return [
        (n, text if n == 1 else f"{n} x ({text})" if " " in text else f"{n} x {text}")
        for n, text in runs
    ]


def _row(trees: list[str], num_trees: int) -> str:
    """As many trees as fit, and how many there are beside them."""
    shown: list[str] = []
    left = num_trees
    for n, text in _runs(trees):
        if len(" | ".join([*shown, text])) > WIDTH:
            if shown:
                break
            text = text[:WIDTH].rsplit(" ", 1)[0]
            text += " ..." + ")" * (text.count("(") - text.count(")"))
        shown.append(text)
        left -= n
    return " | ".join([*shown, f"{left} more"] if left else shown)
