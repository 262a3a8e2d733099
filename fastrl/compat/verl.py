"""verl's log-probabilities, by their name in `verl.utils.torch_functional`."""

import torch
from torch import Tensor

from fastrl import ops, reference


def logprobs_from_logits(logits: Tensor, labels: Tensor, inplace_backward: bool = True) -> Tensor:
    """Log-probability of each row's label, as verl's function of that name gives it.

        log p_y = x_y - log sum_j exp(x_j)

    Args:
        logits: [..., V] float32, bfloat16, float16, or float64 (by fastrl.reference). verl's
            callers have divided them by the temperature.
        labels: [...] int64 in [0, V); -100 gives 0 and no gradient, as flash-attn's kernel does.
        inplace_backward: the backward pass writes the gradient over `logits`, as flash-attn's
            kernel does where verl finds it: no memory beside it. Here on a CPU as well. Who needs
            the logits again in a backward pass (an entropy) passes False, as in verl; forgetting it
            is an error from autograd, and no wrong gradient. float64 is never in place.
    Returns:
        logprobs: [...], nats; float32 on a GPU (flash-attn's dtype), the logits' dtype on a CPU.
    Raises:
        ValueError: shapes disagree, or (eager, CPU) a label is neither in [0, V) nor -100; on a GPU
            such a label gives NaN.
        TypeError: another dtype.  NotImplementedError: a device without a kernel.
    Differentiable in: logits.
    Unlike verl's: computed in float32 and rounded once, exact for likely tokens.
    """
    if logits.dtype == torch.float64:
        return reference.token_logprobs(logits, labels)  # type: ignore[return-value]
    logprobs = ops.token_logprobs(logits, labels, inplace_backward=inplace_backward)
    assert isinstance(logprobs, Tensor)
    return logprobs if logits.device.type == "cuda" else logprobs.to(logits.dtype)
