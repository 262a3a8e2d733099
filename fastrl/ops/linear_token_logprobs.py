"""Log-probabilities and entropy from hidden states, exact for p -> 1, with no logits kept."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastrl import _vocabulary, reference
from fastrl.ops import _binary, _checks, _frozen_head, _linear_slices, _sharded
from fastrl.ops._autocast import autocast
from fastrl.ops._typed import typed_as
from fastrl.ops.token_logprobs import check_ids

# A bare full_tensor() would drop what the other ranks' rows add to the gradient of a rank's slice.
_WHOLE = (
    "Under FSDP call it in the forward of the module that holds the head, where the head is whole, "
    "or use {0}.full_tensor(grad_placements=[Partial('avg')]); for a cut vocabulary "
    "{0}.to_local() and group."
)

_fwd = _binary.op("linear_token_logprobs_fwd")
_frozen = _binary.op("linear_token_logprobs_frozen")
_bwd = _binary.op("linear_token_logprobs_bwd")


@typed_as(reference.linear_token_logprobs)
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
    """`token_logprobs` of the logits that a language model's head would give, never held whole.

        logits = hidden weight^T + bias
        logits = softcap tanh(logits / softcap)          if softcap is given

    The vocabulary is cut into slices: a product of the vendor's library (oneDNN or MKL, cuBLAS),
    then our one pass over the slice while the cache has it. The backward pass computes each slice
    again and finishes its part of the weight's gradient, in float32: four products where eager
    PyTorch takes three, with megabytes where it takes gigabytes. Where the loss is a sum over
    tokens, `linear_token_loss` needs three as well; take this one where the loss mixes tokens,
    where log-probs go to several losses, or to score without gradients. Where hidden alone requires
    grad, as with a frozen head behind LoRA adapters, both take two: the gradient forms in the
    forward pass, and the backward pass scales it (here an entropy that is differentiated costs two
    more; with group, and under vmap, slices are computed again).

    Logits are float32 whatever the dtype of the inputs, so that log-prob, entropy and their
    gradients in the logits are as exact as those of `token_logprobs`. The same inputs give the same
    bits. But the products are the vendor's, and a row of theirs may depend on how many rows there
    are: in float32 by about 1e-6 of the logits' size.

    Args:
        hidden: [..., D] float32, bfloat16 or float16.
        weight: [V, D], of these dtypes. Under autocast hidden, weight and bias are cast to its
            dtype, as torch.nn.functional.linear does. Under FSDP it is a plain tensor inside the
            forward of the module that holds the head; DDP too averages gradients only of what ran
            inside the forward of the module that it wraps. A head with a LoRA adapter is more than
            its weight: merge it, or call the head and take `token_logprobs`.
        token_ids: [...] int64; ignore_index and ids outside [0, V) as in `token_logprobs`. Ignored
            rows are neither computed nor stored, and their hidden states may hold anything. (On a
            GPU they take part in the products, as zeros: who counts them would have to wait for
            it. `PackedBatch` has none.)
        bias: [V].
        temperature: > 0 and at most 1e37, divides the logits after softcap. A model that scales its
            logits by s (logit_scale, 1 / logits_scaling) is one at temperature / s and softcap / s.
        softcap: > 0, bound of the logits' absolute value.
        ignore_index: the id of rows that do not count.
        return_entropy: return the entropy as well.
        group: process group whose ranks hold slices of weight and bias, in rank order, of any
            sizes. hidden and token_ids are the same on every rank, and so are the results, bit for
            bit; an id outside of all slices gives NaN. The gradient of hidden is the whole one on
            every rank (summed in backward).
        vocab_start: first id of this rank's slice; None finds it out, which takes a round of
            messages and synchronises.
    Returns:
        logprobs: [...] float32, nats.
        entropy: [...] float32, nats, if return_entropy.
    Raises:
        ValueError: shapes disagree, temperature or softcap is not positive; on eager CPU tensors
            also an id outside [0, V) that is not ignore_index. Elsewhere such an id gives NaN.
        TypeError: another dtype (float64: fastrl.reference.linear_token_logprobs).
        NotImplementedError: a device without a kernel.
    Differentiable in: hidden, weight, bias; what needs no gradient costs no product.
    """
    op = "linear_token_logprobs"
    least = 1 if group is None else 0  # a rank's slice of the vocabulary may be empty
    check_head(op, hidden, weight, token_ids, bias, temperature, softcap, ignore_index, least)
    _sharded.check(op, group, vocab_start)
    if group is None:
        check_ids(op, token_ids, weight.shape[0], ignore_index)
    leading = token_ids.shape
    hidden, weight, bias = autocast(hidden, weight, bias)
    hidden = hidden.reshape(-1, hidden.shape[-1])
    token_ids = token_ids.reshape(-1).contiguous()  # a flat view of a column is strided
    if group is not None:
        logprobs, entropy = _sharded.linear_token_logprobs(
            hidden, weight, token_ids, bias, temperature, softcap, ignore_index, return_entropy,
            group=group, vocab_start=vocab_start,
        )  # fmt: skip
    else:
        forward = _frozen if _learns_hidden_alone(hidden, weight, bias) else _fwd
        logprobs, entropy, *_ = forward(
            hidden, weight, token_ids, bias, temperature, softcap, ignore_index, return_entropy
        )
    logprobs = logprobs.reshape(leading)
    return (logprobs, entropy.reshape(leading)) if return_entropy else logprobs


def _learns_hidden_alone(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    if not torch.is_grad_enabled() or _binary.is_transformed():
        return False
    return hidden.requires_grad and not any(
        x is not None and x.requires_grad for x in (weight, bias)
    )


def check_head(
    op: str,
    hidden: Any,
    weight: Any,
    token_ids: Any,
    bias: Any,
    temperature: Any,
    softcap: Any,
    ignore_index: Any,
    least_vocab: int = 1,
) -> None:
    remedy = f"Use fastrl.reference.{op} for float64; cast other dtypes."
    _checks.tensor(op, "hidden", hidden, _checks.FLOATS_TO_32, remedy)
    _checks.tensor(op, "weight", weight, _checks.FLOATS_TO_32, remedy)
    _checks.undistributed(op, "hidden", hidden, "Use {0}.full_tensor().")
    for name, x in (("weight", weight), ("bias", bias)):
        _checks.undistributed(op, name, x, _WHOLE)
    _checks.tensor(op, "token_ids", token_ids, (torch.int64,), "Use token_ids.long().")
    if weight.dim() != 2 or weight.shape[0] < least_vocab or weight.shape[1] == 0:
        expected = "weight [V, D], V >= 1 and D >= 1"
        raise _checks.fail(op, expected, _checks.shape(weight), "Pass the head's.")
    if hidden.dim() == 0 or hidden.shape[-1] != weight.shape[1]:
        raise _checks.fail(
            op, f"hidden [..., {weight.shape[1]}] like the rows of weight", _checks.shape(hidden),
            "Pass the states that the head takes.",
        )  # fmt: skip
    if token_ids.shape != hidden.shape[:-1]:
        raise _checks.fail(
            op, f"token_ids {tuple(hidden.shape[:-1])} like the leading axes of hidden",
            _checks.shape(token_ids), "Pass one id per row of hidden.",
        )  # fmt: skip
    _checks.same_device(op, "weight", weight, "hidden", hidden)
    _checks.same_device(op, "token_ids", token_ids, "hidden", hidden)
    if bias is not None:
        _checks.tensor(op, "bias", bias, _checks.FLOATS_TO_32, remedy)
        if bias.shape != weight.shape[:1]:
            raise _checks.fail(
                op, f"bias [{weight.shape[0]}]", _checks.shape(bias), "Pass one number per token."
            )
        _checks.same_device(op, "bias", bias, "hidden", hidden)
    _checks.temperature(op, temperature)
    if softcap is not None:
        _checks.positive(op, "softcap", softcap, "None is no cap.")
    _checks.index(op, "ignore_index", ignore_index)
    _checks.implemented(op, hidden)


def _fwd_fake(
    hidden: Tensor, weight: Tensor, token_ids: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """logprobs, entropy, row max, log total: [N] float32 each."""
    rows = token_ids.new_empty(token_ids.shape, dtype=torch.float32)
    entropy = torch.empty_like(rows) if rest[-1] else rows.new_empty(0)
    return rows, entropy, torch.empty_like(rows), torch.empty_like(rows)


def _frozen_fake(hidden: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    """The same, and d logp / d hidden."""
    return *_fwd_fake(hidden, *rest), hidden.new_empty(hidden.shape, dtype=torch.float32)


def _bwd_fake(
    g: Any, h: Any, hidden: Tensor, weight: Tensor, token_ids: Tensor, bias: Any, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    none = hidden.new_empty(0)
    needs_hidden, needs_weight, needs_bias = rest[-3:]
    return (
        hidden.new_empty(hidden.shape, dtype=torch.float32) if needs_hidden else none,
        weight.new_empty(weight.shape) if needs_weight else none.clone(),
        torch.empty_like(bias) if needs_bias else none.clone(),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, token_ids, bias, *ctx.numbers, return_entropy = inputs
    logprobs, entropy, row_max, log_total = output
    saved = (logprobs, entropy if return_entropy else None, row_max, log_total)
    ctx.save_for_backward(hidden, weight, token_ids, bias, *saved)
    ctx.mark_non_differentiable(row_max, log_total)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None, *_: Any) -> Any:
    hidden, weight, token_ids, bias, logprobs, entropy, row_max, log_total = ctx.saved_tensors
    needs = (ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[3])
    g = None if grad_logprobs is None else grad_logprobs.contiguous()
    h = None if grad_entropy is None or entropy is None else grad_entropy.contiguous()
    if g is None and h is None:
        return (None,) * 8
    grads = _bwd(
        g, h, hidden, weight, token_ids, bias, logprobs, entropy, row_max, log_total, *ctx.numbers,
        0, *needs,
    )  # fmt: skip
    given = [x if needed else None for x, needed in zip(grads, needs, strict=True)]
    grad_hidden, grad_weight, grad_bias = given
    if grad_hidden is not None:
        grad_hidden = grad_hidden.to(hidden.dtype)
    return grad_hidden, grad_weight, None, grad_bias, *(None,) * 4


def _state_fake(hidden: Tensor, weight: Tensor, token_ids: Tensor, *_: Any) -> Tensor:
    return hidden.new_empty((token_ids.numel(), _vocabulary.SIZE), dtype=torch.float64)


_binary.register_fake("linear_token_logprobs_state", _state_fake)
_binary.register_torch(_linear_slices.linear_token_logprobs_state)
_binary.register_torch(_linear_slices.linear_token_logprobs_fwd)
_binary.register_torch(_linear_slices.linear_token_logprobs_bwd)
_binary.register_torch(_frozen_head.linear_token_logprobs_frozen)
_binary.register_fake("linear_token_logprobs_frozen", _frozen_fake)
_binary.register_fake("linear_token_logprobs_fwd", _fwd_fake)
_binary.register_fake("linear_token_logprobs_bwd", _bwd_fake)
_binary.register_autograd("linear_token_logprobs_fwd", _backward, setup_context=_setup_context)
_binary.register_autograd(
    "linear_token_logprobs_frozen", _frozen_head.backward, setup_context=_frozen_head.setup_context
)
_binary.differentiable_once("linear_token_logprobs_bwd")
