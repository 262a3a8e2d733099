"""A picture of a layout's attention mask, for layout.py. It needs matplotlib when it is drawn."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastrl._notation import counted, layout_text
from fastrl._schedule import attention_parts
from fastrl._segments import depths

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's colours: told apart by everybody. By depth, the last one from there on.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
STAIRS = 64  # tokens, up to which a triangle is drawn with its steps
LABELS = 40  # segments, of equal lengths, that have room for one


def draw_mask(bounds: Tensor, prefix: Tensor, until: Tensor, axes: "Axes | None") -> "Axes":
    """Of N tokens in S segments, all on the host: bounds [S + 1], prefix and until [S], int64.

    One collection of polygons, at most two for each segment: the parts that attention works
    through. Token j is the unit from j to j + 1, on either axis.
    """
    try:
        from matplotlib import pyplot
        from matplotlib.collections import PolyCollection
    except ImportError as error:
        raise ImportError(
            f"plot: expected matplotlib, got {error}. pip install 'fastrl[plot]'"
        ) from error
    if axes is None:
        axes = pyplot.subplots(figsize=(7, 7), layout="constrained")[1]
    num_tokens = int(bounds[-1])
    depth = depths(prefix)
    parts = attention_parts(bounds[:-1], bounds[1:], until)
    # A part's keys are one segment, which is not empty: the one that ends where they do.
    segment_of_part = torch.searchsorted(bounds[1:], parts[:, 3].long())
    polygons = PolyCollection(
        [_polygon(part, num_tokens <= STAIRS) for part in parts.tolist()],
        facecolors=[COLOURS[min(depth[s], len(COLOURS) - 1)] for s in segment_of_part.tolist()],
        edgecolors="white",
        linewidths=0.8 if len(parts) <= 4 * LABELS else 0.0,
    )
    axes.add_collection(polygons)
    if num_tokens <= STAIRS:
        axes.hlines(range(num_tokens), 0, num_tokens, color="white", linewidth=0.3)
        axes.vlines(range(num_tokens), 0, num_tokens, color="white", linewidth=0.3)
    _label_segments(axes, bounds)
    _label_axes(axes, bounds, prefix, depth)
    return axes


def _polygon(part: list[int], has_steps: bool) -> list[tuple[float, float]]:
    """Its corners (key, query). The middles of the pairs that see each other are inside."""
    query_start, query_end, key_start, key_end, is_causal = part
    if not is_causal:
        return [
            (key_start, query_start), (key_end, query_start),
            (key_end, query_end), (key_start, query_end),
        ]  # fmt: skip
    if has_steps:
        steps = [(j + 1, i) for j in range(key_start, key_end) for i in (j, j + 1)]
        return [(key_start, query_start), *steps, (key_start, query_end)]
    # Half a step above the diagonal, so that a query's own key is inside and the next one not.
    return [
        (key_start, query_start), (key_start + 0.5, query_start),
        (key_end, query_end - 0.5), (key_end, query_end), (key_start, query_end),
    ]  # fmt: skip


def _label_segments(axes: "Axes", bounds: Tensor) -> None:
    """Which segment, and how long it is: to the right of its triangle, where no query sees a key.
    And a line between the rows of one segment and those of the next."""
    num_tokens = int(bounds[-1])
    wide = (bounds.diff() * LABELS > num_tokens).nonzero().squeeze(-1)
    lines = torch.cat([bounds[wide], bounds[wide + 1]]).unique()
    axes.hlines(lines.tolist(), 0, num_tokens, color="white", linewidth=0.8)
    for s in wide.tolist():
        start, end = int(bounds[s]), int(bounds[s + 1])
        middle = (start + end - 1) // 2
        axes.annotate(
            f"{s}: {counted(end - start, 'token')}", (middle + 1, middle + 0.5), xytext=(8, 0),
            textcoords="offset points", va="center", fontsize=7, color="0.25",
        )  # fmt: skip


def _label_axes(axes: "Axes", bounds: Tensor, prefix: Tensor, depth: list[int]) -> None:
    from matplotlib.patches import Patch
    from matplotlib.ticker import MaxNLocator

    size = max(int(bounds[-1]), 1)
    axes.set(xlim=(0, size), ylim=(size, 0), aspect="equal", xlabel="key", ylabel="query")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True))
    sizes, _, trees = layout_text(bounds, prefix, int((prefix < 0).sum())).partition(": ")
    axes.set_title(f"{trees}\n{sizes}" if trees else sizes, fontsize=9, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    deepest = min(max(depth, default=0), len(COLOURS) - 1)
    names = ["roots", *(f"depth {d}" for d in range(1, deepest + 1))]
    if max(depth, default=0) > deepest:
        names[-1] += " and below"
    axes.legend(
        handles=[Patch(color=COLOURS[d], label=f"keys of {n}") for d, n in enumerate(names)],
        loc="upper right", frameon=False, fontsize=8,
    )  # fmt: skip
