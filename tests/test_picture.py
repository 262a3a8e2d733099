"""layout.plot: the polygons drawn cover exactly the pairs that see each other."""

import sys

import pytest
import torch
from forests import ancestry, random_forest

from fastrl._picture import COLOURS, STAIRS
from fastrl.layout import PackedLayout

pytest.importorskip("matplotlib")

import matplotlib  # noqa: E402

matplotlib.use("Agg")

from matplotlib import pyplot  # noqa: E402
from matplotlib.collections import PolyCollection  # noqa: E402
from matplotlib.colors import to_rgba  # noqa: E402


@pytest.fixture(autouse=True)
def close_figures():
    yield
    pyplot.close("all")


def layout_of(lengths, prefix):
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    return PackedLayout(cu_seqlens, torch.tensor(prefix, dtype=torch.int32))


def polygons_of(axes):
    (polygons,) = (c for c in axes.collections if isinstance(c, PolyCollection))
    return polygons


def times_covered(polygons, num_tokens):
    """[N, N]: in how many polygons the middle of each pair (query, key) is."""
    token = torch.arange(num_tokens) + 0.5
    middles = torch.cartesian_prod(token, token).flip(1).numpy()  # (key, query), by query
    covered = torch.zeros(num_tokens, num_tokens, dtype=torch.int64)
    for path in polygons.get_paths():
        covered += torch.from_numpy(path.contains_points(middles)).view(num_tokens, num_tokens)
    return covered


def visible_in(layout):
    token = torch.arange(layout.num_tokens)
    return (token <= token[:, None]) & (token[:, None] < layout.visible_until)


@pytest.mark.parametrize("scale", [1, 17])  # with stairs, and with straight diagonals
@pytest.mark.parametrize("seed", [*range(7), 9])
def test_polygons_cover_what_is_visible(seed, scale):
    lengths, prefix = random_forest(seed)
    layout = layout_of([length * scale for length in lengths], prefix)
    axes = layout.plot()
    covered = times_covered(polygons_of(axes), layout.num_tokens)
    assert torch.equal(covered, visible_in(layout).long())
    assert axes.get_xlim() == (0, max(layout.num_tokens, 1))
    assert axes.get_ylim() == axes.get_xlim()[::-1]  # the first query on top
    axes.figure.canvas.draw()


def test_both_kinds_of_triangles_are_tested():
    sums = [sum(random_forest(seed)[0]) for seed in [*range(7), 9]]
    assert min(s for s in sums if s) <= STAIRS and max(sums) * 17 > STAIRS


def test_colours_tell_the_depth_and_labels_the_segments():
    prefix = [-1, 0, 1, 2, 3, 4, 5, 6, 0, -1]
    lengths = [3, 2, 2, 2, 2, 2, 2, 2, 0, 2]
    layout = layout_of(lengths, prefix)
    axes = layout.plot()
    polygons = polygons_of(axes)
    (parts,) = layout.schedule
    keys = layout.segment_ids[parts[:, 2].long()].tolist()
    depths = [min(len(ancestry(prefix, s)) - 1, len(COLOURS) - 1) for s in keys]
    expected = [to_rgba(COLOURS[d]) for d in depths]
    assert [tuple(c) for c in polygons.get_facecolor()] == expected
    assert axes.texts[0].get_text() == "0: 3 tokens"
    assert [t.get_text().split(":")[0] for t in axes.texts] == ["0", *"1234567", "9"]
    legend = [text.get_text() for text in axes.get_legend().get_texts()]
    assert legend[:2] == ["keys of roots", "keys of depth 1"] and legend[-1].endswith("and below")
    assert axes.get_title(loc="left").splitlines() == [
        "3 + (2 + 2 + 2 + 2 + 2 + 2 + 2, 0) | 2",
        "19 tokens, 10 segments, 2 trees",
    ]


def test_it_draws_on_given_axes_and_from_any_device():
    axes = pyplot.figure().add_subplot(1, 2, 2)
    layout = layout_of([3, 2], [-1, 0]).to("meta")  # drawn from what the host knows
    assert layout.plot(axes) is axes
    assert len(polygons_of(axes).get_paths()) == 3
    assert len(pyplot.get_fignums()) == 1


def test_large_layouts_take_a_few_corners_a_segment():
    layout = layout_of([1000] * 3400, [-1 if s % 17 == 0 else s - s % 17 for s in range(3400)])
    paths = polygons_of(layout.plot()).get_paths()
    assert len(paths) == 3400 + 200
    assert sum(len(path.vertices) for path in paths) <= 7 * 3600  # a closed polygon repeats one


def test_nothing_to_draw():
    assert len(polygons_of(layout_of([], []).plot()).get_paths()) == 0
    assert len(polygons_of(layout_of([0, 0], [-1, 0]).plot()).get_paths()) == 0


def test_without_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"plot: expected matplotlib, got .*pip install 'fastrl"):
        layout_of([1], [-1]).plot()
