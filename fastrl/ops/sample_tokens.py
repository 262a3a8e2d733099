"""Sampling without a sort: one pass over the logits and a look at where u falls."""

import torch
from torch import Tensor, library

from fastrl import reference
from fastrl.ops import _binary, _checks
from fastrl.ops._typed import typed_as
from fastrl.ops.token_logprobs import token_logprobs

_sample = _binary.op("sample_tokens", differentiable=0)
_kept_ids = _binary.op("kept_ids", differentiable=0)


@typed_as(reference.sample_tokens)
@torch.no_grad()
def sample_tokens(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seeds: Tensor | None = None,
    step: int = 0,
    return_kept: bool = False,
) -> tuple[Tensor, Tensor] | tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    _check(logits, temperature, top_k, top_p, seeds, step)
    leading = logits.shape[:-1]
    if logits.stride(-1) != 1:  # contiguous() would leave a tensor without rows as it is
        logits = logits.clone(memory_format=torch.contiguous_format)
    if seeds is None and temperature == 0:
        seeds = torch.zeros(leading, dtype=torch.int64, device=logits.device)
    elif seeds is None:  # drawn as fastrl.reference draws them: the same tokens
        seeds = torch.randint(-(2**63), 2**63 - 1, (leading.numel(),), device=logits.device)
        seeds = seeds.reshape(leading)
    if top_k is not None:
        top_k = min(top_k, logits.shape[-1])
    signed_step = step - 2**64 if step >= 2**63 else step
    token_ids, logprobs, lowest, last_id = _sample(
        logits, seeds.contiguous(), signed_step, temperature, top_k, top_p
    )
    if not return_kept:
        return token_ids, logprobs
    kept = _kept_ids(logits, lowest, last_id)
    logprobs = token_logprobs(logits, token_ids, temperature=temperature or 1.0, kept=kept)
    return token_ids, logprobs, kept


sample_tokens.__doc__ = f"""{reference.sample_tokens.__doc__}
    Exact here: the log-probabilities are those of fastrl.token_logprobs, bit for bit, and ids are
    kept by their logits, of equals the lowest ids. Cumulative probabilities are good to about 1e-7:
    a draw differs from the reference's where u lies that close to the boundary of two ids, and so
    does the last id that top_p keeps. What is too small beside the row's largest probability counts
    as 0 in a draw: below 2^-127 on a CPU, below 2^-40 on a GPU, which adds in fixed point. A row
    with NaN, or without a finite logit, gives an id of the vocabulary and keeps none. A row's
    result depends neither on the rest of the batch nor on the number of threads.
    Nothing waits for a GPU, but for return_kept: how many ids there are, the host must know. So it
    cannot be captured in a CUDA graph, and neither can torch.compile trace it whole.
    Raises:
        ValueError: shapes disagree, or a number is out of its range.
        TypeError: another dtype (float64: fastrl.reference.sample_tokens).
        NotImplementedError: a device without a kernel.
    """


def _check(
    logits: Tensor,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    seeds: Tensor | None,
    step: int,
) -> None:
    op = "sample_tokens"
    remedy = "Use fastrl.reference.sample_tokens for float64; cast other dtypes."
    _checks.tensor(op, "logits", logits, _checks.FLOATS_TO_32, remedy)
    if logits.dim() == 0 or logits.shape[-1] == 0:
        raise _checks.fail(op, "logits [..., V], V >= 1", _checks.shape(logits), "Pass logits.")
    _checks.number(op, "temperature", temperature, 0.0, 1e30, "0 is greedy.")
    if top_k is not None:
        _checks.whole(op, "top_k", top_k, 1)
    if top_p is not None:
        _checks.number(op, "top_p", top_p, 0.0, 1.0, "It is a probability.")
        if top_p == 0:
            raise _checks.fail(op, "top_p > 0", top_p, "temperature=0 is greedy.")
    _checks.whole(op, "step", step, 0)
    if step >= 2**64:
        raise _checks.fail(op, "step < 2^64", step, "Count from 0.")
    if seeds is not None:
        _checks.tensor(op, "seeds", seeds, (torch.int64,), "Use seeds.long().")
        if seeds.shape != logits.shape[:-1]:
            raise _checks.fail(
                op,
                f"seeds {tuple(logits.shape[:-1])}",
                _checks.shape(seeds),
                "Pass one seed per row.",
            )
        _checks.same_device(op, "seeds", seeds, "logits", logits)
    _checks.implemented(op, logits)


def _fake(logits: Tensor, seeds: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """token_ids int64, logprobs float32, lowest float32, last_id int64: [...] each."""
    logprobs = logits.new_empty(seeds.shape, dtype=torch.float32)
    token_ids = seeds.new_empty(seeds.shape)
    return token_ids, logprobs, torch.empty_like(logprobs), torch.empty_like(token_ids)


def _kept_ids_fake(logits: Tensor, lowest: Tensor, last_id: Tensor) -> tuple[Tensor, Tensor]:
    """ids int64 [K], cu_seqlens int32 [rows + 1]; the values decide K."""
    ids = last_id.new_empty(library.get_ctx().new_dynamic_size())
    return ids, last_id.new_empty(last_id.numel() + 1, dtype=torch.int32)


_binary.register_fake("sample_tokens", _fake)
_binary.register_fake("kept_ids", _kept_ids_fake)
_binary.register_triton("sample_tokens", "sample_tokens", "kept_ids")
