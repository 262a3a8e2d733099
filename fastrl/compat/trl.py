"""TRL's log-probabilities and entropy, by its names: what its trainers and scripts call.

Signatures, shapes and result dtypes are those of TRL 1.16; everything is computed in float32 (in
float64 for float64 inputs). `fastrl.ops` does the work, on the tensors' own device. It has no
float64: those inputs go to `fastrl.reference`, which is the definition and not fast.
"""

from typing import Any

import torch
from torch import Tensor

from fastrl import ops, reference
from fastrl.compat._several import several_token_logprobs
from fastrl.ops import _checks

OPTIONAL_OUTPUTS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
_STATISTICS = OPTIONAL_OUTPUTS[1:]
# -100 in TRL's index is an error and not a row that does not count: this marks the masked rows.
_MASKED = torch.iinfo(torch.int64).min


def selective_log_softmax(
    logits: Tensor, index: Tensor, temperature: float = 1.0, row_mask: Tensor | None = None
) -> Tensor:
    """Log-probability of one token per row, or of K tokens, as `trl.trainer.utils` has it.

        log p_k = x_k - log sum_j exp(x_j),    x = logits / temperature

    One id per row is `fastrl.token_logprobs`. K ids cost one pass over the logits as well: the
    likeliest of them goes through it, the others follow by their distance from it, which is not
    positive either. So nothing cancels, and each of the K keeps its digits up to p = 1 - 1e-7.

    Args:
        logits: [..., V] float32, bfloat16, float16, or float64 (by fastrl.reference).
        index: [...] or [..., K] int64 or int32, ids in [0, V).
        temperature: > 0.
        row_mask: like index, bool or integer; where it is 0 the result is 0, without gradient. With
            one id per row, the logits there are not read.
    Returns:
        logprobs: like index, nats. Their dtype is TRL's: that of logits, but float32 for one id per
            row on a GPU.
    Raises:
        ValueError: shapes disagree, temperature is not positive, or (eager, CPU) an id is not in
            [0, V). On a GPU such an id gives NaN where there is one per row.
        TypeError: a dtype that is not listed.
        NotImplementedError: a device without a kernel.
    Differentiable in: logits.
    Unlike TRL's: computed in float32 and rounded once; no rows give an empty result, not an error;
    masked rows with NaN or infinite logits give 0, also in the gradient (one id per row).
    """
    return _selected("selective_log_softmax", logits, index, temperature, row_mask)[0]


def entropy_from_logits(logits: Tensor, chunk_size: int = 128) -> Tensor:
    """Entropy of each row's softmax in nats, as `trl.trainer.utils` has it.

        entropy = -sum_j p_j log p_j,    0 log 0 = 0

    Args:
        logits: [..., V] float32, bfloat16, float16, or float64 (by fastrl.reference).
        chunk_size: no effect; one pass needs no chunks.
    Returns:
        entropy: [...], in TRL's dtype: that of logits, but float32 on a GPU.
    Raises:
        ValueError: no vocabulary.  TypeError: another dtype.
        NotImplementedError: a device without a kernel.
    Differentiable in: logits.
    Unlike TRL's: computed in float32 and rounded once; -inf logits count as p = 0, not as NaN.
    """
    _check_logits("entropy_from_logits", logits)
    ids = torch.zeros(logits.shape[:-1], dtype=torch.int64, device=logits.device)
    _, entropy = _namespace(logits).token_logprobs(logits, ids, return_entropy=True)
    return entropy.to(_result_dtype(logits, one_id=True))


