"""A vocabulary cut over the ranks of a process group (tensor parallelism).

Each rank sums its own slice with a shard-local op; the states, six numbers a row, are gathered once
and merged in rank order, so that every rank gets the same bits. Process groups stay here, in
Python, around ops that know nothing of them.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastrl import _vocabulary
from fastrl.ops import _binary, _checks

_state = _binary.op("token_logprobs_state")
_bwd = _binary.op("token_logprobs_bwd")
_linear_state = _binary.op("linear_token_logprobs_state")
_linear_bwd = _binary.op("linear_token_logprobs_bwd")


def check(op: str, group: Any, vocab_start: Any) -> None:
    if vocab_start is not None and group is None:
        raise _checks.fail(op, "group with vocab_start", "None", "Pass the process group.")
    if vocab_start is not None:
        _checks.whole(op, "vocab_start", vocab_start, 0)


def token_logprobs(
    logits: Tensor, *options: Any, group: dist.ProcessGroup, vocab_start: int | None
) -> tuple[Tensor, Tensor]:
    """logprobs and entropy [N] from logits [N, V of this rank]; options: as `_TokenLogprobs`."""
    return _apply(_TokenLogprobs, logits.shape[-1], logits, *options, group, vocab_start)


def linear_token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    *options: Any,
    group: dist.ProcessGroup,
    vocab_start: int | None,
) -> tuple[Tensor, Tensor]:
    """logprobs and entropy [N] from hidden [N, D] and this rank's weight; options: as
    `_LinearTokenLogprobs`."""
    width = weight.shape[0]
    return _apply(_LinearTokenLogprobs, width, hidden, weight, *options, group, vocab_start)


def _apply(function: Any, width: int, *inputs: Any) -> tuple[Tensor, Tensor]:
    if torch.compiler.is_compiling():
        from fastrl.ops import _out_of_graphs

        return _out_of_graphs.call(_apply_here, function, width, *inputs)
    return _apply_here(function, width, *inputs)


def _apply_here(function: Any, width: int, *inputs: Any) -> tuple[Tensor, Tensor]:
    *rest, group, start = inputs
    if start is None:
        start = _start(width, group, rest[0].device)
    return function.apply(*rest, group, start)


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        token_ids: Tensor,
        temperature: float,
        ignore_index: int,
        return_entropy: bool,
        group: dist.ProcessGroup,
        vocab_start: int,
    ) -> tuple[Tensor, Tensor]:
        if logits.shape[-1] == 0:
            state = _vocabulary.empty_state(token_ids)
        else:
            state = _state(
                logits, token_ids, temperature, ignore_index, vocab_start, return_entropy
            )
        outputs = _merged(state, token_ids, temperature, ignore_index, group)
        ctx.save_for_backward(logits, token_ids, *outputs)
        ctx.numbers = temperature, ignore_index, vocab_start
        ctx.set_materialize_grads(False)
        return outputs[0], outputs[1]

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, h: Tensor | None) -> Any:
        _binary.refuse_create_graph("token_logprobs")
        logits, token_ids, *saved = ctx.saved_tensors
        if logits.shape[-1] == 0:
            return torch.empty_like(logits), *(None,) * 6
        grad = _bwd(_dense(g), _dense(h), logits, token_ids, *saved, *ctx.numbers)
        return grad, *(None,) * 6


class _LinearTokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        token_ids: Tensor,
        bias: Tensor | None,
        temperature: float,
        softcap: float | None,
        ignore_index: int,
        return_entropy: bool,
        group: dist.ProcessGroup,
        vocab_start: int,
    ) -> tuple[Tensor, Tensor]:
        if len(weight) == 0:
            state = _vocabulary.empty_state(token_ids)
        else:
            state = _linear_state(
                hidden, weight, token_ids, bias, temperature, softcap, ignore_index, vocab_start,
                return_entropy,
            )  # fmt: skip
        outputs = _merged(state, token_ids, temperature, ignore_index, group)
        ctx.save_for_backward(hidden, weight, token_ids, bias, *outputs)
        ctx.numbers = temperature, softcap, ignore_index, vocab_start
        ctx.group = group
        ctx.set_materialize_grads(False)
        return outputs[0], outputs[1]

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, h: Tensor | None) -> Any:
        _binary.refuse_create_graph("linear_token_logprobs")
        hidden, weight, token_ids, bias, *saved = ctx.saved_tensors
        needs = (ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[3])
        grads = _linear_bwd(
            _dense(g), _dense(h), hidden, weight, token_ids, bias, *saved, *ctx.numbers, *needs
        )
        grad_hidden, grad_weight, grad_bias = (
            x if needed else None for x, needed in zip(grads, needs, strict=True)
        )
        if grad_hidden is not None:
            dist.all_reduce(grad_hidden, group=ctx.group)  # each rank's slice gives its part
            grad_hidden = grad_hidden.to(hidden.dtype)
        return grad_hidden, grad_weight, None, grad_bias, *(None,) * 6


def _dense(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _merged(
    state: Tensor,
    token_ids: Tensor,
    temperature: float,
    ignore_index: int,
    group: dist.ProcessGroup,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    states = [torch.empty_like(state) for _ in range(dist.get_world_size(group))]
    dist.all_gather(states, state.contiguous(), group=group)
    whole = _vocabulary.merge_states(torch.stack(states), temperature)
    return _vocabulary.finish(whole, token_ids, temperature, ignore_index)


def _start(width: int, group: dist.ProcessGroup, device: torch.device) -> int:
    """The widths of the slices before this rank's."""
    size = torch.tensor([width], device=device)
    sizes = [torch.empty_like(size) for _ in range(dist.get_world_size(group))]
    dist.all_gather(sizes, size, group=group)
    return sum(int(x) for x in sizes[: dist.get_rank(group)])
