"""Log-probabilities of given tokens, from hidden states."""

from typing import Literal, overload

import torch
import torch.distributed as dist
from torch import Tensor

from fastrl.reference._precision import compute_dtype
from fastrl.reference._vocabulary_parallel import SumGradient
from fastrl.reference.token_logprobs import token_logprobs


@overload
def linear_token_logprobs(
    hidden: Tensor, weight: Tensor, token_ids: Tensor, *, bias: Tensor | None = ...,
    temperature: float = ..., softcap: float | None = ..., ignore_index: int = ...,
    return_entropy: Literal[False] = False, group: dist.ProcessGroup | None = ...,
    vocab_start: int | None = ...,
) -> Tensor: ...  # fmt: skip
@overload
def linear_token_logprobs(
    hidden: Tensor, weight: Tensor, token_ids: Tensor, *, bias: Tensor | None = ...,
    temperature: float = ..., softcap: float | None = ..., ignore_index: int = ...,
    return_entropy: Literal[True], group: dist.ProcessGroup | None = ...,
    vocab_start: int | None = ...,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
@overload
def linear_token_logprobs(
    hidden: Tensor, weight: Tensor, token_ids: Tensor, *, bias: Tensor | None = ...,
    temperature: float = ..., softcap: float | None = ..., ignore_index: int = ...,
    return_entropy: bool, group: dist.ProcessGroup | None = ...,
    vocab_start: int | None = ...,
) -> Tensor | tuple[Tensor, Tensor]: ...  # fmt: skip
def linear_token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    return_entropy: bool = False,
    group: dist.ProcessGroup | None = None,
    vocab_start: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`token_logprobs` of the logits that a language model's head would give.

        logits = hidden weight^T + bias
        logits = softcap tanh(logits / softcap)          if softcap is given

    This definition holds the logits [..., V] in memory; the op never does.

    Args:
        hidden: [..., D] float32, bfloat16, float16 or float64.
        weight: [V, D].
        token_ids: [...] int64; ignore_index and ids outside [0, V) as in `token_logprobs`. The
            hidden states of ignored rows are not used: NaN there reaches no gradient.
        bias: [V].
        temperature: > 0, divides the logits after softcap.
        softcap: > 0, bound of the logits' absolute value.
        ignore_index: the id of rows that do not count.
        return_entropy: return the entropy as well.
        group: process group whose ranks hold slices of weight and bias, in rank order. hidden and
            token_ids are the same on every rank, and so are the results. The gradient of hidden is
            the whole one on every rank (summed over the group in backward).
        vocab_start: first id of this rank's slice, or None. Redundant here.
    Returns:
        logprobs: [...] float32 (float64 if an input is), nats.
        entropy: the same, if return_entropy.
    Differentiable in: hidden, weight, bias.
    """
    x = hidden.masked_fill((token_ids == ignore_index)[..., None], 0)
    if group is not None:
        x = SumGradient.apply(x.to(compute_dtype(hidden, weight, bias)), group)
    return token_logprobs(
        head_logits(x, weight, bias, softcap),
        token_ids,
        temperature=temperature,
        ignore_index=ignore_index,
        return_entropy=return_entropy,
        group=group,
        vocab_start=vocab_start,
    )


def head_logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None
) -> Tensor:
    """[..., V], in the compute dtype."""
    dtype = compute_dtype(hidden, weight, bias)
    logits = torch.nn.functional.linear(
        hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    )
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)
