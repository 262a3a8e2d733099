"""Log-probabilities and entropy of given tokens in one pass over the logits, exact for p -> 1."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastrl import _vocabulary, reference
from fastrl.ops import _binary, _checks, _sharded
from fastrl.ops._kept_logprobs import kept_logprobs
from fastrl.ops._typed import typed_as

_fwd = _binary.op("token_logprobs_fwd", differentiable=1)
_bwd = _binary.op("token_logprobs_bwd")
_bwd_inplace = _binary.op("token_logprobs_bwd_")


@typed_as(reference.token_logprobs)
def token_logprobs(
    logits: Tensor,
    token_ids: Tensor,
    *,
    temperature: float = 1.0,
    ignore_index: int = -100,
    return_entropy: bool = False,
    inplace_backward: bool = False,
    kept: tuple[Tensor, Tensor] | None = None,
    group: dist.ProcessGroup | None = None,
    vocab_start: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-probability of each row's token under softmax(logits / temperature), and the entropy.

        log p_y = (x_y - m) / T - log(total),    m = max_j x_j,  total = sum_j exp((x_j - m) / T)
        entropy = log(total) + sum_j p_j (m - x_j) / T

    The maximum stays out of the sum (log1p of the rest), so log-prob, entropy and gradient keep a
    relative error of 1e-5 up to p = 1 - 1e-7, where log_softmax in float32 has lost every digit.
    A row whose token id is ignore_index gives 0 for both and no gradient, whatever its logits are.
    Logits that are NaN, +inf, or -inf in all of a row give NaN for that row. A row's result depends
    neither on the rest of the batch nor on the number of threads.

    Args:
        logits: [..., V] float32, bfloat16 or float16; -inf excludes a token. Leading axes may have
            any strides; the vocabulary axis is copied if it is not dense, and on a GPU leading axes
            that do not fold into two.
        token_ids: [...] int64.
        temperature: T > 0, at most 1e37.
        ignore_index: the id of rows that do not count.
        return_entropy: return the entropy as well.
        inplace_backward: the backward pass writes the gradient over `logits`, which nothing may
            read afterwards: no memory beside it. Has no effect under torch.compile, which plans
            memory itself, and on rows that share memory (expand), whose gradients do not.
        kept: (ids int64 [K], cu_seqlens int32 [rows + 1]): row i is renormalised over the ids in
            ids[cu_seqlens[i]:cu_seqlens[i + 1]], in any order, each once. A token outside them has
            log-probability -inf. Only their logits are read; inplace_backward has no effect.
        group: process group whose ranks hold slices of the vocabulary, in rank order, of any sizes.
            token_ids are the same on every rank, and so are the results, bit for bit: six numbers a
            row are gathered. An id outside of all slices gives NaN; inplace_backward has no effect.
            Together with kept it is computed by fastrl.reference.
        vocab_start: first id of this rank's slice; None finds it out, which takes a round of
            messages and synchronises.
    Returns:
        logprobs: [...] float32, nats.
        entropy: [...] float32, nats, if return_entropy.
    Raises:
        ValueError: shapes disagree, or temperature is out of its range; on eager CPU tensors also
            an id outside [0, V) that is not ignore_index. Elsewhere such an id gives NaN: looking
            would synchronise.
        TypeError: another dtype (float64: fastrl.reference.token_logprobs).
        NotImplementedError: a device without a kernel.
    Differentiable in: logits.
    """
    _check(logits, token_ids, temperature, ignore_index, kept, group, vocab_start)
    if kept is not None and group is not None:
        return reference.token_logprobs(
            logits, token_ids, temperature=temperature, ignore_index=ignore_index,
            return_entropy=return_entropy, kept=kept, group=group, vocab_start=vocab_start,
        )  # fmt: skip
    if logits.stride(-1) != 1:  # contiguous() would leave a tensor without rows as it is
        logits = logits.clone(memory_format=torch.contiguous_format)
    if kept is not None:
        both = kept_logprobs(logits, token_ids, kept, temperature, ignore_index, return_entropy)
        return both if return_entropy else both[0]
    if group is not None:
        rows = logits.reshape(token_ids.numel(), logits.shape[-1])
        flat = rows, token_ids.reshape(-1).contiguous()
        outputs = _sharded.token_logprobs(
            *flat, temperature, ignore_index, return_entropy, group=group, vocab_start=vocab_start
        )
        logprobs, entropy = (x.reshape(token_ids.shape) for x in outputs)
        return (logprobs, entropy) if return_entropy else logprobs
    inplace = (
        inplace_backward
        and not torch.compiler.is_compiling()
        and not _binary.is_transformed()
        and not _overlaps(logits)
    )
    logprobs, entropy, _, _ = _fwd(
        logits, token_ids.contiguous(), temperature, ignore_index, return_entropy, inplace
    )
    return (logprobs, entropy) if return_entropy else logprobs


def _overlaps(x: Tensor) -> bool:
    """Whether two entries may be one number in memory."""
    reach = 0
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size > 1 and stride <= reach:
            return True
        reach += max(size - 1, 0) * stride
    return False


