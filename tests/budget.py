"""The error budget: an op may be at most twice as wrong as plain PyTorch in the same dtype."""

import torch
from torch import Tensor

# What is allowed on top, relative to the size of the truth: a few units in the last place.
TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 2e-6,
    torch.float16: 2e-3,
    torch.bfloat16: 1.6e-2,
}


def assert_within_budget(actual: Tensor, eager: Tensor, truth: Tensor, dtype: torch.dtype) -> None:
    """|actual - truth| <= 2 |eager - truth| + tolerance(dtype) max(|truth|), entry by entry.

    Args:
        actual: what the op gives.
        eager: what fastrl.reference gives for the same inputs.
        truth: what fastrl.reference gives in float64.
        dtype: of the inputs.
    """
    assert actual.shape == truth.shape
    finite = truth.isfinite()
    assert torch.equal(actual.isfinite(), finite)
    unlike = ~finite & ~truth.isnan()
    assert torch.equal(actual[unlike].double(), truth[unlike].double())
    actual, eager, truth = (x[finite].double() for x in (actual, eager, truth))
    if truth.numel() == 0:
        return
    scale = truth.abs().max().clamp(min=1e-30)
    allowed = 2 * (eager - truth).abs().nan_to_num(0.0) + TOLERANCE[dtype] * scale
    worst = ((actual - truth).abs() - allowed).argmax()
    assert (actual - truth).abs()[worst] <= allowed[worst], (
        f"op {actual[worst].item()!r}, eager {eager[worst].item()!r}, truth {truth[worst].item()!r}"
    )
