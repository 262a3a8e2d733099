"""Which draws and which kept sets fastrl.reference gives, and how far sampling may be from them."""

import torch

from fastrl.reference._philox import uniform
from fastrl.reference.sample_tokens import draw_tokens, kept_ids

# No top_p that a whole number of equals reaches exactly: there the reference's own sum decides.
CUTS: list[dict] = [
    {},
    {"top_k": 1},
    {"top_k": 7},
    {"top_k": 50, "top_p": 0.913},
    {"top_k": 3000, "top_p": 0.9713},
    {"top_k": 10**20},
    {"top_p": 0.913},
    {"top_p": 1e-6},
    {"top_p": 0.99995},
    {"top_p": 1.0},
]


def expected_of(logits, seeds, *, step=0, temperature=1.0, top_k=None, top_p=None):
    """The reference's ids, and which ids [rows, V] it kept."""
    return draw_tokens(logits, temperature, top_k, top_p, seeds, step)


def assert_kept_agree(kept, is_kept, logits, *, temperature=1.0, top_k=None, top_p=None, **_):
    """Equal, but where top_p lies within 2e-7 of the mass before the ids that one of them keeps."""
    expected_ids, expected_bounds = kept_ids(is_kept)
    ids, bounds = kept
    if torch.equal(ids, expected_ids) and torch.equal(bounds, expected_bounds):
        return
    assert top_p is not None and bounds.dtype == torch.int32 and len(bounds) == len(logits) + 1
    ours = torch.zeros_like(is_kept)
    rows = torch.arange(len(logits), device=ids.device)
    ours[rows.repeat_interleave(bounds.diff()), ids] = True
    for row in (ours != is_kept).any(-1).nonzero()[:, 0]:
        scaled = logits[row].double() / temperature
        total = scaled.sort(descending=True).values[:top_k].logsumexp(0)
        small, large = sorted((ours[row], is_kept[row]), key=lambda mask: int(mask.sum()))
        assert large[small].all()
        p = (scaled - total).exp()
        assert p[small].sum() > top_p - 2e-7
        assert p[large].sum() - p[large].min() < top_p + 2e-7


def assert_draws_agree(
    token_ids, expected, is_kept, logits, seeds, *, step=0, temperature=1.0, **cut
) -> None:
    """Equal, but where u lies within 1e-6 of the boundary between the two; that must be rare."""
    rows = (token_ids != expected).nonzero()[:, 0]
    assert len(rows) <= len(logits) // 20
    for row in rows:
        assert is_kept[row, token_ids[row]]
        scaled = logits[row].double() / temperature
        cumulative = scaled.masked_fill(~is_kept[row], -torch.inf).softmax(-1).cumsum(-1)
        low, high = sorted((int(token_ids[row]), int(expected[row])))
        u = uniform(seeds[row : row + 1], step, torch.float32).double()
        assert (u - cumulative[low]).abs() < 1e-6 and (u - cumulative[high - 1]).abs() < 1e-6