def selective_log_softmax_and_entropy(
    logits: Tensor,
    index: Tensor,
    entropy_requires_grad: bool = True,
    temperature: float = 1.0,
    row_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`selective_log_softmax` and the entropy of the same distributions, from one pass.

        log p_k = x_k - log sum_j exp(x_j),    entropy = -sum_j p_j log p_j,    x = logits / T

    Args:
        logits: [..., V] float32, bfloat16, float16, or float64 (by fastrl.reference).
        index: [...] or [..., K] int64 or int32, ids in [0, V).
        entropy_requires_grad: False detaches the entropy.
        temperature: T > 0.
        row_mask: [...], with one id per row only; where it is 0 both are 0, without gradient.
    Returns:
        logprobs: like index, nats; entropy: [...], nats. Dtypes as in `selective_log_softmax`.
    Raises:
        As `selective_log_softmax`; ValueError also for a row_mask with K ids per row.
    Differentiable in: logits.
    """
    op = "selective_log_softmax_and_entropy"
    if row_mask is not None and index.ndim == logits.ndim:
        raise _checks.fail(
            op, f"index {tuple(logits.shape[:-1])} with row_mask", _checks.shape(index),
            "Mask the result instead: one entropy per row has no mask per id.",
        )  # fmt: skip
    logprobs, entropy = _selected(op, logits, index, temperature, row_mask, return_entropy=True)
    assert entropy is not None
    return logprobs, entropy if entropy_requires_grad else entropy.detach()


class ChunkedLogProbFunction:
    """`trl.kernels.ChunkedLogProbFunction`: log-probabilities and statistics from hidden states.

    TRL's trainers call `apply` for every log-probability they need. It is `fastrl.token_stats` and
    `fastrl.linear_token_logprobs` here, and no `torch.autograd.Function` of its own.
    """

    @staticmethod
    def apply(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_size: int,
        final_logit_softcapping: float | None = None,
        logit_scale: float = 1.0,
        outputs: tuple[str, ...] = OPTIONAL_OUTPUTS,
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """Log-probability of each row's target, and what else `outputs` names.

            z = c tanh(s (hidden weight^T + bias) / c) / T,    without softcapping z = s (...) / T
            log p_y = z_y - log sum_j exp(z_j)

        Args:
            hidden: [N, D] float32, bfloat16, float16, or float64 (by fastrl.reference). Under
                autocast its dtype is used, else that of hidden, for weight and bias too.
            weight: [V, D].
            bias: [V] or None.
            targets: [N] int64, ids in [0, V).
            temperature: T > 0.
            chunk_size: no effect: the op chooses its own tiles.
            final_logit_softcapping: c > 0, or None.
            logit_scale: s, any number.
            outputs: of "entropy", "log_sum_sq_probs", "mean_logits" and "is_top1"; "log_probs" is
                always computed and may be named.
        Returns:
            (logprobs, entropy, log_sum_sq_probs, mean_logits, is_top1), [N] each: float32 (also for
            float64 inputs) and bool; None for what `outputs` does not name. The last three have no
            gradient. mean_logits is the mean of z; is_top1: no id has a larger z, and no lower id
            the same.
        Raises:
            ValueError: an unknown output; shapes disagree; T or c is not positive; (eager, CPU) an
                id is not in [0, V).
            TypeError: another dtype.
            NotImplementedError: a device without a kernel; a weight that DeepSpeed ZeRO-3 has
                sharded, which only TRL's own gathers again in its backward pass.
        Differentiable in: hidden, weight, bias; logprobs and entropy only.
        Unlike TRL's: under autocast the gradients are rounded once to its dtype before they reach
        float32 parameters, as those of a linear layer are; TRL hands them over in float32.
        """
        op = "ChunkedLogProbFunction"
        if unknown := set(outputs) - {"log_probs", *OPTIONAL_OUTPUTS}:
            listed = ", ".join(OPTIONAL_OUTPUTS)
            raise _checks.fail(op, f"outputs of {listed}", sorted(unknown), "Leave it out.")
        if hasattr(weight, "ds_status"):
            raise NotImplementedError(
                f"{op}: expected a whole weight, got one that DeepSpeed ZeRO-3 shards. "
                "Use ZeRO-2 or FSDP, or TRL without patch_trl."
            )
        device = hidden.device.type
        dtype = hidden.dtype
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        # c tanh(s z / c) / T is that of softcap c / s and temperature T / s: no product is rounded.
        if logit_scale <= 0:
            sign = 0.0 if logit_scale == 0 else -1.0
            hidden, bias = sign * hidden, None if bias is None else sign * bias
        scale = abs(logit_scale) or 1.0
        softcap = None if final_logit_softcapping is None else final_logit_softcapping / scale
        arguments: dict[str, Any] = {
            "hidden": hidden.to(dtype),
            "weight": weight.to(dtype),
            "token_ids": targets,
            "bias": None if bias is None else bias.to(dtype),
            "temperature": temperature / scale,
            "softcap": softcap,
            "ignore_index": _MASKED,
        }
        with torch.autocast(device, enabled=False):
            return _linear(arguments, outputs)


def _linear(arguments: dict[str, Any], outputs: tuple[str, ...]) -> Any:
    namespace = _namespace(arguments["hidden"])
    tensors = [x for x in arguments.values() if isinstance(x, Tensor)]
    learns = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    found: dict[str, Tensor | None] = {}
    if any(name in outputs for name in _STATISTICS):
        with torch.no_grad():
            found = namespace.token_stats(**arguments)._asdict()
    if learns or not found:
        wants_entropy = "entropy" in outputs
        result = namespace.linear_token_logprobs(**arguments, return_entropy=wants_entropy)
        logprobs, entropy = result if wants_entropy else (result, None)
        found |= {"logprobs": logprobs, "entropy": entropy}
    asked = (found[name] if name in outputs else None for name in OPTIONAL_OUTPUTS)
    everything = (found["logprobs"], *asked)
    # float32 as TRL's are, also where the reference has computed in float64.
    return tuple(x.float() if x is not None and x.is_floating_point() else x for x in everything)


def _selected(
    op: str,
    logits: Tensor,
    index: Tensor,
    temperature: float,
    row_mask: Tensor | None,
    return_entropy: bool = False,
) -> tuple[Tensor, Tensor | None]:
    _check_logits(op, logits)
    one_id = _check_index(op, logits, index, row_mask)
    _checks.positive(op, "temperature", temperature, "1 leaves the logits as they are.")
    options: dict[str, Any] = {"temperature": temperature, "return_entropy": return_entropy}
    index, token_logprobs = index.long(), _namespace(logits).token_logprobs
    if not one_id:
        result = several_token_logprobs(token_logprobs, logits, index, **options)
    elif row_mask is None:
        result = token_logprobs(logits, index, ignore_index=_MASKED, **options)
    else:
        index = index.masked_fill(row_mask == 0, _MASKED)
        result = token_logprobs(logits, index, ignore_index=_MASKED, **options)
    logprobs, entropy = result if return_entropy else (result, None)
    if row_mask is not None and not one_id:
        logprobs = logprobs.masked_fill(row_mask == 0, 0)
    dtype = _result_dtype(logits, one_id)
    return logprobs.to(dtype), None if entropy is None else entropy.to(dtype)


def _namespace(x: Tensor) -> Any:
    return reference if x.dtype == torch.float64 else ops


def _result_dtype(logits: Tensor, one_id: bool) -> torch.dtype:
    """TRL's Triton kernels, which take one id per row, give float32; its PyTorch rounds."""
    by_triton = one_id and logits.device.type == "cuda" and logits.dtype != torch.float64
    return torch.float32 if by_triton else logits.dtype


def _check_logits(op: str, logits: Tensor) -> None:
    _checks.float_tensor(op, "logits", logits)
    if logits.dim() == 0 or logits.shape[-1] == 0:
        raise _checks.fail(op, "logits [..., V], V >= 1", _checks.shape(logits), "Pass logits.")


def _check_index(op: str, logits: Tensor, index: Tensor, row_mask: Tensor | None) -> bool:
    """Whether there is one id per row, and not K."""
    _checks.tensor(op, "index", index, (torch.int64, torch.int32), "Use index.long().")
    rows = logits.shape[:-1]
    one_id = index.shape == rows
    if not one_id and (
        index.dim() != logits.dim() or index.shape[:-1] != rows or not index.size(-1)
    ):
        raise _checks.fail(
            op, f"index {tuple(rows)} or {(*rows, 'K')}, K >= 1, for logits {tuple(logits.shape)}",
            _checks.shape(index), "Pass one id, or K, per row of logits.",
        )  # fmt: skip
    if row_mask is not None:
        remedy = "Pass one entry per entry of index."
        _checks.same_shape(op, "row_mask", row_mask, "index", index, remedy)
    return one_id
