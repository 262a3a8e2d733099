"""Sampling: checks, the draw as fastrl.reference defines it, log-probs of our token_logprobs."""

import torch
from torch import Tensor

from fastrl import reference
from fastrl.ops import _checks
from fastrl.ops.token_logprobs import token_logprobs
from fastrl.reference.sample_tokens import draw_tokens, kept_ids

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


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
    token_ids, is_kept = draw_tokens(logits, temperature, top_k, top_p, seeds, step)
    kept = kept_ids(is_kept) if return_kept else None
    logprobs = token_logprobs(logits, token_ids, temperature=temperature or 1.0, kept=kept)
    assert isinstance(logprobs, Tensor)
    return (token_ids, logprobs) if kept is None else (token_ids, logprobs, kept)


sample_tokens.__doc__ = reference.sample_tokens.__doc__


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
    _checks.tensor(op, "logits", logits, _DTYPES, remedy)
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
