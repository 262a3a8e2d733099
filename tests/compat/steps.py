"""Random trajectories for TorchRL's estimators, and the comparison of theirs with ours."""

from typing import Any

import torch
from torch import Tensor

# float64 of theirs has a discount in float32; in 16 bits theirs rounds at every step.
TOLERANCE = {
    torch.float64: 1e-6, torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2
}  # fmt: skip
# [T]; no batch; one step; F = 1; F > 1; two batch dimensions; time first, last and in the middle
SHAPES = [
    ((7,), -1), ((7, 2), -2), ((3, 1, 1), -2), ((4, 33, 1), -2), ((2, 9, 3), -2),
    ((2, 3, 9, 2), -2), ((3, 9), -1), ((9, 3), 0), ((2, 3, 9), -1), ((2, 9, 3, 2), 1),
    ((2, 9, 3, 2), -3),
]  # fmt: skip
ENDS = ["none", "terminated", "truncated", "both", "done"]
TENSORS = ("state_value", "next_state_value", "reward", "log_pi", "log_mu")


def trajectories(
    shape: tuple[int, ...], time_dim: int, *, dtype: Any = torch.float32, ends: str = "both"
) -> dict[str, Any]:
    """What both estimators take, for data of that shape.

    ends: "none"; "terminated"; "truncated"; "both", where terminated is a part of done; "done" is
        "terminated" without the argument of that name.
    """
    done = torch.rand(shape) < (0 if ends == "none" else 0.25)
    terminated = {
        "both": done & (torch.rand(shape) < 0.5),
        "truncated": torch.zeros_like(done),
    }.get(ends, done)
    made: dict[str, Any] = {k: torch.randn(shape).to(dtype) for k in TENSORS[:3]}
    made |= {"done": done, "terminated": terminated, "time_dim": time_dim}
    if ends == "done":
        del made["terminated"]
    return made


def log_probs(shape: tuple[int, ...], dtype: Any = torch.float32) -> dict[str, Tensor]:
    return {k: (-2 * torch.rand(shape)).to(dtype) for k in TENSORS[3:]}


def both(ours: Any, theirs: Any, arguments: dict[str, Any]) -> tuple[Any, Any]:
    """The two outputs of each, and the gradients of a sum of them in every tensor."""
    results = []
    for function in (ours, theirs):
        leaves = {
            k: x.detach().clone().requires_grad_()
            for k, x in arguments.items()
            if isinstance(x, Tensor) and x.is_floating_point() and not k.endswith("_thresh")
        }
        outputs = function(**(arguments | leaves))
        weights = [torch.arange(x.numel()).view(x.shape).cos().to(x.dtype) for x in outputs]
        sum((x * w).sum() for x, w in zip(outputs, weights, strict=True)).backward()
        results.append(([x.detach() for x in outputs], {k: x.grad for k, x in leaves.items()}))
    return results[0], results[1]


def assert_same(ours: Any, theirs: Any, dtype: torch.dtype) -> None:
    """Both outputs in shape, dtype and value, and all gradients; dtype: the coarsest of them."""
    tolerance = TOLERANCE[dtype]
    for x, y in zip(ours[0], theirs[0], strict=True):
        assert x.shape == y.shape and x.dtype == y.dtype
        torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance)
    for name, y in theirs[1].items():
        torch.testing.assert_close(ours[1][name], y, rtol=tolerance, atol=5 * tolerance)