def _check(
    logits: Tensor,
    token_ids: Tensor,
    temperature: float,
    ignore_index: int,
    kept: Any,
    group: Any,
    vocab_start: int | None,
) -> None:
    op = "token_logprobs"
    remedy = "Use fastrl.reference.token_logprobs for float64; cast other dtypes."
    _checks.tensor(op, "logits", logits, _checks.FLOATS_TO_32, remedy)
    remedy = "Use {0}.full_tensor(), or {0}.to_local() and group for a cut vocabulary."
    _checks.undistributed(op, "logits", logits, remedy)
    _checks.tensor(op, "token_ids", token_ids, (torch.int64,), "Use token_ids.long().")
    if logits.dim() == 0 or (logits.shape[-1] == 0 and group is None):
        raise _checks.fail(op, "logits [..., V], V >= 1", _checks.shape(logits), "Pass logits.")
    if token_ids.shape != logits.shape[:-1]:
        raise _checks.fail(
            op,
            f"token_ids {tuple(logits.shape[:-1])} like the leading axes of logits",
            _checks.shape(token_ids),
            "Pass one id per row of logits.",
        )
    _checks.same_device(op, "token_ids", token_ids, "logits", logits)
    _checks.temperature(op, temperature)
    _checks.index(op, "ignore_index", ignore_index)
    _sharded.check(op, group, vocab_start)
    if kept is not None:
        _check_kept(op, kept, logits, None if group is not None else logits.shape[-1])
    _checks.implemented(op, logits)
    if group is None:
        check_ids(op, token_ids, logits.shape[-1], ignore_index)


def check_ids(op: str, token_ids: Tensor, vocab: int, ignore_index: int) -> None:
    if _checks.entry_outside(token_ids, 0, vocab - 1) is None:
        return
    wrong = ((token_ids < 0) | (token_ids >= vocab)) & (token_ids != ignore_index)
    if bool(wrong.any()):
        raise _checks.fail(
            op,
            f"token_ids in [0, {vocab}) or ignore_index = {ignore_index}",
            int(token_ids[wrong][0]),
            "Mark tokens that do not count with ignore_index.",
        )


def _check_kept(op: str, kept: Any, logits: Tensor, vocab: int | None) -> None:
    """vocab: None where a rank's slice does not tell how large the vocabulary is."""
    if not isinstance(kept, tuple) or len(kept) != 2:
        raise _checks.wrong_type(
            op, "kept as (ids, cu_seqlens)", type(kept).__name__, "sample_tokens returns it so."
        )
    ids, bounds = kept
    _checks.tensor(op, "kept ids", ids, (torch.int64,), "Use ids.long().")
    _checks.same_device(op, "kept ids", ids, "logits", logits)
    if ids.dim() != 1:
        raise _checks.fail(op, "kept ids [K]", _checks.shape(ids), "sample_tokens returns it so.")
    _checks.cu_seqlens(op, bounds, ids.numel(), logits, like="logits")
    rows = logits.shape[:-1].numel()
    if bounds.numel() != rows + 1:
        raise _checks.fail(
            op, f"kept cu_seqlens [{rows + 1}]", _checks.shape(bounds), "Pass one set per row."
        )
    if vocab is not None and (got := _checks.entry_outside(ids, 0, vocab - 1)) is not None:
        raise _checks.fail(op, f"kept ids in [0, {vocab})", got, "Pass ids of the vocabulary.")


def _fwd_fake(
    logits: Tensor,
    token_ids: Tensor,
    temperature: float,
    ignore_index: int,
    return_entropy: bool,
    inplace_backward: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """logprobs, entropy, row max, log total: [...] float32 each."""
    rows = token_ids.new_empty(token_ids.shape, dtype=torch.float32)
    entropy = torch.empty_like(rows) if return_entropy else rows.new_empty(0)
    return rows, entropy, torch.empty_like(rows), torch.empty_like(rows)


def _bwd_fake(grad_logprobs: Any, grad_entropy: Any, logits: Tensor, *_: Any) -> Tensor:
    return logits.new_empty(logits.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, token_ids, *ctx.numbers, return_entropy, ctx.inplace = inputs
    logprobs, entropy, row_max, log_total = output
    saved_entropy = entropy if return_entropy else None
    ctx.save_for_backward(logits, token_ids, logprobs, saved_entropy, row_max, log_total)
    ctx.mark_non_differentiable(row_max, log_total)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None, *_: Any) -> Any:
    logits, token_ids, logprobs, entropy, row_max, log_total = ctx.saved_tensors
    g = None if grad_logprobs is None else grad_logprobs.contiguous()
    h = None if grad_entropy is None or entropy is None else grad_entropy.contiguous()
    if g is None and h is None:
        return (None,) * 6
    saved = (g, h, logits, token_ids, logprobs, entropy, row_max, log_total, *ctx.numbers)
    if ctx.inplace and not torch.is_grad_enabled():  # with create_graph the other: it can refuse
        _bwd_inplace(*saved, 0)
        # So that autograd refuses, loudly, to use the logits as logits again.
        torch.autograd.graph.increment_version(logits)
        return logits, *(None,) * 5
    return _bwd(*saved, 0), *(None,) * 5


def _state_fake(logits: Tensor, token_ids: Tensor, *_: Any) -> Tensor:
    return logits.new_empty((token_ids.numel(), _vocabulary.SIZE), dtype=torch.float64)


_binary.register_fake("token_logprobs_state", _state_fake)
_binary.register_fake("token_logprobs_fwd", _fwd_fake)
_binary.register_fake("token_logprobs_bwd", _bwd_fake)
_binary.register_fake("token_logprobs_bwd_", lambda *_: None)
_binary.register_autograd("token_logprobs_fwd", _backward, setup_context=_setup_context)
_binary.differentiable_once("token_logprobs_bwd")
_binary.register_triton(
    "token_logprobs",
    "token_logprobs_fwd",
    "token_logprobs_bwd",
    "token_logprobs_bwd_",
    "token_logprobs_state",
)
