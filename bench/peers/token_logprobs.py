"""The log-probabilities of others, from logits."""

import importlib
from collections.abc import Callable

import torch
from torch import Tensor

from bench.case import Arguments, Case, Outputs, Unavailable
from bench.peers.peer import REFERENCE, Peer, as_tuple, compiled, on_cuda


def _log_softmax_gather(case: Case, arguments: Arguments) -> Callable[[], Outputs]:
    """What a training script writes; it has no entropy, and is given to forward passes as such."""
    if case.mode != "forward" and case.options.get("return_entropy"):
        raise Unavailable("has no entropy to differentiate")
    return lambda: (_plain_logprobs(arguments["logits"], arguments["token_ids"]),)


def _narrow_log_softmax(case: Case, arguments: Arguments) -> Callable[[], Outputs]:
    """The same in the logits' own 16 bits: half of the memory, and some digits less."""
    if case.dtype == torch.float32:
        raise Unavailable("float32 is the form above")
    if case.mode != "forward" and case.options.get("return_entropy"):
        raise Unavailable("has no entropy to differentiate")
    logits, ids = arguments["logits"], arguments["token_ids"][:, None]
    return lambda: (logits.log_softmax(-1).gather(-1, ids)[:, 0].float(),)


def _plain_logprobs(logits: Tensor, token_ids: Tensor) -> Tensor:
    return logits.float().log_softmax(-1).gather(-1, token_ids[:, None])[:, 0]


def _cross_entropy(case: Case, arguments: Arguments) -> Callable[[], Outputs]:
    if case.options.get("return_entropy"):
        raise Unavailable("has no entropy")
    cross_entropy = torch.nn.functional.cross_entropy
    logits, token_ids = arguments["logits"], arguments["token_ids"]
    return lambda: (-cross_entropy(logits.float(), token_ids, reduction="none"),)


def _compiled_logprobs(case: Case, arguments: Arguments) -> Callable[[], Outputs]:
    logits, token_ids = arguments["logits"], arguments["token_ids"]

    def plain() -> Outputs:
        return (_plain_logprobs(logits, token_ids),)

    def with_entropy() -> Outputs:
        log_p = logits.float().log_softmax(-1)
        return log_p.gather(-1, token_ids[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)

    return compiled(with_entropy if case.options.get("return_entropy") else plain)


def _trl(case: Case, arguments: Arguments) -> Callable[[], Outputs]:
    functions = importlib.import_module("trl.trainer.utils")
    if case.options.get("return_entropy"):
        function = functions.selective_log_softmax_and_entropy
    else:
        function = functions.selective_log_softmax
    return lambda: as_tuple(function(arguments["logits"], arguments["token_ids"]))


def _liger(case: Case, arguments: Arguments) -> Callable[[], Outputs]:
    """It has no entropy, and is given to forward passes as such."""
    if case.mode != "forward" and case.options.get("return_entropy"):
        raise Unavailable("has no entropy to differentiate")
    on_cuda(arguments["logits"])
    functional = importlib.import_module("liger_kernel.transformers.functional")
    logits, token_ids = arguments["logits"], arguments["token_ids"]
    return lambda: (-functional.liger_cross_entropy(logits, token_ids, reduction="none").float(),)


def of(op: str) -> list[Peer]:
    return [
        REFERENCE,
        Peer("torch log_softmax + gather", "torch", _log_softmax_gather),
        Peer("torch log_softmax + gather in 16 bits", "torch", _narrow_log_softmax),
        Peer("torch cross_entropy", "torch", _cross_entropy),
        Peer("TRL selective_log_softmax(_and_entropy)", "trl", _trl),
        Peer("Liger cross_entropy", "liger-kernel", _liger, overwrites=("logits",)),
        Peer("torch.compile", "torch", _compiled_logprobs),
    ]
