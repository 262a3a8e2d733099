"""Two pictures of a run: how near to the ceilings, and how much faster than whom."""

from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.results import CaseResult, Results
from bench.table import amount

matplotlib.use("Agg")

# Okabe and Ito's colours: told apart by everybody.
_OURS = "#D55E00"
_COLOURS = ("#0072B2", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000", "#999999", "#F0E442")
_MARKERS = "osD^vPXd"


def draw(results: Results, folder: Path) -> list[Path]:
    """roofline.png and speedup.png in the folder; the second needs a case with our op."""
    folder.mkdir(parents=True, exist_ok=True)
    timed = [case for case in results.cases if case.entries]
    if not timed:
        return []
    names = sorted({e.name for case in timed for e in case.entries if not _is_ours(e.name)})
    looks = {
        name: (_COLOURS[i % len(_COLOURS)], _MARKERS[(i + i // len(_COLOURS)) % len(_MARKERS)])
        for i, name in enumerate(names)
    }
    pictures = {"roofline.png": _roofline(results, timed, looks)}
    if any(case.ours is not None for case in timed):
        pictures["speedup.png"] = _speedup(results, timed, looks)
    paths = []
    for name, figure in pictures.items():
        paths.append(folder / name)
        figure.savefig(paths[-1], dpi=150, bbox_inches="tight")
    return paths


def _is_ours(name: str) -> bool:
    return name == "fastrl" or name.startswith("fastrl ")


def _xy(points: list[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def _roofline(results: Results, timed: list[CaseResult], looks: dict) -> Figure:
    """A panel per ceiling: what is counted against its rate. Small calls pay for the call, large
    ones for data, or for arithmetic."""
    by_ceiling = {
        name: [case for case in timed if case.ceiling == name] for name in ("copy", "product")
    }
    panels = [name for name, found in by_ceiling.items() if found]
    figure = Figure(figsize=(10, 6 * len(panels)))
    for i, name in enumerate(panels, start=1):
        axes = figure.add_subplot(len(panels), 1, i)
        _rates(axes, by_ceiling[name], looks, name)
        roofs = results.product_tflop_s if name == "product" else {"copy": results.copy_gb_s or 0}
        for dtype, rate in roofs.items():
            axes.axhline(rate, color="black", linewidth=1)
            axes.annotate(f"{dtype}, {rate:.3g}", (0.01, rate), xycoords=("axes fraction", "data"),
                          xytext=(0, 4), textcoords="offset points", fontsize=9)  # fmt: skip
        _finish(figure, axes, results, "Rate of matrix products" if name == "product"
                else "Bandwidth reached")  # fmt: skip
    figure.tight_layout()
    return figure


def _rates(axes: Axes, cases: list[CaseResult], looks: dict, ceiling: str) -> None:
    def points(name: str) -> list[tuple[float, float]]:
        entries = [(c, e) for c in cases for e in c.entries if e.name == name]
        if ceiling == "product":
            return [(float(c.counted_flops), e.tflop_s or 0.0) for c, e in entries]
        return [(float(c.counted_bytes), e.gb_s) for c, e in entries]

    for name, (colour, marker) in looks.items():
        if found := points(name):
            axes.scatter(*_xy(found), c=colour, marker=marker, s=28, alpha=0.75, label=name,
                         linewidths=0)  # fmt: skip
    if ours := points("fastrl"):
        axes.scatter(*_xy(ours), c=_OURS, marker="*", s=170, label="fastrl", zorder=5,
                     edgecolors="white", linewidths=0.7)  # fmt: skip
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(lambda y, _: f"{y:g}")
    if ceiling == "product":
        axes.set_xlabel("operations that the case counts: those of the fewest matrix products")
        axes.set_ylabel("TFLOP/s (counted operations / median time)")
    else:
        axes.xaxis.set_major_formatter(lambda x, _: amount(round(x)))
        axes.set_xlabel("bytes that the case counts: each input read, each output written once")
        axes.set_ylabel("GB/s (counted bytes / median time)")


def _speedup(results: Results, timed: list[CaseResult], looks: dict) -> Figure:
    """A line per case, a mark per peer: right of 1 we are faster, left of it slower."""
    timed = [case for case in timed if case.ours is not None]
    figure = Figure(figsize=(11, 1.6 + 0.42 * len(timed)))
    axes = figure.add_subplot()
    for y, case in enumerate(timed):
        ratios = [e.ratio for e in case.entries if e.ratio is not None and not _is_ours(e.name)]
        if ratios:
            axes.plot([min(1.0, *ratios), max(1.0, *ratios)], [y, y], c="#dddddd", lw=1, zorder=1)
    for name, (colour, marker) in looks.items():
        points = [
            (e.ratio, float(y))
            for y, c in enumerate(timed)
            for e in c.entries
            if e.name == name and e.ratio is not None
        ]
        if not points:
            continue
        axes.scatter(*_xy(points), c=colour, marker=marker, s=36, label=name,
                     zorder=3, linewidths=0)  # fmt: skip
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    axes.set_xlim(min(low, 0.5), high)
    axes.axvspan(axes.get_xlim()[0], 1, color="#fbe9e7", zorder=0)
    axes.axvline(1, color=_OURS, linewidth=1.5)
    axes.set_yticks(range(len(timed)), [_short(case) for case in timed], fontsize=8)
    axes.set_ylim(len(timed) - 0.4, -0.6)
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}x")
    axes.set_xlabel("time of the peer / time of fastrl (shaded: the peer is faster)")
    _finish(figure, axes, results, "Speed-up over each peer")
    return figure


def _short(case: CaseResult) -> str:
    dtype = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}.get(case.dtype, case.dtype)
    shape = "x".join(map(str, case.shape))
    extra = [part for part in case.name.split(", ") if "=" not in part and part.isidentifier()]
    return f"{case.op} {shape} {dtype} {case.mode}" + (f"\n{', '.join(extra)}" if extra else "")


def _finish(figure: Figure, axes: Axes, results: Results, title: str) -> None:
    e = results.environment
    axes.set_title(
        f"{title}\n{e['gpu'] or e['cpu']}, {e['threads']} threads, torch {e['torch']}, "
        f"{e['commit']}", fontsize=10, loc="left",
    )  # fmt: skip
    axes.grid(True, which="major", axis="both", color="#eeeeee", zorder=0)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), fontsize=8, frameon=False)
