"""A per-token loss of log-probabilities, from hidden states."""

from collections.abc import Callable

from torch import Tensor

from fastrl.reference.linear_token_logprobs import linear_token_logprobs


def linear_token_loss(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    loss_fn: Callable[[Tensor, Tensor, Tensor], Tensor],
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
) -> tuple[Tensor, Tensor, Tensor]:
    """Sum of a per-token loss over the rows that count.

        loss = sum_i loss_fn(logprobs, entropy, rows)_i

    loss_fn gets logprobs [n], entropy [n] and rows [n] int64, the indices of its tokens in
    token_ids.flatten(): index with them whatever else the loss needs. It returns [n], entry i a
    function of logprobs[i] and entropy[i] alone. It may be called several times, on parts of the
    rows; rows whose token id is ignore_index are never passed. Divide inside it for a mean.

    Args:
        hidden, weight, token_ids, bias, temperature, softcap, ignore_index: as in
            `linear_token_logprobs`.
        loss_fn: see above.
    Returns:
        loss: scalar float32 (float64 if an input is).
        logprobs: [...], detached, nats; 0 in ignored rows.
        entropy: [...], detached, nats; 0 in ignored rows.
    Raises:
        ValueError (the op alone): loss_fn closes over a tensor that requires grad, or mixes tokens.
    Differentiable in: hidden, weight, bias.
    """
    logprobs, entropy = linear_token_logprobs(
        hidden,
        weight,
        token_ids,
        bias=bias,
        temperature=temperature,
        softcap=softcap,
        ignore_index=ignore_index,
        return_entropy=True,
    )
    rows = (token_ids.flatten() != ignore_index).nonzero().squeeze(-1)
    if rows.numel() == 0:
        loss = logprobs.sum()  # 0, with gradients of 0
    else:
        loss = loss_fn(logprobs.flatten()[rows], entropy.flatten()[rows], rows).sum()
    return loss, logprobs.detach(), entropy.detach()
